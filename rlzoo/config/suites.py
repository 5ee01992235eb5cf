"""Benchmark suites: well-known benchmarks by name, as data (suites.yaml)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rlzoo.config.reading import read_yaml
from rlzoo.config.validation import Positive, Strict
from rlzoo.errors import unknown

SUITES = Path(__file__).parent / "suites.yaml"


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
