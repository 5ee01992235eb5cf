"""Training a cell: its stages, one after another, each from the weights of the one before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from rlzoo.buffers import Buffer, OfflineBuffer
from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.problems import load_problems
from rlzoo.comparison.curves import brief, costs_at, is_flat, logged_at
from rlzoo.comparison.plan import Cell, FirstStages, is_reported
from rlzoo.comparison.resolve import learns_from_samples, objective_of, reward_of, views_of
from rlzoo.comparison.shared_buffer import costs_before, with_stored_inputs
from rlzoo.comparison.warm_up import save_whole
from rlzoo.config import Experiment, Training
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.jobs.journal import Journal
from rlzoo.jobs.memory import release_memory
from rlzoo.jobs.outputs import remove
from rlzoo.jobs.progress import Report
from rlzoo.jobs.ranks import agreed, is_main
from rlzoo.policy import Policy
from rlzoo.policy.defaults import resolved
from rlzoo.policy.loading import load_for
from rlzoo.rollout import Collector, engine_of, sampler_of
from rlzoo.training import Costs, Trainer, TrainingRecord
from rlzoo.training.batches import BufferSource, FreshSource, Source, in_steps, seeds, shares
from rlzoo.training.trackers import LOGS
from rlzoo.types import selector_of

Evaluated = Callable[[Policy, int, int, Costs, bool], dict[str, Any]]
"""A point of the learning curve, given the policy, the number of steps so far and of those planned up to the end of the
stage, the costs so far, and whether the cell ends here."""


def logs_of(state: Path, name: str) -> Path:
    """The folder of trackers for one training of a comparison, which keeps its cached results under ``state``."""
    return state.parent / LOGS / name


@dataclass(frozen=True)
class Given:
    """What the stages of cells are trained with, besides their own settings."""

    shared: Mapping[str, Any]
    """Facts about the shared buffer."""
    buffer: OfflineBuffer
    state: Path
    """The folder for cached results and weights; trackers write to logs/ next to it."""
    evaluated: Evaluated
    report: Report

    def logs(self, name: str) -> Path:
        """The folder of trackers for one training."""
        return logs_of(self.state, name)


@dataclass(frozen=True)
class StageOfCell:
    """A stage of a cell: the row of the experiment that it trains, and what came before it."""

    experiment: Experiment
    cell: Cell
    number: int
    """Counted from 1."""
    model: str
    """The weights to start from: the base model, or the result of the stage before."""
    steps: int = 0
    """The optimizer steps of the stages before."""
    costs: Costs = field(default_factory=Costs)
    """The costs of the stages before, without those that this stage counts again."""

    @property
    def names(self) -> tuple[str, ...]:
        """The rows of all stages."""
        return self.experiment.stages_of(self.cell.algorithm)

    @property
    def name(self) -> str:
        """The row of this stage."""
        return self.names[self.number - 1]

    @property
    def settings(self) -> Training:
        """The row's training settings, at the cell's learning rate in the last stage."""
        is_last = self.number == len(self.names)
        rate = self.cell.learning_rate if is_last else self.experiment.learning_rates_of(self.name)[0]
        return self.experiment.training_of(self.name).model_copy(update={"learning_rate": rate})

    @property
    def first(self) -> FirstStages | None:
        """The training that this stage has in common with other cells; None if no stage continues from it."""
        if self.number < len(self.names) or is_reported(self.experiment, self.cell):
            return FirstStages(self.names[: self.number], self.cell.seed)
        return None

    def is_offline(self, number: int | None = None) -> bool:
        """Whether this stage, or that of another number, reads the shared buffer."""
        return self.experiment.algorithms[self.names[(number or self.number) - 1]].mode == "offline"

    def reads_samples(self, number: int | None = None) -> bool:
        """Whether this stage, or that of another number, learns from the samples of the shared buffer."""
        name = self.names[(number or self.number) - 1]
        return self.is_offline(number) and learns_from_samples(views_of(self.experiment, name))

    def next(self, model: str, made: Mapping[str, Any], shared: Mapping[str, Any]) -> StageOfCell:
        """The stage after this one, given what this one ``made``.

        The samples of the shared buffer count towards the budget of each stage that learns from them, as in a row of
        its own, and once in the costs of the cell.
        """
        costs = summed(self.costs, made["costs"])
        after = replace(
            self, number=self.number + 1, model=model, steps=self.steps + len(made["training"]), costs=costs
        )
        if after.reads_samples() and any(map(after.reads_samples, range(1, after.number))):
            costs.add({"sampled_tokens": -shared["sampled_tokens"], "flops": -shared["sampling_flops"]})
        return after


def train_cell(experiment: Experiment, cell: Cell, given: Given, checkpoints: Path) -> tuple[Policy, dict[str, Any]]:
    """Train all stages of a cell; returns its policy, and plain data: costs, learning curve, metrics per step, events.

    Costs are summed over stages; ``planned_steps`` is the largest number of steps, ``start`` what is charged before the
    first one, ``ended`` says why the last stage ended, and ``resolved`` are its ``auto`` settings. Stages that other
    cells continue from come from `train_first`.
    """
    stage, made = StageOfCell(experiment, cell, 1, experiment.model), list[dict[str, Any]]()
    while (first := stage.first) is not None:
        made.append(_once(first, stage, given))
        model = str(weights_of(first, given.state))
        if stage.number == len(stage.names):
            policy = load_for(model, stage.settings)
            break
        stage = stage.next(model, made[-1], given.shared)
        release_memory()
    else:
        policy, last = _train(stage, given, checkpoints, given.logs(cell.id))
        made.append(last)
    rows: dict[str, list[Any]] = {"curve": [], "training": [], "events": []}
    for number, (name, one) in enumerate(zip(stage.names, made, strict=True), 1):
        several = {"stage": number} if len(made) > 1 else {}
        rows["curve"] += [point | several for point in one["curve"]]
        rows["training"] += [step | several for step in one["training"]]
        rows["events"] += [f"stage {number} ({name}): {event}" if several else event for event in one["events"]]
    return policy, {
        "costs": summed(stage.costs, made[-1]["costs"]).as_dict(),
        "start": made[0]["start"],
        **{key: made[-1][key] for key in ("ended", "planned_steps", "resolved")},
        **rows,
    }


def train_first(experiment: Experiment, first: FirstStages, given: Given) -> dict[str, Any]:
    """Train stages that several cells continue from; returns plain data of the last.

    The weights of each are kept for `train_cell`. What is there already is not computed again, and an interrupted stage
    resumes from its checkpoint.
    """
    names, number = first.names, len(first.names)
    row = next(name for name, one in experiment.algorithms.items() if names == one.stages[:number] != one.stages)
    stage = StageOfCell(experiment, Cell(row, first.seed, 0.0), 1, experiment.model)
    while True:
        own = FirstStages(names[: stage.number], first.seed)
        made = _once(own, stage, given)
        if stage.number == number:
            return made
        stage = stage.next(str(weights_of(own, given.state)), made, given.shared)
        release_memory()


def weights_of(first: FirstStages, state: Path) -> Path:
    """The folder of the weights that these stages end with."""
    return CachedResults(state / "stages").within(first.id).folder / "model"


def _once(first: FirstStages, stage: StageOfCell, given: Given) -> dict[str, Any]:
    """The data of a stage that several cells continue from, trained unless its result and its weights are there."""
    cached, weights = CachedResults(given.state / "stages"), weights_of(first, given.state)
    checkpoints = weights.with_name("checkpoints")

    def run() -> dict[str, Any]:
        policy, found = _train(stage, given, checkpoints, given.logs(first.id))
        save_whole(policy, weights)
        return found

    if agreed(weights.exists()):
        found: dict[str, Any] = cached.once(first.id, run)
    else:  # even if there is a cached result
        made = run()
        written: Any = cached.write(first.id, made) if is_main() else None
        found = agreed(written)
    if is_main():
        remove(checkpoints)
    return found


def summed(costs: Costs, more: Mapping[str, Any]) -> Costs:
    """The costs with others added; of the peaks of memory, the higher."""
    peak = max(costs.peak_memory_bytes, more["peak_memory_bytes"])
    found = replace(costs)
    found.add(more)
    return replace(found, peak_memory_bytes=peak)


def _train(stage: StageOfCell, given: Given, checkpoints: Path, logs: Path) -> tuple[Policy, dict[str, Any]]:
    """Train a stage; returns the policy and plain data, with steps counted over all stages of the cell."""
    shared, buffer = given.shared, given.buffer
    experiment, settings, name = stage.experiment, stage.settings, stage.name
    torch.manual_seed(stage.cell.seed)
    policy = load_for(stage.model, settings)
    objective, views = objective_of(experiment, name), views_of(experiment, name)
    before, rows = costs_before(experiment, name, shared), cast(Buffer, buffer)
    fresh = [selector_of(which).is_sampled and not stage.is_offline() for which, _ in views]
    if stage.number > 1 and not all(fresh):  # the stored inputs of the shared buffer are the base model's
        budget = settings.token_budget
        rows, flops_of = with_stored_inputs(buffer, [objective], policy, budget, lambda share, what: None)
        if not stage.is_offline():  # an offline row is charged for them already
            before.flops += sum(flops_of.values())
    record, start = TrainingRecord(costs=before), costs_at(before)
    sources: list[Source] = []
    split = zip(views, shares(settings.batch_size, len(views)), seeds(views, stage.cell.seed), strict=True)
    for is_fresh, ((selection, options), size, own) in zip(fresh, split, strict=True):
        if is_fresh:
            collect = collector_of(experiment, policy, settings, size, own)
            sources.append(FreshSource(collect, selection, **options))
        else:
            sources.append(BufferSource(rows, rows.view(selection, **options), size, own))
    settings = in_steps(settings, sources)
    most = stage.steps + settings.steps
    points, patience = experiment.evaluation.curve_points, experiment.evaluation.until_flat
    label = f"stage {stage.number} ({name}) " if len(stage.names) > 1 else ""

    journal = Journal(given.state, logs.name)

    def along(trainer: Trainer, step: int) -> None:
        given.report(trainer.progress.fraction, f"{label}{trainer.progress}")
        journal.step(trainer.record.steps[-1], stage.steps)
        if not (points and trainer.progress.completes_part(points)):
            return
        curve = trainer.record.kept.setdefault("curve", [])
        costs = summed(stage.costs, record.costs.as_dict())
        is_last = record.ended is not None and stage.first is None
        curve.append(given.evaluated(policy, stage.steps + step, most, costs, is_last))
        trainer.log(logged_at(curve[-1]))
        journal.write(point=brief(curve[-1]))
        if patience is None or record.ended is not None:
            return
        if agreed(is_flat([point["validation"]["by_problem"] for point in curve], patience)):
            trainer.stop("flat")

    Trainer(policy, objective, sources, settings, [along], folder=logs, record=record, checkpoints=checkpoints).run()
    steps = enumerate(record.plain_steps(), stage.steps + 1)
    return policy, {
        "costs": record.costs.as_dict(),
        "start": start,
        "ended": record.ended,
        "planned_steps": most,
        "curve": record.kept.get("curve", []),
        "training": [{**row, "step": number} for number, row in steps],
        "events": record.events,
        "resolved": resolved(policy, settings, engine_of(experiment.evaluation, policy)),
    }


def collector_of(experiment: Experiment, policy: Policy, training: Training, batch_size: int, seed: int) -> Collector:
    """The collector of fresh samples of the training problems, for a cell that trains online."""
    bad = BadRows(experiment.train.bad_rows)
    problems, settings = load_problems(experiment.train, bad), experiment.rollouts
    sampler = sampler_of(policy, settings)
    return Collector(policy, sampler, problems, reward_of(experiment), settings, training, seed, batch_size, bad)
