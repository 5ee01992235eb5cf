"""Reading a run's folder: one that `rlzoo compare`, `train` or another command writes, a study, or a saved buffer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rlzoo.comparison.dashboard.curves import columns_of
from rlzoo.comparison.dashboard.files import WatchedFolder
from rlzoo.comparison.dashboard.outcomes import OutcomeStore
from rlzoo.comparison.dashboard.state import (
    DONE,
    FAILED,
    RUNNING,
    STOPPED,
    TRAINED,
    CellView,
    RunView,
    TaskLog,
    cell_of,
    holder_of,
    logs_of,
    with_log,
)
from rlzoo.comparison.plan import Cell, cells
from rlzoo.config import Experiment
from rlzoo.errors import UserError
from rlzoo.jobs.places import ENDED, JOURNAL, LOCK, RECORD, STATE, result_of

RESULTS, OUTCOMES, CELLS, TRAINING, REPORT = (
    "results.json",
    "outcomes.parquet",
    "cells",
    "training.json",
    "report.html",
)
BUFFER = re.compile(r"buffer(-seed-?\d+)?")
"""The names of a comparison's buffers."""


@dataclass
class CachedCell:
    """What is kept of a cached result: no outcomes, which may be long."""

    result: Mapping[str, Any]
    view: CellView | None


