"""The packages of rlzoo and the direction of their imports: one way, from what is used to what uses it."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import rlzoo

ROOT = Path(__file__).parent.parent
BESIDE = ("algorithms", "rewards", "experiments")
"""At the top level of the repository; imported as `rlzoo.algorithms` and so on, through symlinks."""
LAYERS = (
    ("errors",),
    ("registry", "config", "worlds"),
    ("types",),
    ("advantages", "inputs", "jobs", "reward"),
    ("objective", "document"),
    ("bases",),
    ("algorithms", "rewards"),
    ("policy",),
    ("buffers",),
    ("rollout",),
    ("training",),
    ("evaluation",),
    ("comparison",),
    ("variance",),
    ("integrations", "testing"),
    ("cli",),
    ("__main__", "experiments"),
)
"""Each imports from lines above its own alone. `rlzoo` itself imports nothing until a name is asked for."""
ENTRIES = 22
NO_MODULE = {"__init__", "__main__", "py.typed", *BESIDE}
"""In rlzoo/ for Python, type checkers and the owner's top level."""


class Import(NamedTuple):
    """That ``module`` takes ``name`` from ``source``, at ``line``; no name: the whole module."""

    module: str
    source: str
    name: str
    line: int


@cache
def sources() -> dict[str, ast.Module]:
    """The modules of rlzoo by name."""
    found = {}
    for top in ("rlzoo", *BESIDE):
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if top == "rlzoo" and len(parts) > 1 and parts[1] in BESIDE:
                continue
            name = ".".join(parts if top == "rlzoo" else ("rlzoo", *parts)).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports, those in functions too, but not those for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield from statements(other)
        else:
            yield from statements(child)


@cache
def imports() -> list[Import]:
    """What modules of rlzoo import from each other."""
    found = []
    for module, tree in sources().items():
        for node in statements(tree):
            if isinstance(node, ast.Import):
                found += [Import(module, alias.name, "", node.lineno) for alias in node.names]
                continue
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                source, name = (whole, "") if whole in sources() else (node.module or "", alias.name)
                found.append(Import(module, source, name, node.lineno))
    return [each for each in found if each.source.split(".")[0] == "rlzoo"]


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "rlzoo"


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle; none without."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_package_has_a_layer() -> None:
    placed = [name for layer in LAYERS for name in layer]
    assert len(placed) == len(set(placed))
    assert set(placed) == {package_of(module) for module in sources()} - {"rlzoo"}


def test_packages_import_one_way() -> None:
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    wrong = [
        f"{each.module}:{each.line} imports from {each.source}"
        for each in imports()
        if (importer := package_of(each.module)) != (imported := package_of(each.source))
        and (importer == "rlzoo" or imported == "rlzoo" or layer[imported] >= layer[importer])
        and not (importer == "experiments" and imported == "rlzoo")  # scripts, which use the public names
    ]
    assert not wrong


@pytest.mark.parametrize("package", ["algorithms", "rewards"])
def test_what_users_copy_stands_on_the_core(package: str) -> None:
    above = {"policy", "buffers", "rollout", "training", "evaluation", "comparison", "variance", "jobs", "cli"}
    taken = {package_of(each.source) for each in imports() if package_of(each.module) == package}
    assert not taken & above


def test_no_import_cycle() -> None:
    modules, packages = defaultdict(set), defaultdict(set)
    for each in imports():
        if each.source != each.module:
            modules[each.module].add(each.source)
        if (importer := package_of(each.module)) != (imported := package_of(each.source)):
            packages[importer].add(imported)
    assert not cycle(packages)
    assert not cycle(modules)


def test_private_names_stay_in_their_package() -> None:
    wrong = [
        f"{each.module}:{each.line} imports {each.source}.{each.name}"
        for each in imports()
        if package_of(each.module) != package_of(each.source)
        and any(part.startswith("_") and not part.startswith("__") for part in [*each.source.split("."), each.name])
    ]
    assert not wrong


def test_a_class_name_is_used_once() -> None:
    homes = defaultdict(list)
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module)
    assert not {name: modules for name, modules in homes.items() if len(modules) > 1}


def test_the_top_of_the_package_is_small() -> None:
    entries = {path.stem if path.suffix == ".py" else path.name for path in (ROOT / "rlzoo").iterdir()}
    entries -= {"__pycache__", *NO_MODULE}
    assert len(entries) <= ENTRIES, sorted(entries)


def test_what_registers_a_plugin_is_at_the_top_of_the_package() -> None:
    registers = {
        node.name
        for tree in sources().values()
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and (node.name == "register" or node.name.startswith("register_"))
    }
    assert registers and registers | {"Collector", "Input", "Sampler", "Selector"} <= set(rlzoo.__all__)
    assert all(getattr(rlzoo, name).__name__ == name for name in rlzoo.__all__)


def test_files_are_short() -> None:
    for top, most in (("rlzoo", 400), ("rewards", 400), ("experiments", 400), ("algorithms", 100)):
        for path in (ROOT / top).rglob("*.py"):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            inside = top == "rlzoo" and path.relative_to(ROOT / top).parts[0] in BESIDE
            assert inside or lines <= most, f"{path.relative_to(ROOT)} has {lines} lines, of at most {most}"
