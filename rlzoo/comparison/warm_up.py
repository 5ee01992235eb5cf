"""The warm-up of an experiment: its base model is trained once, and everything else starts from the result."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.problems import load_problems
from rlzoo.comparison.resolve import objective_of
from rlzoo.comparison.shared_buffer import demonstrations_of, with_stored_inputs
from rlzoo.config import WARM_UP, Experiment
from rlzoo.errors import UserError
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.jobs.journal import Journal
from rlzoo.jobs.memory import release_memory
from rlzoo.jobs.outputs import remove, replacing
from rlzoo.jobs.pool import Workers, why
from rlzoo.jobs.progress import Report
from rlzoo.jobs.ranks import agreed, barrier, is_main
from rlzoo.policy import Policy
from rlzoo.policy.defaults import resolved
from rlzoo.policy.loading import load_for, save_policy
from rlzoo.training import Trainer, train

TASK = "warm-up"
"""Its name as a task of a run."""


def warm_up(experiment: Experiment, state: Path, logs: Path | None, report: Report) -> dict[str, Any]:
    """Train the warm-up, and keep its weights under ``state`` for `after_warm_up`.

    Trackers write to ``logs``; None turns them off. Returns plain data: objective, number of steps, costs, metrics per
    step, events and dropped rows. A cached result is not computed again, and an interrupted warm-up resumes from its
    checkpoint. Raises UserError without demonstrations.
    """
    cached = CachedResults(state)

    def run() -> dict[str, Any]:
        return _warm_up(experiment, state, logs, cached.within(WARM_UP).folder / "checkpoints", report)

    found = dict(cached.once(WARM_UP, run))
    if is_main():
        remove(cached.within(WARM_UP).folder / "checkpoints")
    return found


def after_warm_up(experiment: Experiment, state: Path) -> Experiment:
    """The experiment without its warm-up, from the weights that `warm_up` has kept under ``state``."""
    return experiment.model_copy(update={"model": str(_weights(state)), "warm_up": None})


@contextmanager
def base_policy(experiment: Experiment, report: Report, state: Path | None = None) -> Iterator[Policy]:
    """The base model, for commands that run it in this process: after the warm-up, if there is one.

    The warm-up is trained first, which is reported, and kept under ``state``; None: in a temporary folder, for this
    context.
    """
    if experiment.warm_up is None:
        yield load_for(experiment.model, experiment.training)
        return
    with _temporary() if state is None else nullcontext(state) as place:
        found = warm_up(experiment, place, None, lambda share, detail: report(share, f"warm-up: {detail}"))
        for event in found["events"] if is_main() else ():
            print(f"warm-up: {event}", file=sys.stderr)
        started = after_warm_up(experiment, place)
        yield load_for(started.model, started.training)


@contextmanager
def _temporary() -> Iterator[Path]:
    """A temporary folder that all processes of a distributed run share."""
    with tempfile.TemporaryDirectory() if is_main() else nullcontext("") as own:
        yield Path(agreed(own))
        barrier()


def alone(processes: Workers, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a task that all others wait for. Raises UserError if it fails."""
    future = processes.submit(name, work, *arguments)
    for _ in processes.gather({future: name}):
        if (error := future.exception()) is not None:
            raise UserError(why(error)) from error
    return future.result()


def facts_of(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """What results.json records about a warm-up: objective, steps, costs, and metrics per step; None without one."""
    return None if found is None else {key: found[key] for key in ("objective", "steps", "costs", "training")}


def save_whole(policy: Policy, folder: Path) -> None:
    """`save_policy`, so that the folder is complete or does not exist. All processes must call this."""
    with replacing(folder) if is_main() else nullcontext(folder) as place:
        save_policy(policy, place)
    barrier()


def _weights(state: Path) -> Path:
    return state.absolute() / WARM_UP / "model"


def _warm_up(
    experiment: Experiment, state: Path, logs: Path | None, checkpoints: Path, report: Report
) -> dict[str, Any]:
    release_memory()
    own = experiment.of_warm_up
    assert own is not None and experiment.warm_up is not None
    settings = own.training_of(WARM_UP)
    if logs is None:
        settings = settings.model_copy(update={"trackers": ()})
    policy, bad = load_for(own.model, settings), BadRows(own.train.bad_rows)
    rows = demonstrations_of(policy, load_problems(own.train, bad), settings, bad)
    objective, buffer = objective_of(own, WARM_UP), OfflineBuffer.from_trajectories(rows)
    filled, flops_of = with_stored_inputs(buffer, [objective], policy, settings.token_budget, report)

    journal = Journal(state, TASK)

    def along(trainer: Trainer, step: int) -> None:
        report(trainer.progress.fraction, str(trainer.progress))
        journal.step(trainer.record.steps[-1])

    record = train(
        policy, objective, filled, settings, experiment.warm_up.seed, [along], folder=logs, checkpoints=checkpoints
    )
    record.costs.flops += sum(flops_of.values())
    save_whole(policy, _weights(state))
    return {
        "objective": experiment.warm_up.objective,
        "steps": len(record.steps),
        "costs": record.costs.as_dict(),
        "training": record.plain_steps(),
        "events": [*bad.events(), *record.events],
        "dropped_rows": bad.summary(),
        "resolved": resolved(policy, settings),
    }
