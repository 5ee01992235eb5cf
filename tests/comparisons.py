"""Comparisons small enough for tests: a tiny grid of the facts world, and a pool that stays in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from rlzoo.config import Experiment, load_experiment
from rlzoo.jobs.pool import InThisProcess, Workers

SMALL = {
    "train.limit": 6,
    "rollouts.prompts": 6,
    "rollouts.samples": 4,
    "validation.limit": 3,
    "benchmarks": {"facts": {"source": "world:facts/test", "limit": 4}},
    "evaluation": {"samples": 3, "k": 2, "max_new_tokens": 8, "curve_points": 1, "curve_problems": 2},
    "training": {"steps": 2, "batch_size": 8},
    "seeds": [0],
    "baseline": None,
}
SMALL_OPTIONS = ["--steps", "2", "--limit", "4", "--seeds", "0", "--samples", "2", "--batch-size", "8"]


def small(algorithms: Mapping[str, Any], **changes: Any) -> Experiment:
    """A comparison of seconds; ``changes`` are dotted keys with "__" for the dot."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return load_experiment("facts", {**SMALL, "algorithms": dict(algorithms), **dotted})


@contextmanager
def inline_pool(workers: int, threads: int, console: Console) -> Iterator[Workers]:
    """What `rlzoo.jobs.pool.pool` gives, in this process."""
    yield InThisProcess()


RLZOO = [sys.executable, "-c", "import sys; from rlzoo.cli import main; sys.exit(main())"]
"""The command in a process of its own, wherever it is installed."""
