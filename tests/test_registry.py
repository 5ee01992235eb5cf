"""Names: built-ins, entry points, ``package.module:Name``, ``path/to/file.py:Name``; options; the layout."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import rlzoo
from rlzoo import objective as objective_module
from rlzoo import registry as registry_module
from rlzoo.errors import UserError
from rlzoo.objective import Objective, get_objective, list_objectives, options_of, register, surrogate
from rlzoo.types import Coefficients, TokenBatch

ROOT = Path(__file__).parents[1]
ENGINE = Path(rlzoo.__file__).parent
ORDINARY = {"power"}
"""Names that are words of English too, which identifiers of the engine may hold: there, only strings tell."""
SEVEN = {"dft", "dpo", "grpo", "iw-sft", "ppo", "rft", "sft"}

PLUGIN = """\
from dataclasses import dataclass
import torch
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients

@register
@dataclass(frozen=True)
class Halved(Objective):
    name = "halved"
    scale: float = 0.5
    def coefficients(self, batch):
        return Coefficients(torch.full_like(batch.logp, self.scale))
"""


@pytest.fixture(autouse=True)
def leave_the_registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    list_objectives()
    entries = objective_module._objectives._entries
    monkeypatch.setattr(objective_module._objectives, "_entries", dict(entries))
    monkeypatch.setattr(objective_module._objectives, "_broken", {})


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_built_ins_are_there() -> None:
    assert set(list_objectives()) >= SEVEN
    assert list_objectives() == sorted(list_objectives())
    assert {get_objective(name).name for name in SEVEN} == SEVEN


def test_case_and_underscores_do_not_matter() -> None:
    assert get_objective(" IW_SFT ") == get_objective("iw-sft")


def test_an_unknown_name_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(UserError) as error:
        get_objective("grop")
    message = one_line(error)
    assert "'grop'" in message and "did you mean 'grpo'?" in message
    assert all(name in message for name in SEVEN)


# Registering


def test_a_taken_name_is_an_error_and_the_same_class_is_not() -> None:
    present = objective_module.objective_class("sft")
    assert register(present) is present

    @dataclass(frozen=True)
    class Impostor(Objective):
        name: ClassVar[str] = "sft"

    with pytest.raises(UserError) as error:
        register(Impostor)
    assert "'sft' is registered twice" in one_line(error)
    assert "Impostor" in str(error.value) and "SFT" in str(error.value)
    assert objective_module.objective_class("sft") is present


def test_an_objective_without_coefficients_says_so() -> None:
    @dataclass(frozen=True)
    class Bare(Objective):
        name: ClassVar[str] = "bare"

    batch = TokenBatch(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match=r"Bare must define coefficients"):
        surrogate(Bare(), batch)


def test_a_missing_column_is_named() -> None:
    batch = TokenBatch(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(UserError, match="'rft' needs reward"):
        surrogate(get_objective("rft"), batch)


# What is not built in


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "halved.py"
    path.write_text(PLUGIN)
    return path


def test_an_objective_from_a_file(plugin: Path) -> None:
    objective = get_objective(f"{plugin}:Halved", scale=0.25)
    batch = TokenBatch(torch.tensor([[-2.0, -4.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert surrogate(objective, batch).item() == 0.25 * 3
    assert objective == get_objective(f"{plugin}:Halved", scale=0.25)  # loaded once, so one class
    assert "halved" in list_objectives()


def test_an_objective_from_a_relative_file(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plugin.parent)
    assert get_objective("halved.py:Halved").name == "halved"


def test_an_objective_from_a_module(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (plugin.parent / "rlzoo_test_package").mkdir()
    plugin.rename(plugin.parent / "rlzoo_test_package" / "halved.py")
    monkeypatch.syspath_prepend(str(plugin.parent))
    assert get_objective("rlzoo_test_package.halved:Halved", scale=2).coefficients(
        TokenBatch(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    ).values.tolist() == [[2.0]]
    assert get_objective("rlzoo.algorithms.sft:SFT") == get_objective("sft")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("no/such/file.py:Halved", r"objective file .*file\.py' does not exist"),
        ("no_such_package.module:Halved", r"objective module 'no_such_package\.module' cannot be imported"),
        ("rlzoo.algorithms.sft:Nothing", r"rlzoo\.algorithms\.sft has no 'Nothing'; it has: .*SFT"),
        ("rlzoo.errors:UserError", r"'rlzoo\.errors:UserError' is not a subclass of rlzoo\.Objective"),
    ],
)
def test_a_wrong_reference_says_what_is_wrong(spec: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        get_objective(spec)
    one_line(error)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1 / 0\n")
    for _ in range(2):  # a failed import leaves nothing behind
        with pytest.raises(UserError, match=r"broken\.py' cannot be loaded: ZeroDivisionError"):
            get_objective(f"{path}:Halved")


@dataclass(frozen=True)
class FromEntryPoint(Objective):
    name: ClassVar[str] = "from-entry-point"

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(-torch.ones_like(batch.logp))


def with_entry_point(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the registry fill itself anew, from a package that offers `FromEntryPoint` under ``name``."""
    point = EntryPoint(name, f"{__name__}:FromEntryPoint", "rlzoo.objectives")
    found = {"rlzoo.objectives": [point]}
    monkeypatch.setattr(registry_module, "entry_points", lambda group: found.get(group, []))
    monkeypatch.setattr(objective_module._objectives, "_filled", False)


