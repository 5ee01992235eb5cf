"""What a run's folder says of the run: its state, and that of every cell."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from rlzoo.comparison.dashboard.curves import StepColumns, columns_of
from rlzoo.comparison.dashboard.files import WatchedFolder
from rlzoo.jobs.places import JOURNAL, STATE

WAITING, RUNNING, STOPPED, TRAINED, DONE, FAILED = "waiting", "running", "stopped", "trained", "done", "failed"
STATUSES = {
    RUNNING: "being trained or evaluated",
    FAILED: "ended with an error",
    STOPPED: "begun, and not running now",
    DONE: "evaluated on the benchmarks",
    TRAINED: "evaluated on validation, by which learning rates are chosen",
    WAITING: "not begun",
}
"""The states of a cell, in the order in which they are shown, and what they mean."""


@dataclass
class TaskLog:
    """The journal of a task: see `rlzoo.jobs.journal`."""

    begun: float | None = None
    """When the newest attempt began, in seconds since 1970."""
    first: tuple[float, float] | None = None
    """When that attempt first told how far it had come, and how far."""
    last: float = 0.0
    """When it last told anything."""
    share: float = 0.0
    detail: str = ""
    has_ended: bool = False
    error: str | None = None
    steps: StepColumns = field(default_factory=StepColumns)

    def add(self, entry: dict[str, Any]) -> None:
        """Take in a line."""
        self.last = float(entry["time"])
        if entry.get("begun"):
            self.begun, self.first, self.has_ended, self.error = self.last, None, False, None
            self.share, self.detail = 0.0, ""
        if "share" in entry:
            self.share = float(entry["share"])
            self.first = self.first or (self.last, self.share)
            self.detail = str(entry.get("detail", self.detail))
        if "row" in entry:
            self.steps.add(entry["row"])
        if "point" in entry:
            self.steps.add_point(entry["point"])
        if "ended" in entry:
            self.has_ended, self.error = True, entry["ended"]

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes if it goes on as since it first told; None if that cannot be said."""
        if self.has_ended or self.first is None or not self.first[1] < self.share < 1:
            return None
        since, start = self.first
        return (self.last - since) * (1 - self.share) / (self.share - start)


@dataclass
class CellView:
    """One cell, or the training of `rlzoo train`."""

    id: str
    algorithm: str
    seed: int
    learning_rate: float | None
    status: str = WAITING
    log: TaskLog = field(default_factory=TaskLog)
    steps: StepColumns = field(default_factory=StepColumns)
    planned: int | None = None
    """The number of planned steps."""
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Benchmark → metric → value, once it is evaluated."""
    validation: float | None = None
    """Its avg@k on validation, where learning rates are chosen."""
    error: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What its result says besides: ``costs``, ``events``, ``ended`` and ``resolved``."""

    @property
    def share(self) -> float:
        """How much of its work is done."""
        return 1.0 if self.status in (DONE, TRAINED, FAILED) else self.log.share if self.status != WAITING else 0.0


