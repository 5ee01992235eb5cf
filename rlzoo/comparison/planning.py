"""`rlzoo plan`: an experiment's cost, its duration, and the smallest difference that it can detect."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import rich.table
import torch

from rlzoo.comparison.forecast import forecast
from rlzoo.comparison.outcomes import METRICS, benchmark_rows, difference_of, result_matrices
from rlzoo.comparison.plan import cells
from rlzoo.comparison.report.tables import amount, points, seconds
from rlzoo.comparison.sizes import size_of
from rlzoo.comparison.speed import OF_SAMPLING, OF_TRAINING, Speed, card_of, measured_speed, speed_of_gpu
from rlzoo.comparison.statistics import SIGNIFICANT, smallest_difference
from rlzoo.comparison.studies import list_studies, read_study, study_folder
from rlzoo.config import BASE, WARM_UP, Experiment
from rlzoo.document import Entry, Table
from rlzoo.document.terminal import plain_table
from rlzoo.errors import UnreachableError, UserError
from rlzoo.jobs.pool import default_workers
from rlzoo.policy.loading import load_shape

MORE = (1, 2, 4)
"""Multiples of the experiment's number of seeds for which the smallest detectable difference is computed."""
POWER = 0.8
"""The power at which a difference counts as detectable."""
SMALL = 1e8
"""The number of parameters below which kernel launches limit a GPU's speed."""


def planned(
    experiment: Experiment, gpu: str | None = None, pilot: Path | None = None, workers: int | None = None
) -> dict[str, Any]:
    """The costs of an experiment, its duration with ``workers``, and the smallest difference that it can detect.

    The duration is for this machine, or for a ``gpu``. ``pilot`` is the folder of a finished comparison on the same
    benchmarks; None: the included study of this experiment, if any. Keys are the fields of `Forecast`, and others that
    `tables_of` shows. Raises UserError for an unknown GPU, and for a pilot as `detectable` does.
    """
    shape = load_shape(experiment.model)
    if gpu is not None:
        card_of(gpu)
        shape.compute = torch.bfloat16
    pilot = _committed(experiment) if pilot is None else pilot
    outcomes = None if pilot is None else _outcomes_of(pilot)
    speed = _measured(experiment) if gpu is None else None
    known = speed.sample_tokens if speed is not None else None
    if outcomes is not None:
        known = statistics.fmean(benchmark_rows(outcomes)["length"].to_pylist())
    found = forecast(experiment, shape, known)
    if gpu is not None:
        speed = speed_of_gpu(gpu, found)
    assert speed is not None
    number = 1 if gpu is not None and workers is None else min(workers or default_workers(), len(cells(experiment)))
    return {
        "experiment": experiment.name,
        **found.as_dict(),
        "cells": len(cells(experiment)),
        "sampled_tokens": found.sampled_tokens,
        "flops": found.flops,
        "seconds": found.seconds(speed.flops * number, speed.tokens * number),
        "workers": number,
        "ends_early": experiment.evaluation.until_flat is not None,
        "unspent": [
            row.algorithm
            for row in found.rows
            if (training := experiment.training_of(row.algorithm)).budget is not None and row.steps == training.steps
        ],
        "speed": {"flops_per_second": speed.flops, "tokens_per_second": speed.tokens, "gpu": gpu},
        "gpu_bytes": None if gpu is None else card_of(gpu).bytes,
        "pilot": None if pilot is None else str(pilot),
        "smallest_differences": None if outcomes is None else detectable(experiment, outcomes, pilot),
    }


def _measured(experiment: Experiment) -> Speed:
    try:
        return measured_speed(experiment)
    except UnreachableError as error:
        raise UserError(f"{error}; --gpu NAME estimates the time without them") from None


def _committed(experiment: Experiment) -> Path | None:
    """The included study of this experiment, if there is one with the same base model."""
    if experiment.name not in list_studies():
        return None
    config, asked = read_study(experiment.name).results.config, experiment.model_dump(mode="json")
    same = all(config.get(setting) == asked[setting] for setting in ("model", WARM_UP))
    return study_folder(experiment.name) if same else None


def _outcomes_of(pilot: Path) -> pa.Table:
    file = pilot / "outcomes.parquet"
    if not file.is_file():
        raise UserError(f"--pilot {pilot} has no outcomes.parquet: give the folder of a finished comparison")
    return pq.read_table(file)


