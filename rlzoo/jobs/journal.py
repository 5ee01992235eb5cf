"""What the tasks of a run are doing, one JSON object per line and one file per task, for `rlzoo serve` to read.

Nothing reads a journal to resume from it: what cannot be written is left out, and a run may be killed in mid-line.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlzoo.jobs.places import journal_file
from rlzoo.jobs.pool import Workers, why
from rlzoo.jobs.progress import Report
from rlzoo.jobs.ranks import is_main


class Journal:
    """The journal of one task. In a distributed run, the main process writes."""

    def __init__(self, state: Path, name: str) -> None:
        self._file = journal_file(state, name)

    def begin(self) -> None:
        """Record that the task begins; what was recorded of an earlier attempt stays."""
        if is_main():
            with suppress(OSError):
                self._file.parent.mkdir(parents=True, exist_ok=True)
        self.write(begun=True)

    def progress(self, share: float, detail: str) -> None:
        """Record how far the task has come."""
        self.write(share=share, detail=detail)

    def step(self, metrics: Mapping[str, float], before: int = 0, share: float | None = None) -> None:
        """Record the metrics of an optimizer step, numbered after those of ``before``; infinite and NaN become null."""
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.write(row=row | {"step": before + int(metrics["step"])}, **({} if share is None else {"share": share}))

    def write(self, **entry: Any) -> None:
        """Append a line, with the time."""
        if is_main():
            line = json.dumps({"time": round(time.time(), 3), **entry}) + "\n"
            with suppress(OSError), self._file.open("ab") as file:  # a run does not end because nobody can look on
                file.write(line.encode())


@dataclass(frozen=True)
class JournaledTask:
    """A task's function, which records in the task's journal that it begins, and what it reports."""

    function: Callable[..., Any]
    state: Path
    name: str

    def __call__(self, *arguments: Any) -> Any:
        """Call the function, whose last argument is its reporter."""
        *given, report = arguments
        journal = Journal(self.state, self.name)
        journal.begin()

        def told(share: float, detail: str) -> None:
            journal.progress(share, detail)
            report(share, detail)

        reporter: Report = told
        return self.function(*given, reporter)


class JournaledWorkers:
    """`Workers` with a journal per task: when it began, how far it has come, and how it ended."""

    def __init__(self, workers: Workers, state: Path) -> None:
        self._workers, self._state = workers, state.absolute()

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """See `Workers.submit`."""
        return self._workers.submit(name, JournaledTask(function, self._state, name), *arguments)

    def gather(self, futures: Mapping[Future[Any], str]) -> Iterator[tuple[str, Future[Any]]]:
        """See `Workers.gather`."""
        for name, future in self._workers.gather(futures):
            error = future.exception()
            Journal(self._state, name).write(ended=None if error is None else why(error))
            yield name, future

    def doing(self) -> str:
        """See `Workers.doing`."""
        return self._workers.doing()