class WatchedRun:
    """A run, of which `look` gives the newest view."""

    def __init__(self, root: Path) -> None:
        """Raises UserError for a folder that is none of a run and no buffer."""
        if not root.is_dir():
            raise UserError(f"{str(root)!r} is not a folder: name one that rlzoo compare, train or rollout wrote")
        self.folder = WatchedFolder(root)
        self.name = root.resolve().name
        self.outcomes = OutcomeStore(self.folder)
        if not self.is_buffer and self._record() is None and not self._has_results():
            raise UserError(
                f"{str(root)!r} holds no run: name a folder that rlzoo compare, train or rollout writes, or a study"
            )

    @property
    def is_buffer(self) -> bool:
        """Whether the folder is a saved buffer."""
        return self.folder.path("dataset_info.json") is not None and self.folder.path("state.json") is not None

    @property
    def buffers(self) -> list[tuple[str, ...]]:
        """Where the buffers of the run are, as parts of a path from its folder."""
        if self.is_buffer:
            return [()]
        found = [name for name in self.folder.names() if BUFFER.fullmatch(name)]
        return [(name,) for name in found if self.folder.path(name, "dataset_info.json") is not None]

    @property
    def has_report(self) -> bool:
        return self.folder.path(REPORT) is not None

    @property
    def has_experiment(self) -> bool:
        """Whether the folder has the experiment as a file, which can be run again."""
        return self.folder.path("experiment.yaml") is not None

    def report(self) -> bytes | None:
        """The report of a finished run."""
        file = self.folder.path(REPORT)
        try:
            return None if file is None else file.read_bytes()
        except OSError:
            return None

    def look(self) -> RunView:
        """The run as its files have it now."""
        if self.is_buffer:
            return RunView(self.name, "rollout", "finished")
        record = self._record() or {}
        settings = record.get("settings") or {}
        name = (settings.get("experiment") or {}).get("name") or self.name
        view = RunView(
            str(name), str(record.get("command", "")), "finished", settings=settings,
            versions=record.get("versions") or {},
        )  # fmt: skip
        lock = self.folder.path(STATE, LOCK)
        process, is_alive = holder_of(lock)
        is_unfinished = self.folder.path(RECORD) is None and self.folder.path(STATE, RECORD) is not None
        if is_unfinished and (is_alive is not False or not self._has_results()):
            self._look_at_state(view, process, is_alive)
        elif self.folder.path(TRAINING) is not None:
            self._look_at_training(view)
        elif self._has_results():
            self._look_at_results(view)
        self.outcomes.use_table(OUTCOMES if self.folder.path(OUTCOMES) is not None and not view.is_running else None)
        return view

    def _record(self) -> Mapping[str, Any] | None:
        return self.folder.json(RECORD) or self.folder.json(STATE, RECORD)

    def _has_results(self) -> bool:
        return self.folder.path(RESULTS) is not None

    def _look_at_state(self, view: RunView, process: str, is_alive: bool | None) -> None:
        """A run that is running or was stopped."""
        ended = self.folder.json(STATE, JOURNAL, ENDED)
        is_running = is_alive is not False and ended is None
        view.tasks = logs = logs_of(self.folder)
        if is_running:
            view.state, view.told = RUNNING, process
        elif ended is None:
            view.state, view.told = "killed", "its process is gone; the same command resumes it"
        elif ended.get("error") is None:
            view.state, view.told = "interrupted", "the same command resumes it"
        else:
            view.state, view.told = FAILED, str(ended["error"])
        if view.command == "train":
            view.cells = [_training(view, logs.get("train"), is_running)]
            return
        base = self.folder.read(partial(self._cached, name="base"), STATE, "base.result")
        if base is not None:
            view.base = base.result.get("metrics") or {}
            view.events = base.result.get("events") or []
        view.cells = self._cells(view.settings, logs, is_running)
        ids = {cell.id for cell in view.cells}
        view.tasks = {name: log for name, log in logs.items() if name not in ids}

    def _cells(self, settings: Mapping[str, Any], logs: Mapping[str, TaskLog], is_running: bool) -> list[CellView]:
        """All cells of an unfinished comparison."""
        cached, chosen = (set(self.folder.names(STATE, kind)) for kind in (CELLS, "chosen"))
        found = []
        for cell, planned in _grid(settings):
            file = f"{quote(cell.id, safe='')}.result"
            view = None
            if file in cached:
                read = self.folder.read(partial(self._cached, name=cell.id), STATE, CELLS, file)
                view = None if read is None else read.view
            if view is None:
                view = CellView(cell.id, cell.algorithm, cell.seed, cell.learning_rate, planned=planned)
                if cell.id in cached and cell.id not in logs:  # a folder of checkpoints, of a run without journals
                    view.status = RUNNING if is_running else STOPPED
                found.append(with_log(view, logs.get(cell.id), is_running))
                continue
            view.log = logs.get(cell.id, view.log)
            if file in chosen:
                late = self.folder.read(partial(self._cached, name=f"{cell.id}, chosen"), STATE, "chosen", file)
                view.metrics = {} if late is None else late.result.get("metrics") or {}
            view.status = DONE if view.metrics else FAILED if view.log.error else TRAINED
            view.error = view.log.error
            if not view.metrics and view.log.begun is not None and not view.log.has_ended and is_running:
                view.status = RUNNING
            found.append(view)
        return found

    def _cached(self, content: bytes, name: str) -> CachedCell | None:
        """A cached result, whose outcomes are kept elsewhere."""
        result = result_of(content)
        if not isinstance(result, dict):
            return None
        outcomes = result.pop("outcomes", None)
        if outcomes:
            self.outcomes.add(name, outcomes)
        return CachedCell(
            {key: result[key] for key in ("metrics", "events") if key in result},
            cell_of(result, name) if "algorithm" in result else None,
        )

    def _look_at_training(self, view: RunView) -> None:
        """A finished `rlzoo train`."""
        found = self.folder.json(TRAINING) or {}
        cell = _training(view, None, is_running=False)
        cell.status, cell.steps = DONE, columns_of(found.get("steps") or ())
        cell.facts = {key: found[key] for key in ("costs", "events", "ended", "resolved") if found.get(key)}
        view.cells = [cell]

    def _look_at_results(self, view: RunView) -> None:
        """A finished comparison, or a study."""
        found = self.folder.json(RESULTS) or {}
        view.name = str(found.get("experiment") or view.name)
        view.command = view.command or "compare"
        view.settings = view.settings or {"experiment": found.get("config") or {}}
        view.versions = view.versions or found.get("versions") or {}
        view.base, view.events = found.get("base") or {}, found.get("events") or []
        view.summary = {
            (row["algorithm"], row["benchmark"], row["metric"]): row
            for row in [*(found.get("summary") or ()), *(found.get("base_summary") or ())]
        }
        made: dict[str, CellView] = {}
        for one in found.get("cells") or ():
            if isinstance(one, str):  # a study has a file per cell
                one = self.folder.json(CELLS, f"{one}.json") or {}
            if "algorithm" in one:
                name = _id(one)
                made[name] = cell_of(one, name)
        for algorithm, rates in (found.get("tuning") or {}).items():
            for rate, some in rates.items():
                for one in some:
                    own = {"algorithm": algorithm, "seed": one["seed"], "learning_rate": float(rate)}
                    name = _id(own)
                    made.setdefault(name, cell_of({**own, **one}, name)).validation = one.get("validation")
        for one in found.get("failed") or ():
            name = _id(one)
            made[name] = CellView(
                name, one["algorithm"], one["seed"], one.get("learning_rate"), FAILED, error=str(one.get("error"))
            )
        view.cells = list(made.values())
        if found.get("failed"):
            view.told = "some cells failed; the same command retries them"


def _id(one: Mapping[str, Any]) -> str:
    rate = one.get("learning_rate")
    return Cell(str(one["algorithm"]), int(one["seed"]), float("nan") if rate is None else float(rate)).id


def _training(view: RunView, log: TaskLog | None, is_running: bool) -> CellView:
    """The training of `rlzoo train`, as a cell."""
    settings = view.settings
    training = settings.get("training") or {}
    cell = CellView(
        "train", str(settings.get("objective", "")), int(settings.get("seed") or 0), training.get("learning_rate"),
        planned=training.get("steps"),
    )  # fmt: skip
    return with_log(cell, log, is_running)


def _grid(settings: Mapping[str, Any]) -> Sequence[tuple[Cell, int | None]]:
    """The cells of an experiment, with the number of steps of each; none of one that this version cannot read."""
    try:
        experiment = Experiment.model_validate(settings["experiment"])
        planned = {
            name: sum(experiment.training_of(stage).steps for stage in experiment.stages_of(name))
            for name in experiment.algorithms
        }
        return [(cell, planned[cell.algorithm]) for cell in cells(experiment)]
    except (ValueError, KeyError, TypeError):
        return []
