"""Runs a comparison: shared work once, then cells in parallel, with learning rates chosen on validation."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console

from rlzoo.buffers.bad_rows import dropped_line
from rlzoo.comparison import one_cell, resolve, shared_buffer
from rlzoo.comparison.one_stage import weights_of
from rlzoo.comparison.outcomes import BASE_TEXT, SCHEMA, summarise
from rlzoo.comparison.plan import (
    Cell,
    FirstStages,
    buffer_of,
    cells,
    chosen_cells,
    first_stages,
    has_choice,
    lost_cells,
    sampling_seeds,
    tuning_of,
    workers_at,
)
from rlzoo.comparison.report import write_report
from rlzoo.comparison.report.card import comparison_card
from rlzoo.comparison.report.schema import parse_results
from rlzoo.comparison.resolve import check
from rlzoo.comparison.retention import summarise_retention
from rlzoo.comparison.reuse import origins, reusable, store
from rlzoo.comparison.warm_up import after_warm_up, alone, facts_of, warm_up
from rlzoo.config import BASE, WARM_UP, Experiment, load_experiment
from rlzoo.errors import UserError
from rlzoo.evaluation import mean_over_benchmarks
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.jobs.heartbeat import Heartbeat, say
from rlzoo.jobs.journal import JournaledWorkers
from rlzoo.jobs.on_ray import ray_tasks
from rlzoo.jobs.outputs import remove, replacing, write_atomically
from rlzoo.jobs.pool import (
    OutOfMemoryError,
    WorkerDiedError,
    Workers,
    counted,
    default_workers,
    in_this_process,
    pool,
    why,
)
from rlzoo.jobs.ranks import agreed, is_main, world_size
from rlzoo.jobs.runs import Run, place, run_in, versions
from rlzoo.jobs.sharing import CARD
from rlzoo.rollout.rollouts import unscored

Trained = TypeVar("Trained", Cell, FirstStages)
RETRIES = 2
"""How often a cell that ran out of memory is retried, each time with micro-batches half as large."""
BUFFER_FACTS = ("rows", "samples", "correct", "sampled_tokens", "mismatch")
"""What results.json records about each buffer."""


def compare(
    experiment: Experiment | str,
    out: Path | str | None = None,
    workers: int | None = None,
    threads: int = 1,
    console: Console | None = None,
    executor: Literal["local", "ray"] = "local",
    address: str | None = None,
    reuse: Path | str | None = None,
) -> dict[str, Any]:
    """Run every cell of an experiment, and write results and report to ``out``; returns the content of results.json.

    ``experiment`` may be a name or a path. ``out`` defaults to the newest folder runs/<name>-<time> in which the same
    comparison was interrupted, which is then resumed, else to a new one. ``workers`` defaults to the number of GPUs, or
    of cores if there are none; each has ``threads`` threads. With ``executor="ray"`` cells are tasks of the Ray cluster
    at ``address`` (None: start one here), as many at a time as its CPUs or GPUs allow. Under `accelerate launch` all
    processes call this and share the work of each cell; the main one writes. ``reuse`` is the folder of a finished
    comparison, or the name of a study: cells that it has already are not trained again (`rlzoo.comparison.reuse`).

    A cell that fails is reported while the others continue; the same call retries it. Raises UserError for wrong input,
    without leaving ``out`` behind, and if no cell succeeds.
    """
    if isinstance(experiment, str):
        experiment = load_experiment(experiment)
    console = console or Console(stderr=True, quiet=not is_main())
    started = time.perf_counter()
    with Heartbeat(console, "reading the data"):
        check(experiment)
        known = {} if reuse is None else reusable(experiment, str(reuse))
    workers = workers_at(experiment, workers, executor)
    out = where(experiment, threads) if out is None else Path(out)
    with run_in(out, "compare", _asked(experiment, threads)) as run, Heartbeat(console, "starting") as heartbeat:
        if run.finished:
            say(console, f"{experiment.name}: already finished, in {out}", style="bold")
            found: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
            return found
        if is_main():
            store(known, experiment, run.state)
        number = min(workers or default_workers(), max(2, len(cells(experiment))))
        processes, how = _workers(executor, address, number, threads, console)
        with processes as running:
            heartbeat.doing = running.doing
            results, outcomes = _run(experiment, run, JournaledWorkers(running, run.state), how, console)
        heartbeat.report(1.0, "writing the report")
        results["wall_seconds"] = time.perf_counter() - started
        table = pa.Table.from_pylist(outcomes, schema=SCHEMA)
        rows = summarise(table, experiment.evaluation.pass_k)
        results["summary"] = [row for row in rows if row["algorithm"] != BASE]
        results["base_summary"] = [row for row in rows if row["algorithm"] == BASE]
        if experiment.retention:
            results["retention"]["summary"] = summarise_retention(table, experiment.evaluation.pass_k)
        if not is_main():
            return results
        with replacing(out / "outcomes.parquet") as beside:
            pq.write_table(table, beside, compression="zstd", compression_level=9)
        write_atomically(out / "experiment.yaml", yaml.safe_dump(results["config"], sort_keys=False))
        write_atomically(out / "results.json", json.dumps(results, indent=1))
        write_report(out, experiment.baseline)
        write_atomically(out / CARD, comparison_card(experiment, parse_results(results)))
        run.to_be_continued = bool(results["failed"])
    return results


def where(experiment: Experiment, threads: int = 1) -> Path:
    """The default folder of a comparison: one in which the same comparison was interrupted, else runs/<name>-<time>."""
    return place(experiment.name, "compare", _asked(experiment, threads))


def _asked(experiment: Experiment, threads: int) -> dict[str, Any]:
    """What must be the same for a comparison to resume: everything that its numbers depend on."""
    return {"experiment": experiment.model_dump(mode="json"), "threads": threads}


def _workers(
    executor: str, address: str | None, workers: int, threads: int, console: Console
) -> tuple[AbstractContextManager[Workers], str]:
    """The workers that run the cells, and a description of them."""
    if world_size() > 1:
        return in_this_process(), f"one after the other in {world_size()} processes"
    if executor == "ray":
        return ray_tasks(address, threads), f"on the Ray cluster {address}" if address else "on Ray"
    return pool(workers, threads, console), f"in {counted(workers, 'process', 'processes')}"


def _run(
    asked: Experiment,
    run: Run,
    processes: Workers,
    how: str,
    console: Console,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    grid = cells(asked)
    folder, state = run.folder.absolute(), run.state.absolute()
    goes = "resuming in" if run.resumed else "writing to"
    plan = f"{_sizes(asked)} {how}; {goes} {run.folder}"
    warm = None if asked.warm_up is None else _warm_up(processes, asked, folder, state, console, plan)
    experiment = asked if warm is None else after_warm_up(asked, state)
    buffers, base = _share(processes, experiment, folder, state, console, plan if warm is None else None)
    for name, shared in buffers.items():
        shared_buffer.check_budgets(experiment, shared)
        samples = f", {shared['correct']} of {shared['samples']} samples correct" if shared["samples"] else ""
        say(console, f"  {_called(name)}: {shared['rows']} rows{samples}")
        if shared.get("unscored"):
            say(console, f"  {_called(name)}: {shared['unscored']}", style="yellow")
        for event in shared["events"]:
            say(console, f"  {_called(name)}: {event}", style="yellow")
    say(console, f"  base model: {_averages(base)}")
    dropped = {**shared["dropped_rows"], **base["dropped_rows"]}  # the same for all buffers
    if warm is not None and warm["dropped_rows"]:
        dropped["warm-up"] = warm["dropped_rows"]
    for name, summary in dropped.items():
        say(console, f"  {name}: {dropped_line(summary)}", style="yellow")
    for event in base["events"]:
        say(console, f"  {event}", style="yellow")

    def train(cell: Cell, divisor: int) -> Future[Any]:
        name = buffer_of(experiment, cell.seed)
        given = experiment, cell, buffers[name], folder / name, state, divisor
        return processes.submit(cell.id, one_cell.run_cell, *given)

    def test(cell: Cell, divisor: int) -> Future[Any]:
        return processes.submit(cell.id, one_cell.evaluate_cell, experiment, cell, state, divisor)

    def first(stages: FirstStages, divisor: int) -> Future[Any]:
        name = buffer_of(experiment, stages.seed)
        given = experiment, stages, buffers[name], folder / name, state, divisor
        return processes.submit(stages.id, one_cell.run_first, *given)

    lost = _train_first(processes, experiment, state, first, console)
    left = [cell for cell in grid if cell not in lost]
    trained, failed = _gather(processes, left, train, console, lambda found: _forget(experiment, found, state))
    failed += [{**asdict(cell), "error": error} for cell, error in lost.items()]
    chosen, rates = chosen_cells(experiment, trained)
    final = [c for c in chosen if has_choice(experiment, c.algorithm)]
    found, failed_later = _gather(processes, final, test, console)
    by_cell = {name: done | found.get(name, {}) for name, done in trained.items()}
    failed += failed_later
    reported = [by_cell[c.id] for c in chosen if "metrics" in by_cell[c.id]]
    if not reported:
        raise UserError(f"no cell succeeded; the first failed with: {failed[0]['error']}")
    outcomes = base.pop("outcomes") + [row for done in reported for row in done.pop("outcomes")]
    facts = {name: {key: found[key] for key in BUFFER_FACTS} for name, found in buffers.items()}
    lead = f"The rows that the cells of the comparison {asked.name} learn from, made by rlzoo."
    for name, seed in sampling_seeds(asked).items():
        shared_buffer.write_card(asked, folder / name, seed, buffers[name], lead)
    if without := unscored((row["reward"], row["prompt"]) for row in outcomes if row["decoding"] != BASE_TEXT):
        say(console, f"  evaluation: {without}; they count as wrong", style="yellow")
    overall = _over_benchmarks(base, reported) if len(experiment.benchmarks) > 1 else {}
    results = {
        "experiment": experiment.name,
        "description": experiment.description,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "config": asked.model_dump(mode="json"),
        "warm_up": facts_of(warm),
        "metrics": {name: {"label": m.label, "unit": m.unit} for name, m in resolve.metrics_of(experiment).items()},
        "base": base["metrics"],
        **({"retention": {"base": base["retention"]}} if experiment.retention else {}),
        "mean_over_benchmarks": overall,
        "base_curve": base["curve"],
        "cells": reported,
        "learning_rates": rates,
        "tuning": tuning_of(experiment, trained),
        "failed": failed,
        **({"buffers": facts} if experiment.rollouts.per_seed else facts),
        "dropped_rows": dropped,
        "events": [
            *origins(reported, len(chosen)),
            *([] if warm is None else (f"warm-up: {event}" for event in warm["events"])),
            *dict.fromkeys(event for found in (*buffers.values(), base) for event in found["events"]),
        ],
        "token_probabilities": {  # of the demonstrations, which all buffers share
            "edges": shared["token_probabilities"]["edges"],
            "before": shared["token_probabilities"]["counts"],
        },
    }
    return results, outcomes


def _train_first(
    processes: Workers,
    experiment: Experiment,
    state: Path,
    submit: Callable[[FirstStages, int], Future[Any]],
    console: Console,
) -> dict[Cell, str]:
    """Train the stages that cells continue from, earlier ones first; returns the cells that cannot go on, and why."""
    cached, lost = CachedResults(state / "cells"), dict[Cell, str]()
    stages = first_stages(experiment)
    left = [cell for cell in cells(experiment) if any(one.is_of(experiment, cell) for one in stages)]
    left = [cell for cell in left if agreed(cached.read(cell.id) is None)]
    for _, wave in groupby(stages, lambda one: len(one.names)):
        wanted = [one for one in wave if any(one.is_of(experiment, cell) for cell in left if cell not in lost)]
        for failed in _gather(processes, wanted, submit, console)[1]:
            one = FirstStages(failed["names"], failed["seed"])
            lost |= {cell: f"{one.id}: {failed['error']}" for cell in left if one.is_of(experiment, cell)}
    return lost


def _forget(experiment: Experiment, trained: Mapping[str, Any], state: Path) -> None:
    """Delete weights that are not needed any more: of learning rates that lost, and of stages that all cells are past.

    Their results are kept.
    """
    if not is_main():
        return
    for cell in lost_cells(experiment, trained):
        remove(state / "models" / cell.id)
    left = [cell for cell in cells(experiment) if cell.id not in trained]
    for one in first_stages(experiment):
        if not any(one.is_of(experiment, cell) for cell in left):
            remove(weights_of(one, state))


def _over_benchmarks(base: Mapping[str, Any], cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean of each metric over benchmarks: algorithm (or base) → metric → mean; each cell also gets its own."""
    for cell in cells:
        cell["mean_over_benchmarks"] = mean_over_benchmarks([cell["metrics"]])
    own: dict[str, list[Any]] = {BASE: [base["metrics"]]}
    for cell in cells:
        own.setdefault(cell["algorithm"], []).append(cell["metrics"])
    return {algorithm: mean_over_benchmarks(found) for algorithm, found in own.items()}


