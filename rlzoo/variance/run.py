"""``rlzoo variance``: an experiment's buffer, the analysis of its objectives at the base, and during training."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rlzoo.buffers import Buffer, OfflineBuffer, read_buffer, require_table
from rlzoo.buffers.bad_rows import BadRows, dropped_line
from rlzoo.buffers.card import buffer_card
from rlzoo.comparison import resolve, shared_buffer
from rlzoo.comparison.resolve import check
from rlzoo.comparison.warm_up import after_warm_up, alone, facts_of, warm_up
from rlzoo.config import WARM_UP, Benchmark, Experiment, VarianceSettings
from rlzoo.errors import UserError
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.jobs.heartbeat import Heartbeat, say
from rlzoo.jobs.outputs import remove, write_atomically
from rlzoo.jobs.pool import Workers, default_workers, pool, why
from rlzoo.jobs.progress import Report
from rlzoo.jobs.ranks import world_size
from rlzoo.jobs.runs import Run, place, run_in, versions
from rlzoo.jobs.sharing import CARD
from rlzoo.policy.defaults import resolved
from rlzoo.policy.loading import load_for
from rlzoo.training import (
    Trainer,
    TrainingRecord,
    behaviour_event,
    check_buffer,
    lacking,
    with_behaviour,
    with_inputs,
)
from rlzoo.training.batches import buffer_sources, in_steps
from rlzoo.variance.analyzer import analyze_variance
from rlzoo.variance.card import analysis_card
from rlzoo.variance.classes import classifier
from rlzoo.variance.probe import VarianceProbe
from rlzoo.variance.report import write_report


def run_variance(
    experiment: Experiment,
    out: Path | None = None,
    settings: VarianceSettings | None = None,
    buffer: str | None = None,
    workers: int | None = None,
    threads: int = 1,
    console: Console | None = None,
) -> dict[str, Any]:
    """Analyse the objectives of an experiment, and write variance.json and a report to ``out``.

    ``buffer`` is a saved buffer, or a table in one of TRL's formats, in place of the experiment's demonstrations and
    samples. Returns the content of variance.json. Raises UserError for wrong input, without leaving ``out`` behind, and
    under a launcher of several processes.
    """
    if world_size() > 1:
        raise UserError(
            "an analysis has worker processes of its own, with a whole model in each: start it without accelerate or "
            "torchrun, with --workers 1 if memory is short, and --set training.device=cpu if no GPU holds the model"
        )
    started = time.perf_counter()
    settings, console = settings or VarianceSettings(), console or Console(stderr=True)
    whole, experiment = experiment, _cut(experiment, settings.rows)
    check(experiment)
    classifier(settings.token_classes)
    if buffer is not None:
        require_table(buffer)
    out = out or where(whole, settings, buffer, threads)
    asked = _asked(whole, settings, buffer, threads)
    with run_in(out, "variance", asked) as run:
        if run.finished:
            say(console, f"{experiment.name}: already finished, in {out}", style="bold")
            earlier: dict[str, Any] = json.loads((out / "variance.json").read_text(encoding="utf-8"))
            return earlier
        number = min(workers or default_workers(), 1 + len(experiment.algorithms))
        with pool(number, threads, console) as processes, Heartbeat(console, "starting") as heartbeat:
            heartbeat.doing = processes.doing
            found = _run(processes, experiment, run, settings, buffer, console)
        found["skipped"] |= {
            name: f"it has stages, whose objectives are measured in their own rows ({', '.join(row.stages)})"
            for name, row in whole.algorithms.items()
            if row.stages
        }
        found = {
            "experiment": experiment.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "model": experiment.model,
            "settings": settings.model_dump(),
            "wall_seconds": time.perf_counter() - started,
            **found,
        }
        write_atomically(out / "variance.json", json.dumps(found, indent=1, allow_nan=False))
        write_report(out)
        write_atomically(out / CARD, analysis_card(whole, found, buffer, asked))
        run.to_be_continued = bool(found["failed"])
    return found


def where(
    experiment: Experiment, settings: VarianceSettings | None = None, buffer: str | None = None, threads: int = 1
) -> Path:
    """The default folder: one in which the same analysis was interrupted, else runs/<name>-variance-<time>."""
    asked = _asked(experiment, settings or VarianceSettings(), buffer, threads)
    return place(f"{experiment.name}-variance", "variance", asked)


def _asked(experiment: Experiment, settings: VarianceSettings, buffer: str | None, threads: int) -> dict[str, Any]:
    """What must be the same for an analysis to resume."""
    return {
        "experiment": experiment.model_dump(mode="json"),
        "variance": settings.model_dump(),
        "buffer": buffer,
        "threads": threads,
    }


def _cut(experiment: Experiment, rows: int) -> Experiment:
    """The experiment with no more problems than an analysis of so many rows needs, and none to evaluate on.

    A warm-up keeps all of its own. Rows with stages are left out: the objectives of their stages are rows themselves.
    """
    warm = experiment.warm_up and experiment.warm_up.model_copy(
        update={"train": experiment.warm_up.train or experiment.train}
    )
    problems, prompts = 4 * rows, rows
    train = experiment.train.model_copy(update={"limit": min(experiment.train.limit or problems, problems)})
    rollouts = experiment.rollouts.model_copy(update={"prompts": min(experiment.rollouts.prompts or prompts, prompts)})
    unused = {"benchmarks": {"train": Benchmark(**train.model_dump())}, "retention": {}, "validation": None}
    kept = {"train": train, "rollouts": rollouts, "warm_up": warm, "algorithms": experiment.single_rows}
    return experiment.model_copy(update={**kept, **unused})


def _run(
    processes: Workers,
    asked: Experiment,
    run: Run,
    settings: VarianceSettings,
    given: str | None,
    console: Console,
) -> dict[str, Any]:
    experiment = asked
    folder, state = (run.folder / "buffer").absolute(), run.state.absolute()
    goes = "resuming in" if run.resumed else "writing to"
    warm = None
    if experiment.warm_up is not None:
        say(console, f"{experiment.name}: warm-up of the base model; {goes} {run.folder}")
        warm = alone(processes, "warm-up", warm_up, experiment, state, run.folder.absolute() / "logs" / WARM_UP)
        experiment = after_warm_up(experiment, state)
    first = processes.submit("buffer", fill, experiment, folder, state, given)
    for _, done in processes.gather({first: "buffer"}):
        if (error := done.exception()) is not None:
            raise UserError(why(error)) from None
        filled = done.result()
    _write_card(asked, folder, given, filled)
    tell = f"{experiment.name}: {filled['rows']} rows, {len(experiment.algorithms)} objectives; {goes} {run.folder}"
    say(console, tell, style="bold")
    for name, summary in filled["dropped_rows"].items():
        say(console, f"  {name}: {dropped_line(summary)}", style="yellow")
    for event in filled["events"]:
        say(console, f"  buffer: {event}", style="yellow")
    analysis = processes.submit("analysis", measure, experiment, folder, state, settings)
    jobs = {analysis: "analysis"}
    offline = [name for name, row in experiment.algorithms.items() if row.mode == "offline"]
    if settings.every:
        jobs |= {processes.submit(n, along_training, experiment, n, folder, state, settings): n for n in offline}
    results: dict[str, Any] = {}
    errors: dict[str, BaseException] = {}
    for name, done in processes.gather(jobs):
        error = done.exception()
        if error is not None and done is not analysis:
            errors[name] = error
        elif done is not analysis:  # an experiment may have a row of that name
            results[name] = done.result()
        say(console, f"  {name}: {'done' if error is None else why(error)}")
    if (failure := analysis.exception()) is not None:
        raise UserError(why(failure)) from None
    found = analysis.result()
    return {
        **found,
        "warm_up": facts_of(warm),
        "dropped_rows": filled["dropped_rows"],
        "events": filled["events"],
        "resolved": filled["resolved"],
        "training": {name: results[name] for name in offline if name in results},
        "failed": {name: why(error) for name, error in errors.items() if name not in found["skipped"]},
    }


def _write_card(experiment: Experiment, folder: Path, given: str | None, filled: Mapping[str, Any]) -> None:
    """Write the card of the buffer that was ``filled``; ``experiment`` is as the user gave it, with its warm-up."""
    lead = f"The rows that the analysis {experiment.name} measures gradients on, made by rlzoo."
    if given is None:
        shared_buffer.write_card(experiment, folder, 0, filled, lead)
        return
    config = experiment.model_dump(mode="json")
    asked = {"buffer": given, **{name: config[name] for name in ("model", "training", "algorithms")}}
    origin = {"rows": given, "model of log-probs that were missing": experiment.model}
    name = f"{experiment.name}, {folder.name}"
    write_atomically(folder / CARD, buffer_card(OfflineBuffer.load(folder), name, lead, origin, asked, [given]))


def fill(experiment: Experiment, folder: Path, state: Path, given: str | None, report: Report) -> dict[str, Any]:
    """Make or read the buffer and save it for all jobs; returns its number of rows, what was dropped, and events.

    Also what it cost, unless it was ``given``.
    """
    if given is None:
        return shared_buffer.fill_buffer(experiment, folder, state, 0, report)
    policy = load_for(experiment.model, experiment.training)
    bad = BadRows(experiment.train.bad_rows)
    longest, special = experiment.training.max_completion_tokens, experiment.training.special_tokens
    fits, whole = policy.row_check(), experiment.training.max_length
    buffer: Buffer = read_buffer(
        given, policy.tokenizer, longest, bad=bad, special_tokens=special, fits=fits, max_length=whole,
        turns=experiment.training.turns,
    )  # fmt: skip
    check_buffer(policy, buffer)
    events = bad.events()
    if experiment.training.behaviour == "current":
        buffer, scored = with_behaviour(buffer, policy, experiment.training.token_budget)
        events += [behaviour_event(len(scored))] if scored else []
    objectives = [resolve.objective_of(experiment, name) for name in experiment.algorithms]
    buffer = with_inputs(buffer, lacking(buffer, *objectives), policy, experiment.training.token_budget)
    buffer.save(folder)
    dropped = {"buffer": summary} if (summary := bad.summary()) else {}
    how = resolved(policy, experiment.training)
    return {"rows": len(buffer), "dropped_rows": dropped, "events": events, "resolved": how}


def measure(
    experiment: Experiment, folder: Path, state: Path, settings: VarianceSettings, report: Report
) -> dict[str, Any]:
    """The analysis at the experiment's model."""

    def analyse() -> dict[str, Any]:
        return analyze_variance(
            load_for(experiment.model, experiment.training),
            {name: resolve.objective_of(experiment, name) for name in experiment.algorithms},
            OfflineBuffer.load(folder),
            rows=settings.rows,
            draws=settings.draws,
            seed=settings.seed,
            token_classes=settings.token_classes,
            class_gradients=settings.class_gradients,
            learns_from={name: resolve.views_of(experiment, name)[0][0] for name in experiment.algorithms},
            token_budget=experiment.training.token_budget,
            progress=report,
        )

    return dict(CachedResults(state).once("analysis", analyse))


