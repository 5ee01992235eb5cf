"""How far long work has come, and how long the rest will take."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlzoo.jobs.heartbeat import Heartbeat

Report = Callable[[float, str], None]
"""Called with the fraction of the work that is done, and a description of what is being done."""


class Remaining:
    """The time that the rest of some work will take if it goes on as since the first call."""

    def __init__(self) -> None:
        self._begun: tuple[float, float] | None = None

    def after(self, share: float) -> str:
        """``, 0:01:20 left`` once a fraction ``share`` is done; empty until there is something to tell it by.

        Work that was done before the first call, such as that of an interrupted run, does not count.
        """
        now = time.monotonic()
        if self._begun is None or share < self._begun[1]:
            self._begun = now, share
        since, start = self._begun
        if share <= start or share >= 1:
            return ""
        return f", {timedelta(seconds=round((now - since) * (1 - share) / (share - start)))} left"


class Together:
    """How far several tasks have come together, each of which reports its own fraction."""

    def __init__(self) -> None:
        self._names, self._shares, self._remaining = set[str](), dict[str, float](), Remaining()

    def begin(self, names: Iterable[str]) -> None:
        """Count these tasks from now on."""
        self._names, self._shares, self._remaining = set(names), {}, Remaining()

    def report(self, name: str, share: float) -> None:
        """Set the fraction of a task that is done; 1 at its end."""
        if name in self._names:
            self._shares = {**self._shares, name: share}  # another thread may be reading the old one

    @property
    def share(self) -> float:
        """The fraction of all tasks that is done."""
        return sum(self._shares.values()) / max(1, len(self._names))

    @property
    def done(self) -> str:
        """The number of tasks that are done, as in ``3 of 24``; empty without tasks."""
        return f"{sum(share == 1 for share in self._shares.values())} of {len(self._names)}" if self._names else ""

    def __str__(self) -> str:
        return f"{self.done} done{self._remaining.after(self.share)}" if self._names else ""


@contextmanager
def loading() -> Iterator[None]:
    """Say on a terminal that libraries are being imported, which takes some seconds, for as long as they are."""
    text = "loading PyTorch and transformers"
    is_shown = sys.stderr.isatty() and "transformers" not in sys.modules and os.environ.get("RANK", "0") == "0"
    if is_shown:
        print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if is_shown:
            print(f"\r{' ' * len(text)}\r", end="", file=sys.stderr, flush=True)


@contextmanager
def bars(console: Console) -> Iterator[Progress]:
    """Bars with elapsed and remaining time, one per task with the field ``detail``; none unless on a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    shown = Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # what is printed meanwhile stands above the bars, but stays in its pipe
        disable=not console.is_terminal,
    )
    if not console.is_terminal:
        yield shown  # neither started nor stopped: rich 14.0 ends even a disabled one with an empty line
        return
    with shown:
        yield shown


@contextmanager
def reporting(console: Console, doing: str) -> Iterator[Report]:
    """A function that says how far work in this process has come: a bar on a terminal, else a line now and then."""
    remaining = Remaining()
    with Heartbeat(console, doing) as heartbeat, bars(console) as shown:
        bar = shown.add_task(doing, total=None, detail="")

        def report(share: float, detail: str) -> None:
            remaining.after(share)  # its clock starts with the work, and not with the first line
            heartbeat.doing = lambda: f"{detail}{remaining.after(share)}"
            shown.update(bar, total=1.0, completed=share, description=detail)

        yield report


def counting(total: int, what: str, report: Report) -> Callable[[int], None]:
    """A function that adds to the number of things done, of a ``total``, and reports it."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        report(done / total, f"{what} {done}/{total}")

    return advance
