"""Comparisons small enough for tests: a tiny grid of the facts world, and what spares a process of its own.

Such a process imports torch and transformers, which takes longer than most tests: five seconds of a core.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rich.console import Console

from rlzoo.config import Experiment, load_experiment
from rlzoo.jobs.pool import InThisProcess, Workers

SMALL = {
    "train.limit": 6,
    "rollouts.prompts": 6,
    "rollouts.samples": 4,
    "validation.limit": 3,
    "benchmarks": {"facts": {"source": "world:facts/test", "limit": 4}},
    "retention": {},
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


@dataclass(frozen=True)
class Ended:
    """How a process ended, negative for a signal, and what it wrote."""

    status: int
    out: str
    errors: str


def settle_threads() -> None:
    """Make a forked copy use one thread: several that start at once would trip over the pool of the original."""
    torch.set_num_threads(1)


class Copy:
    """A copy of this process that runs a function, and may be killed or change whatever it likes.

    A number that the function returns is the status. An exception, of which the traceback is written, has the status 1.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        if sys.platform != "linux":
            pytest.skip("copies this process")
        self._out, self._errors = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115  (until its end)
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            settle_threads()
            os.dup2(self._out.fileno(), 1)
            os.dup2(self._errors.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
            found = run()
            sys.stdout.flush()
            status = found if isinstance(found, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # nothing of the tests' own is torn down twice

    def errors(self) -> str:
        """What it has written so far; without moving the place in the file, which both processes share."""
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode()

    def ended(self) -> Ended:
        """Wait for its end."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._out.seek(0)
        with self._out, self._errors:
            return Ended(status, self._out.read(), self.errors())


def forked(run: Callable[[], object]) -> Ended:
    """Run a function in a `Copy` of this process."""
    return Copy(run).ended()