def test_an_objective_from_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    with_entry_point("from-entry-point", monkeypatch)
    assert "from-entry-point" in list_objectives()
    assert get_objective("from-entry-point") == FromEntryPoint()


def test_an_entry_point_cannot_replace_a_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    with_entry_point("dpo", monkeypatch)
    assert "dpo" not in list_objectives()
    with pytest.raises(UserError, match=r"'dpo' is registered twice: by rlzoo.algorithms.dpo:DPO and by test_registry"):
        get_objective("dpo")


# Options


def test_options_are_listed_and_coerced() -> None:
    assert options_of(objective_module.objective_class("grpo")) == {
        "clip": {"type": "float", "default": 0.2},
        "kl_coefficient": {"type": "float", "default": 0.04},
        "kl_estimator": {"type": "Literal['k1', 'k2', 'k3']", "default": "k3"},
        "delta": {"type": "float | None", "default": None},
        "clip_high": {"type": "float | None", "default": None},
        "scale_rewards": {"type": "Literal['group', 'batch', 'none']", "default": "group"},
        "aggregation": {"type": "Literal['sequence', 'token', 'constant']", "default": "sequence"},
        "level": {"type": "Literal['token', 'sequence']", "default": "token"},
        "max_length": {"type": "int", "default": 256},
        "kl_correction": {"type": "bool", "default": False},
        "truncated": {"type": "Literal['keep', 'mask', 'drop']", "default": "keep"},
    }
    assert get_objective("grpo", clip="0.3") == get_objective("grpo", clip=0.3)
    assert get_objective("ppo", dual_clip=None) == get_objective("ppo")


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        (
            "grpo",
            {"clipp": 0.1},
            r"unknown option of objective 'grpo' 'clipp': did you mean 'clip'\? known: aggregation, clip, ",
        ),
        (
            "sft",
            {"beta": 0.1},
            r"unknown option of objective 'sft' 'beta': known: aggregation, label_smoothing, truncated",
        ),
        ("sft", {"source": "x"}, r"unknown option of objective 'sft' 'source'"),  # a class variable
        ("dpo", {"beta": "much"}, r"objective 'dpo': option 'beta' = 'much': .*valid number"),
        ("dpo", {"variant": "cubic"}, r"option 'variant' = 'cubic': .*'sigmoid', .*, 'hinge' or 'ipo'"),
        ("rft", {"samples_per_prompt": 1.5}, r"option 'samples_per_prompt' = 1\.5: .*integer"),
    ],
)
def test_a_wrong_option_is_named(name: str, options: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        get_objective(name, **options)
    one_line(error)


# The layout


@pytest.mark.parametrize("package", ["algorithms", "rewards"])
def test_a_second_copy_cannot_be_imported(package: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", f"import {package}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert f"ImportError: import rlzoo.{package}, not {package}" in run.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "algorithms").glob("*.py")), ids=lambda path: path.name)
def test_an_algorithm_fits_a_hundred_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 100


def words(source: str, filename: str = "<test>") -> Iterator[tuple[int, str]]:
    """Every identifier, whole and split at underscores, and every string as a whole, with its line.

    An identifier that is one of the `ORDINARY` words is left out.
    """
    for node in ast.walk(ast.parse(source, filename)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield line, node.value.strip().lower().replace("_", "-")
        for attribute in ("id", "attr", "arg", "name", "asname", "module"):
            value = getattr(node, attribute, None)
            if isinstance(value, str):
                for word in {value.lower().replace("_", "-"), *re.split(r"[._]", value.lower())} - ORDINARY:
                    yield line, word


def test_words_finds_names_wherever_code_can_hold_them() -> None:
    source = 'import a.dft as b\ndef is_grpo(ppo=1):\n    """The dpo of it."""\n    return x.rft == "IW_SFT"\n'
    found = {word for _, word in words(source)}
    assert found >= {"dft", "grpo", "ppo", "rft", "iw-sft"} and "dpo" not in found
    assert {word for _, word in words('total_power = 1\nname == "power"')} == {"total-power", "total", "name", "power"}


def test_the_engine_knows_no_algorithm_by_name() -> None:
    top_level = {"algorithms", "rewards", "experiments"}  # links to the folders beside the engine
    files = [p for p in ENGINE.rglob("*.py") if p.relative_to(ENGINE).parts[0] not in top_level]
    assert len(files) >= 5
    built_in = {name for name, entry in objective_module._objectives.items() if entry.__module__.startswith("rlzoo.")}
    assert built_in >= SEVEN
    named = [
        f"{path.relative_to(ENGINE)}:{line}: {word}"
        for path in files
        for line, word in words(path.read_text(), str(path))
        if word in built_in
    ]
    assert named == []