def detectable(experiment: Experiment, outcomes: pa.Table, pilot: Path | None = None) -> list[dict[str, Any]]:
    """Per benchmark and number of seeds, the smallest difference in avg@k that is detected with power `POWER`.

    ``corrected``: significant after Holm's correction in a report's table of differences; ``alone``: as a single
    planned difference; both are fractions. Variances are estimated from the pilot's paired differences to its baseline;
    the result is the median over its algorithms. Raises UserError for a pilot with fewer than two seeds, or without
    these benchmarks.
    """
    matrices = result_matrices(outcomes, 1)
    names = [name for name in dict.fromkeys(name for name, _, _ in matrices) if name != BASE]
    baseline = experiment.baseline if experiment.baseline in names else names[0]
    tests = max(len(experiment.algorithms) - 1, 1) * len(METRICS)
    rows: list[dict[str, Any]] = []
    for benchmark, source in experiment.benchmarks.items():
        problems = size_of(source)
        found = {name: m for (name, on, metric), m in matrices.items() if (on, metric) == (benchmark, "avg_at_k")}
        other = found.get(baseline)
        pairs = (
            [difference_of(found[name], other) for name in names if name in found and name != baseline] if other else []
        )
        values = [one.values for one in pairs if one is not None and min(one.values.shape) > 1]
        for multiple in MORE if values else ():
            seeds = max(2, multiple * len(experiment.seeds))
            sizes = [smallest_difference(v, seeds, problems, SIGNIFICANT / tests, POWER) for v in values]
            alone = [smallest_difference(v, seeds, problems, SIGNIFICANT, POWER) for v in values]
            row = {"benchmark": benchmark, "seeds": seeds, "problems": problems, "differences": tests}
            rows.append(row | {"corrected": statistics.median(sizes), "alone": statistics.median(alone)})
    if not rows:
        raise UserError(
            f"--pilot {pilot} has no differences with at least two seeds on {', '.join(experiment.benchmarks)}: "
            "give a comparison of two algorithms on these benchmarks, with two seeds or more"
        )
    return rows


def costs_table(found: Mapping[str, Any]) -> Table:
    """The costs per cell of each algorithm, from a `Forecast` as plain data."""
    return Table(
        ["algorithm", "cells", "steps", "gradient tokens", "sampled tokens", "FLOPs", "memory"],
        [
            [
                Entry(row["algorithm"]),
                Entry(str(row["cells"])),
                Entry(f"{row['steps']:,}"),
                Entry(amount(row["gradient_tokens"])),
                Entry(amount(round(row["sampled_tokens"] + row["evaluated_tokens"]))),
                Entry(amount(row["flops"])),
                Entry(amount(row["bytes"], "B")),
            ]
            for row in [*([found["warm_up"]] if found["warm_up"] else []), *found["rows"]]
        ],
    )


def tables_of(found: Mapping[str, Any]) -> tuple[list[rich.table.Table], list[str]]:
    """The result of `planned` as tables and lines for the terminal."""
    tables = [plain_table(costs_table(found), "costs per cell, including its evaluation")]
    if rows := found["smallest_differences"]:
        differences = Table(
            ["benchmark", "problems", "seeds", "corrected (points)", "alone (points)"],
            [
                [Entry(row["benchmark"]), Entry(str(row["problems"])), Entry(str(row["seeds"]))]
                + [Entry(points(row[key]).lstrip("+")) for key in ("corrected", "alone")]
                for row in rows
            ],
        )
        title = f"smallest difference in avg@k detected with {100 * POWER:.0f} % power"
        tables.append(plain_table(differences, title))
    return tables, _lines(found)


def _lines(found: Mapping[str, Any]) -> list[str]:
    lengths, speed = found["lengths"], found["speed"]
    shared = f"including {'the warm-up, ' if found['warm_up'] else ''}the shared buffer and the base model"
    length = f"mean length: {lengths['prompt']:.0f} tokens per prompt, {lengths['sample']:.0f} per sample"
    lines = [
        f"{found['cells']} cells; {amount(found['sampled_tokens'])} sampled tokens and {amount(found['flops'])} FLOPs "
        f"in total, {shared}; {amount(found['parameters'])} parameters",
        length + (f" (assumed: {lengths['assumed']})" if lengths["assumed"] else " (measured)"),
    ]
    rates = (
        f"{amount(speed['flops_per_second'])} FLOPs and {amount(speed['tokens_per_second'])} sampled tokens per second"
    )
    workers = f"{found['workers']} worker{'s' * (found['workers'] != 1)}"
    if speed["gpu"] is None:
        lines.append(f"about {seconds(found['seconds'])} on this machine with {workers}; measured with one: {rates}")
    else:
        lines.append(
            f"about {seconds(found['seconds'])} with {workers} on {speed['gpu']}; assumed, not measured: {rates} "
            f"({100 * OF_TRAINING:.0f} and {100 * OF_SAMPLING:.0f} % of the peak bf16 throughput on its data sheet)"
        )
        if found["parameters"] < SMALL:
            lines.append("A model this small does not keep a GPU busy: it will take longer.")
        if (most := max(row["bytes"] for row in found["rows"])) > found["gpu_bytes"]:
            lines.append(
                f"memory: {amount(most, 'B')} do not fit into the {amount(found['gpu_bytes'], 'B')} of {speed['gpu']}: "
                "use adapters (training.lora), gradient_checkpointing, or several GPUs"
            )
    if found["ends_early"]:
        lines.append("Cells end earlier if their validation curve is flat (evaluation.until_flat): this is the most.")
    if rows := found["unspent"]:
        lines.append(f"training.steps ends {', '.join(rows)} before the budget is spent: raise it")
    lines.append("Rewards, loading and reports take additional time.")
    if found["smallest_differences"]:
        lines.append(
            f"corrected: with Holm's correction for the {found['smallest_differences'][0]['differences']} differences "
            f"of a table; alone: for a single planned difference. Variances are estimated from {found['pilot']}."
        )
    else:
        lines.append("For the smallest detectable difference, give the folder of a finished comparison with --pilot.")
    return lines
