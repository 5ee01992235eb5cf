"""Run a comparison: shared work once, cells in parallel, learning rates chosen on validation, results on disk."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console

from rlzoo.comparison import work
from rlzoo.comparison.plan import Cell, cells, has_choice
from rlzoo.comparison.pool import Pool, available_cores, pool
from rlzoo.comparison.report import write_atomically, write_report
from rlzoo.comparison.statistics import summarise
from rlzoo.config import Experiment, load_experiment
from rlzoo.errors import UserError

PACKAGES = ("rlzoo", "torch", "transformers", "datasets", "accelerate", "numpy", "scipy", "math-verify")
OUTCOMES = pa.schema(
    [
        ("algorithm", pa.string()),
        ("seed", pa.int64()),
        ("learning_rate", pa.float64()),
        ("benchmark", pa.string()),
        ("problem_id", pa.string()),
        ("prompt", pa.string()),
        ("decoding", pa.string()),
        ("sample", pa.int64()),
        ("reward", pa.float64()),
        ("correct", pa.bool_()),
        ("length", pa.int64()),
        ("truncated", pa.bool_()),
        ("text", pa.string()),
    ]
)


def compare(
    experiment: Experiment | str,
    out: Path | str | None = None,
    workers: int | None = None,
    threads: int = 1,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run every cell of an experiment and write its results and report to ``out``.

    ``out`` defaults to runs/<name>-<time>; ``workers`` to the number of cores, each with ``threads`` threads. Gives
    back what results.json holds. A cell that fails is reported there and the others go on. Raises UserError for
    wrong input; then ``out`` is not left behind.
    """
    if isinstance(experiment, str):
        experiment = load_experiment(experiment)
    console = console or Console(stderr=True)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    out = Path(out) if out is not None else Path("runs") / f"{experiment.name}-{stamp}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {str(out)!r} exists already and is not empty: give another folder, or remove it")
    check(experiment)
    started = time.perf_counter()
    with _output(out):
        results, outcomes = _run(experiment, out, workers or available_cores(), threads, console)
        results["wall_seconds"] = time.perf_counter() - started
        table = pa.Table.from_pylist(outcomes, schema=OUTCOMES)
        results["summary"] = summarise(table, experiment.evaluation.pass_k)
        pq.write_table(table, out / ".outcomes.partial")
        (out / ".outcomes.partial").replace(out / "outcomes.parquet")
        write_atomically(out / "experiment.yaml", yaml.safe_dump(results["config"], sort_keys=False))
        write_atomically(out / "results.json", json.dumps(results, indent=1))
    shutil.rmtree(out / "models", ignore_errors=True)
    write_report(out, experiment.baseline)
    return results


def check(experiment: Experiment) -> None:
    """Find wrong names and options before anything is computed. Raises UserError."""
    from rlzoo.problems import load_problems
    from rlzoo.reward import get_reward

    get_reward(experiment.reward)
    for name in experiment.algorithms:
        work.objective_of(experiment, name)
        experiment.training_of(name)
    if experiment.baseline is not None and experiment.baseline not in experiment.algorithms:
        raise UserError(f"baseline {experiment.baseline!r} is not among: {', '.join(experiment.algorithms)}")
    for source in [experiment.train, *experiment.benchmarks.values(), experiment.validation]:
        if source is not None:
            load_problems(source)


