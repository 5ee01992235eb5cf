"""``rlzoo new``: a working file and its test, as a starting point."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shlex
from pathlib import Path
from string import Template
from typing import Annotated, Literal

from typer import Argument, Option

from rlzoo.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"


def new(
    kind: Annotated[Literal["objective"], Argument(metavar="KIND", help="What to write: objective.")],
    name: Annotated[str, Argument(metavar="NAME", help="Its name, as in my-objective.")],
    folder: Annotated[
        Path,
        Option(metavar="FOLDER", help="Where to write it; in a clone of rlzoo, its own folders are used."),
    ] = Path(),
) -> int:
    """Write a working objective and its test, as a starting point for your own.

    Examples:
      rlzoo new objective my-objective
      rlzoo new objective my-objective --folder plugins
    """
    assert kind == "objective"
    print(new_objective(name, folder))
    return 0


def new_objective(name: str, folder: Path) -> str:
    """Write an objective of that name and its test into the folder; returns what to do next.

    They are ``NAME.py`` and ``test_NAME.py``; in a clone of rlzoo they go to ``algorithms/`` and ``tests/``. Raises
    UserError for a name that is taken or invalid, and if one of the files exists already.
    """
    from rlzoo.registry import canonical

    name = canonical(name)
    stem, class_name = name.replace("-", "_"), "".join(word.capitalize() for word in name.split("-"))
    in_clone = (folder / "algorithms" / "__init__.py").is_file() and (folder / "tests" / "canonical.py").is_file()
    code, test = folder / f"{stem}.py", folder / f"test_{stem}.py"
    if in_clone:
        code, test = folder / "algorithms" / code.name, folder / "tests" / test.name
    template = (TEMPLATES / "objective.py.txt").read_text(encoding="utf-8")
    _check(name, stem, class_name, template)
    for path in (code, test):
        if path.exists():
            raise UserError(f"'{path}' exists already: choose another name, or remove it")
    if not in_clone and _is_installed(stem):
        raise UserError(f"objective name {name!r}: {code.name} would hide the module {stem!r}; choose another name")

    beside = f"f\"{{Path(__file__).with_name('{code.name}')}}:{class_name}\""
    words = {
        "name": name,
        "title": name.replace("-", " ").capitalize(),
        "class_name": class_name,
        "spec": f'"{name}"' if in_clone else beside,
        "stem": stem,
        "imports": "" if in_clone else "from pathlib import Path\n\n",
    }
    test_template = (TEMPLATES / "test_objective.py.txt").read_text(encoding="utf-8")
    for path, text in ((code, template), (test, test_template)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(Template(text).substitute(words), encoding="utf-8")
        except OSError as error:
            raise UserError(f"'{path}' cannot be written ({error.strerror}): give another --folder") from None
    return "\n".join(_next_steps(name, class_name, code, test, in_clone))


def _check(name: str, stem: str, class_name: str, template: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise UserError(f"objective name {name!r}: give letters, digits and dashes, a letter first, as in my-objective")
    imported = re.search(rf"import .*\b{class_name}\b", template)
    if keyword.iskeyword(stem) or keyword.iskeyword(class_name) or imported:
        raise UserError(f"objective name {name!r}: {class_name} means something else in its file; choose another name")
    from rlzoo.objective import list_objectives

    if name in list_objectives():
        raise UserError(f"objective {name!r} is registered already: choose another name")


def _is_installed(module: str) -> bool:
    """Whether a module can be imported from anywhere but the current folder."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None and Path(found.origin).parent != Path.cwd()


def _next_steps(name: str, class_name: str, code: Path, test: Path, in_clone: bool) -> list[str]:
    from rlzoo.cli.objectives_page import COMMAND as PAGE_COMMAND

    steps = [f"write your coefficient in {code} and the loss of its paper in {test}"]
    run = f"pytest {shlex.quote(str(test))}"
    if in_clone:
        losses, contract = test.with_name("canonical.py"), test.with_name("test_objectives.py")
        steps.append(f"add that loss as {name!r} to CANONICAL in {losses}, for the contract of all objectives")
        steps += [f"{run} {shlex.quote(str(contract))}", PAGE_COMMAND]
    else:
        steps.append(run)
    spec = name if in_clone else f"{code}:{class_name}"
    steps.append(f"rlzoo compare arithmetic --algorithms {shlex.quote(f'sft,{spec}')}")
    return [f"wrote {code} and {test}; next:", *(f"  {number}. {step}" for number, step in enumerate(steps, 1))]
