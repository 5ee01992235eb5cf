"""Experiment files: those that ship with rlzoo, and a user's own, with changes applied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlzoo.config.reading import lay, read_yaml
from rlzoo.config.settings import Experiment
from rlzoo.config.sources import benchmarks_by_name
from rlzoo.config.validation import validated
from rlzoo.errors import UserError, unknown

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
"""The folder of the experiments that ship with rlzoo."""
OF_ONE_FILE = ("extends", "description", "reported")
"""What a file that extends another does not take from it."""


def list_experiments() -> dict[str, str]:
    """The experiments that ship with rlzoo: name → description."""
    return {name: str(read_yaml(path).get("description", "")).strip() for name, path in _included().items()}


def _included() -> dict[str, Path]:
    """The files of the experiments that ship with rlzoo, by name; those of a folder have its name before theirs."""
    found = [*sorted(EXPERIMENTS.glob("*.yaml")), *sorted(EXPERIMENTS.glob("*/*.yaml"))]
    return {path.relative_to(EXPERIMENTS).with_suffix("").as_posix(): path for path in found}


def load_experiment(name: str, changes: Mapping[str, Any] | None = None, twin: bool = False) -> Experiment:
    """The experiment of a name or a file path, with ``changes`` (dotted keys → values) applied.

    ``twin``: its small twin, with the changes under the file's ``twin`` before others. Raises UserError for an unknown
    name, an unreadable file, a file without a twin, and a wrong setting, which it names.
    """
    path = _place(name, Path())
    data = _read(path, ())
    small = data.pop("twin", {})
    if twin and not small:
        raise UserError(f"experiment {name!r} has no small twin: it has no settings under `twin`")
    data = {"name": path.stem if _is_file(name) else name, **data}
    _lay_all(data, {"name": f"{data['name']}-twin", **small} if twin else {})
    _lay_all(data, changes or {})
    return validated(Experiment, data, str(path.name))


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _place(name: str, beside: Path) -> Path:
    """The file of an experiment; a path is relative to the folder ``beside``. Raises UserError for an unknown name."""
    if _is_file(name):
        return beside / Path(name).expanduser()
    if name not in (known := _included()):
        raise unknown("experiment", name, known)
    return known[name]


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The settings in a file, laid over those of the experiment that it extends, as ``--set`` would.

    ``above`` are the files that extend this one. Raises UserError for a chain of files without an end.
    """
    own, data = read_yaml(path), dict[str, Any]()
    if (parent := own.pop("extends", None)) is not None:
        if not isinstance(parent, str):
            raise UserError(f"{path}: extends = {parent!r:.60}: give the name or the file of an experiment")
        if path.resolve() in above:
            raise UserError(f"{path}: extends: this file extends itself through {parent!r}")
        try:
            data = _read(_place(parent, path.parent), (*above, path.resolve()))
        except UserError as error:
            raise UserError(f"{path}: extends: {error}") from None
        data = {key: value for key, value in data.items() if key not in OF_ONE_FILE}
    twin = own.pop("twin", None) or {}
    if not isinstance(twin, Mapping):
        raise UserError(f"{path}: twin = {twin!r:.60}: give a mapping of settings")
    _lay_all(data, own)
    return data | {"twin": {**data.get("twin", {}), **twin}}


def _lay_all(data: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        lay(data, str(key), benchmarks_by_name(value) if key in ("benchmarks", "retention") else value)