def _run(
    experiment: Experiment, out: Path, workers: int, threads: int, console: Console
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    grid = cells(experiment)
    buffer, models = out / "buffer", out / "models"
    console.print(
        f"[bold]{experiment.name}[/]: {len(experiment.algorithms)} algorithms × {len(experiment.seeds)} seeds, "
        f"{len(grid)} runs in {min(workers, len(grid))} processes; writing to {out}"
    )
    with pool(max(1, min(workers, len(grid))), threads, console) as processes:
        futures = {
            processes.submit("shared buffer", work.fill_buffer, experiment, buffer): "shared buffer",
            processes.submit("base model", work.evaluate_base, experiment): "base model",
        }
        done = {}
        for name, future in processes.gather(futures):
            done[name] = future.result()
            console.print(f"  {name} done")
        shared, base = done["shared buffer"], done["base model"]
        runs, failed = _run_cells(processes, experiment, grid, shared, buffer, models, console)
        chosen, rates = _choose(experiment, grid, runs)
        later = {
            processes.submit(c.id, work.evaluate_cell, experiment, c, models): c.id
            for c in chosen
            if has_choice(experiment, c.algorithm)
        }
        for name, future in processes.gather(later):
            runs[name] |= future.result()
    if not chosen:
        raise UserError(f"no run succeeded; the first failed with: {failed[0]['error']}")
    outcomes = base.pop("outcomes") + [row for c in chosen for row in runs[c.id].pop("outcomes")]
    results = {
        "experiment": experiment.name,
        "description": experiment.description,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "config": experiment.model_dump(mode="json"),
        "base": base["metrics"],
        "base_curve": base["curve"],
        "cells": [runs[c.id] for c in chosen],
        "learning_rates": rates,
        "failed": failed,
        "buffer": {"rows": shared["rows"], "sampled_tokens": shared["sampled_tokens"]},
        "token_probabilities": {
            "edges": shared["token_probabilities"]["edges"],
            "before": shared["token_probabilities"]["counts"],
        },
    }
    return results, outcomes


def _run_cells(
    processes: Pool,
    experiment: Experiment,
    grid: Sequence[Cell],
    shared: dict[str, Any],
    buffer: Path,
    models: Path,
    console: Console,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Results of the cells that ran, by cell id, and the cells that did not with the reason."""
    by_id = {c.id: c for c in grid}
    futures: dict[Future[Any], str] = {
        processes.submit(c.id, work.run_cell, experiment, c, shared, buffer, models): c.id for c in grid
    }
    runs: dict[str, dict[str, Any]] = {}
    failed = []
    for name, future in processes.gather(futures):
        cell = by_id[name]
        error = future.exception()
        if error is not None:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            failed.append(
                {
                    "algorithm": cell.algorithm,
                    "seed": cell.seed,
                    "learning_rate": cell.learning_rate,
                    "error": reason,
                }
            )
            console.print(f"  [red]{name} failed[/]: ", end="")
            console.print(reason, markup=False)
            continue
        runs[name] = future.result()
        scores = runs[name].get("metrics") or {"validation": {"avg_at_k": runs[name]["validation"]}}
        shown = "  ".join(f"{where} {100 * m['avg_at_k']:.1f} %" for where, m in scores.items())
        console.print(f"  [{len(runs) + len(failed)}/{len(grid)}] {name}: avg@k {shown}", highlight=False)
    return runs, failed


def _choose(
    experiment: Experiment, grid: Sequence[Cell], runs: dict[str, dict[str, Any]]
) -> tuple[list[Cell], dict[str, dict[str, float]]]:
    """The cells to report (each algorithm at its best learning rate on validation), and the validation scores."""
    rates: dict[str, dict[str, float]] = {}
    best: dict[str, float] = {}
    for name in experiment.algorithms:
        if not has_choice(experiment, name):
            best[name] = experiment.learning_rates_of(name)[0]
            continue
        for rate in experiment.learning_rates_of(name):
            scores = [
                runs[c.id]["validation"]
                for c in grid
                if (c.algorithm, c.learning_rate) == (name, rate) and c.id in runs
            ]
            if scores:
                rates.setdefault(name, {})[f"{rate:g}"] = mean(scores)
        if name in rates:
            best[name] = float(max(rates[name], key=rates[name].__getitem__))
    chosen = [
        c
        for name in experiment.algorithms
        for c in grid
        if c.algorithm == name and f"{c.learning_rate:g}" == f"{best.get(name, -1):g}" and c.id in runs
    ]
    return chosen, rates


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def _output(folder: Path) -> Iterator[None]:
    """Create the folder; if what follows fails, leave neither it nor anything in it behind."""
    missing = [p for p in (*reversed(folder.parents), folder) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {str(folder)!r} cannot be created: {error.strerror}") from None
    try:
        yield
    except BaseException:
        shutil.rmtree(missing[0] if missing else folder, ignore_errors=True)
        if not missing:
            folder.mkdir()
        raise
