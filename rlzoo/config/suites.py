"""Benchmarks with settings of their own: well-known ones by name, as data (suites.yaml), and tasks of inspect."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rlzoo.config.reading import read_yaml
from rlzoo.config.validation import Positive, Strict
from rlzoo.errors import unknown

SUITES = Path(__file__).parent / "suites.yaml"
INSPECT = "inspect:"
"""What the name of a task of inspect begins with, as the source of problems."""
OF_TASKS: Mapping[str, Mapping[str, Any]] = {INSPECT: {"chat": True, "reward": {"name": "inspect-task"}}}
"""The settings of a benchmark whose source begins like this, where no others are given."""


class Suite(Strict):
    """A well-known benchmark: its settings, and facts about its data set."""

    description: str
    """What the problems are, and the paper that published them."""
    licence: str
    """The licence of the data set, or what is known about it."""
    problems: Positive
    """The number of problems."""
    fields: tuple[str, ...]
    """The columns of its table."""
    settings: Mapping[str, Any]
    """The settings of the benchmark."""


@cache
def list_suites() -> dict[str, Suite]:
    """All suites by name."""
    return {name: Suite.model_validate(found) for name, found in read_yaml(SUITES).items()}


def get_suite(name: str) -> Suite:
    """The suite with a name. Raises UserError for an unknown one."""
    if name not in (known := list_suites()):
        raise unknown("suite", name, known)
    return known[name]


def settings_of(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a benchmark with those of its suite, or of its kind of task, where it has no others.

    Raises UserError for an unknown suite.
    """
    if isinstance(name := given.get("suite"), str):
        return {**get_suite(name).settings, **given}
    source = given.get("source")
    prefix = next(filter(source.startswith, OF_TASKS), None) if isinstance(source, str) else None
    return given if prefix is None else {**OF_TASKS[prefix], **{n: one for n, one in given.items() if one is not None}}
