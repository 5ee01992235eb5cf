"""Shell completion. Names of built-ins are taken from the names of their files, so that TAB does not import torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from typer import Context

PACKAGE = Path(__file__).parents[1]


def experiments(incomplete: str) -> list[str]:
    """The built-in experiments that begin with the text."""
    folder = PACKAGE / "experiments"
    found = [*folder.glob("*.yaml"), *folder.glob("*/*.yaml")]
    return _beginning(incomplete, (path.relative_to(folder).with_suffix("").as_posix() for path in found))


def objectives(incomplete: str) -> list[str]:
    """The objectives, built in or from installed packages, that begin with the text."""
    return _beginning(incomplete, _names("algorithms", "rlzoo.objectives"))


def several_objectives(incomplete: str) -> list[str]:
    """The list so far, continued by each objective that can follow."""
    *before, last = incomplete.split(",")
    return [",".join([*before, name]) for name in objectives(last) if name not in before]


def rewards(incomplete: str) -> list[str]:
    """The rewards, built in or from installed packages, that begin with the text."""
    return _beginning(incomplete, _names("rewards", "rlzoo.rewards"))


def log_formats(incomplete: str) -> list[str]:
    """The formats of logs, built in or from installed packages, that begin with the text."""
    return _beginning(incomplete, _names("buffers/importers", "rlzoo.importers"))


def settings(context: Context, incomplete: str) -> list[str]:
    """The dotted names for --set that begin with the text."""
    from pydantic import BaseModel

    from rlzoo.cli.settings import RescoreSettings, TrainSettings, names_of
    from rlzoo.config import Experiment

    own: dict[str | None, type[BaseModel]] = {"train": TrainSettings, "rescore": RescoreSettings}
    model = own.get(context.command.name, Experiment)
    return _beginning(incomplete, (f"{name}=" for name in names_of(model)))


def _names(folder: str, group: str) -> set[str]:
    from importlib.metadata import entry_points

    built_in = {path.stem.replace("_", "-") for path in (PACKAGE / folder).glob("[!_]*.py")}
    return built_in | {point.name for point in entry_points(group=group)}


def _beginning(start: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(start))