@dataclass
class RunView:
    """A run, as its files have it now."""

    name: str
    command: str
    """The command that writes the folder, such as ``compare``; empty if that is not known."""
    state: str
    """``running``, ``interrupted``, ``killed``, ``failed`` or ``finished``."""
    told: str = ""
    """More about the state, such as which process writes, or the error."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    cells: Sequence[CellView] = ()
    tasks: Mapping[str, TaskLog] = field(default_factory=dict)
    """The work that cells share."""
    base: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The base model's metrics by benchmark."""
    events: Sequence[str] = ()
    summary: Mapping[tuple[str, str, str], Mapping[str, Any]] = field(default_factory=dict)
    """Of a finished comparison: algorithm, benchmark, metric → mean and interval over seeds and problems."""

    @property
    def is_running(self) -> bool:
        return self.state == RUNNING

    @property
    def benchmarks(self) -> list[str]:
        """The benchmarks that anything has results on, in order."""
        known = [*self.base, *(name for cell in self.cells for name in cell.metrics)]
        return list(dict.fromkeys(known))

    @property
    def share(self) -> float:
        """How much of the cells' work is done."""
        return sum(cell.share for cell in self.cells) / max(1, len(self.cells))

    @property
    def seconds_left(self) -> float | None:
        """How long the cells will take: those left, at the mean time of those that ended, as many at a time as now."""
        running = [cell for cell in self.cells if cell.status == RUNNING]
        took = [c.log.last - c.log.begun for c in self.cells if c.log.has_ended and not c.error and c.log.begun]
        for cell in running:  # until one has ended
            if not took and cell.log.begun and (left := cell.log.seconds_left) is not None:
                took.append(cell.log.last - cell.log.begun + left)
        if not running or not took:
            return None
        own = [left for cell in running if (left := cell.log.seconds_left) is not None]
        work = sum(1 - cell.share for cell in self.cells)
        return max([sum(took) / len(took) * work / len(running), *own])


def holder_of(lock: Path | None) -> tuple[str, bool | None]:
    """The process that wrote a run's lock, in words, and whether it is alive; None: it is on another machine.

    The lock itself is not tried, which would hold it for a moment.
    """
    try:
        told = lock.read_text(encoding="utf-8", errors="replace").strip() if lock is not None else ""
    except OSError:
        told = ""
    found = re.match(r"process (\d+) on (.+?), since ", told)
    if found is None or lock is None:
        return told, False
    if found[2] != socket.gethostname():
        return told, None
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return told, False
    except (PermissionError, OverflowError):
        pass
    return told, _holds(int(found[1]), lock)


def _holds(process: int, lock: Path) -> bool:
    """Whether a process that is alive may hold a lock: another may have got the number of one that was killed."""
    try:
        table, inode = Path("/proc/locks").read_text(encoding="ascii"), lock.stat().st_ino
    except (OSError, ValueError):
        return True
    return f":{inode} " in table or not table.strip()


def duration(seconds: float) -> str:
    """A duration in the form that progress has everywhere."""
    return str(timedelta(seconds=round(seconds)))


def cell_of(result: Mapping[str, Any], name: str) -> CellView:
    """A cell as a result records it: that of results.json, of a study, or a cached one."""
    facts = {key: result[key] for key in ("costs", "events", "ended", "resolved") if result.get(key)}
    steps = columns_of(result.get("training") or (), [p for p in result.get("curve") or () if "step" in p])
    metrics = result.get("metrics") or {}
    return CellView(
        name, str(result["algorithm"]), int(result["seed"]), result.get("learning_rate"), DONE if metrics else TRAINED,
        steps=steps, planned=result.get("planned_steps") or len(steps) or None, metrics=metrics,
        validation=result.get("validation"), facts=facts,
    )  # fmt: skip


def logs_of(folder: WatchedFolder) -> dict[str, TaskLog]:
    """The journals of an unfinished run, by task."""
    found: dict[str, TaskLog] = {}
    for name in folder.names(STATE, JOURNAL):
        if name.endswith(".jsonl"):
            log = folder.lines(TaskLog, TaskLog.add, STATE, JOURNAL, name)
            if log is not None:
                found[unquote(name.removesuffix(".jsonl"))] = log
    return found


def with_log(cell: CellView, log: TaskLog | None, is_running: bool) -> CellView:
    """A cell without a result, as its journal has it."""
    if log is None:
        return cell
    cell.log, cell.steps = log, log.steps
    if log.has_ended and log.error is not None:
        cell.status, cell.error = FAILED, log.error
    elif log.begun is not None:
        cell.status = RUNNING if is_running else STOPPED
    return cell


def counts_of(cells: Iterable[CellView]) -> dict[str, int]:
    """The number of cells in each state that any is in."""
    every = [cell.status for cell in cells]
    return {status: every.count(status) for status in STATUSES if status in every}