def _called(buffer: str) -> str:
    """A buffer's name in log lines."""
    _, _, seed = buffer.partition("-seed")
    return f"buffer of seed {seed}" if seed else "shared buffer"


def _warm_up(
    processes: Workers, experiment: Experiment, folder: Path, state: Path, console: Console, plan: str
) -> dict[str, Any]:
    """Train the warm-up, once the model has been found to load. Raises UserError if it fails."""
    alone(processes, "model", shared_buffer.check_model, experiment)
    say(console, f"{experiment.name}: {plan}", style="bold")
    found: dict[str, Any] = alone(processes, "warm-up", warm_up, experiment, state, folder / "logs" / WARM_UP)
    say(console, f"  warm-up: {counted(found['steps'], 'step')} of {found['objective']}")
    for event in found["events"]:
        say(console, f"  warm-up: {event}", style="yellow")
    return found


def _share(
    processes: Workers, experiment: Experiment, folder: Path, state: Path, console: Console, plan: str | None
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The work shared by all cells: buffers by name, and the base model's results. Raises UserError if it fails.

    ``plan`` is printed once the model has been found to load; None: it has been.
    """
    seeds = sampling_seeds(experiment)
    futures = {}
    if plan is not None:
        futures[processes.submit("model", shared_buffer.check_model, experiment)] = "model"
    for name, seed in seeds.items():
        filled = processes.submit(_called(name), shared_buffer.fill_buffer, experiment, folder / name, state, seed)
        futures[filled] = _called(name)
    futures[processes.submit("base model", one_cell.evaluate_base, experiment, state)] = "base model"
    done = {}
    for name, future in processes.gather(futures):
        if isinstance(error := future.exception(), WorkerDiedError):
            raise UserError(why(error)) from None
        done[name] = future.result()
        if name == "model":  # not earlier: for wrong input only the error is printed
            say(console, f"{experiment.name}: {plan}", style="bold")
    return {name: done[_called(name)] for name in seeds}, done["base model"]


def _gather(
    processes: Workers,
    grid: Sequence[Trained],
    submit: Callable[[Trained, int], Future[Any]],
    console: Console,
    so_far: Callable[[Mapping[str, Any]], None] | None = None,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The results of the cells that succeeded, by cell id, and the cells that failed, with the reason.

    ``so_far`` is called with the results whenever there is another.

    A cell that ran out of memory, or whose process died, which may have the same cause, is retried after all others
    with smaller micro-batches.
    """
    results: dict[str, dict[str, Any]] = {}
    failed: list[dict[str, Any]] = []
    left = list(grid)
    for attempt in range(RETRIES + 1):
        futures = {submit(cell, 2**attempt): cell for cell in left}
        left = []
        for name, future in processes.gather({future: cell.id for future, cell in futures.items()}):
            cell, error = futures[future], future.exception()
            done = f"  [{len(results) + len(failed) + 1}/{len(grid)}] {name}"
            if error is None:
                results[name] = future.result()
                if so_far is not None:
                    so_far(results)
                say(console, f"{done}: {_averages(results[name])}")
                for event in results[name].get("events", []):
                    say(console, f"    {event}", style="yellow")
            elif isinstance(error, (WorkerDiedError, OutOfMemoryError)) and attempt < RETRIES:
                left.append(cell)
                say(console, f"  {name}: {why(error)}; to be retried with micro-batches half as large", style="red")
            else:
                failed.append({**asdict(cell), "error": why(error)})
                say(console, f"{done} failed: {why(error)}", style="red")
    return results, failed


def _averages(found: Mapping[str, Any]) -> str:
    if "metrics" not in found and "validation" not in found:  # stages that cells continue from
        return counted(len(found["training"]), "step")
    metrics = found.get("metrics") or {"validation": {"avg_at_k": found["validation"]}}
    return "avg@k " + ", ".join(f"{where} {100 * m['avg_at_k']:.1f} %" for where, m in metrics.items())


def _sizes(experiment: Experiment) -> str:
    algorithms, seeds = counted(len(experiment.algorithms), "algorithm"), counted(len(experiment.seeds), "seed")
    return f"{algorithms} × {seeds}, {counted(len(cells(experiment)), 'cell')}"