def along_training(
    experiment: Experiment, name: str, folder: Path, state: Path, settings: VarianceSettings, report: Report
) -> list[dict[str, Any]]:
    """Measurements of one objective in the course of its training on the fixed buffer."""
    cached = CachedResults(state / "training")
    checkpoints = cached.within(name).folder

    def train() -> list[dict[str, Any]]:
        objective, buffer = resolve.objective_of(experiment, name), OfflineBuffer.load(folder)
        views = resolve.views_of(experiment, name)
        training = experiment.training_of(name)
        rate = experiment.learning_rates_of(name)[0]
        training = training.model_copy(update={"learning_rate": rate, "trackers": ()})  # what counts here is the probe
        torch.manual_seed(settings.seed)
        policy = load_for(experiment.model, training)
        budget = training.token_budget
        probe = VarianceProbe(buffer, settings.every, settings.probe_rows, settings.seed, budget, views[0][0])

        sources = buffer_sources(buffer, views, training.batch_size, settings.seed)
        training = in_steps(training, sources)

        def tell(trainer: Trainer, step: int) -> None:
            report(trainer.progress.fraction, str(trainer.progress))

        record = TrainingRecord(kept={"variance": probe.records})
        trainer = Trainer(policy, objective, sources, training, [tell, probe], record=record, checkpoints=checkpoints)
        if trainer.step == 0:
            probe.measure(policy, objective, 0)
        trainer.run()
        return probe.records

    found = list(cached.once(name, train))
    remove(checkpoints)
    return found
