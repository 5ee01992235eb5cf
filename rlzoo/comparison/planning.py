"""`rlzoo plan`: what an experiment costs, how long it takes, and the smallest difference that it can detect."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import rich.table
import torch

from rlzoo.buffers.problems import load_problems
from rlzoo.comparison.forecast import forecast
from rlzoo.comparison.outcomes import METRICS, difference_of, result_matrices
from rlzoo.comparison.plan import cells
from rlzoo.comparison.report.tables import amount, plain_table, points, seconds
from rlzoo.comparison.speed import OF_SAMPLING, OF_TRAINING, card_of, measured_speed, speed_of_gpu
from rlzoo.comparison.statistics import SIGNIFICANT, smallest_difference
from rlzoo.comparison.studies import list_studies, read_study, study_folder
from rlzoo.config import BASE, Experiment
from rlzoo.document import Entry, Table
from rlzoo.errors import UserError
from rlzoo.jobs.pool import default_workers
from rlzoo.policy.loading import load_shape

MORE = (1, 2, 4)
"""The multiples of an experiment's seeds that its smallest difference is computed for."""
POWER = 0.8
SMALL = 1e8
"""The number of parameters below which the speed of a GPU is limited by kernel launches."""


def planned(
    experiment: Experiment, gpu: str | None = None, pilot: Path | None = None, workers: int | None = None
) -> dict[str, Any]:
    """The costs of an experiment, its time with ``workers`` on this machine or on a ``gpu``, and what it can detect.

    ``pilot`` is the folder of a finished comparison on the same benchmarks; None: the study that ships, if any. Raises
    UserError for an unknown GPU, and for a pilot without the differences that are needed.
    """
    shape = load_shape(experiment.model)
    if gpu is not None:
        card_of(gpu)
        shape.compute = torch.bfloat16
    pilot = _committed(experiment) if pilot is None else pilot
    outcomes = None if pilot is None else _outcomes_of(pilot)
    speed = measured_speed(experiment) if gpu is None else None
    known = speed.sample_tokens if speed is not None else None
    if outcomes is not None:
        known = statistics.fmean(outcomes["length"].to_pylist())
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
        "speed": {"flops_per_second": speed.flops, "tokens_per_second": speed.tokens, "gpu": gpu},
        "gpu_bytes": None if gpu is None else card_of(gpu).bytes,
        "pilot": None if pilot is None else str(pilot),
        "smallest_differences": None if outcomes is None else detectable(experiment, outcomes, pilot),
    }


def _committed(experiment: Experiment) -> Path | None:
    """The study of this experiment that ships with rlzoo, if it is of the same model."""
    if experiment.name not in list_studies():
        return None
    config = read_study(experiment.name).results.config
    return study_folder(experiment.name) if config["model"] == experiment.model else None


def _outcomes_of(pilot: Path) -> pa.Table:
    file = pilot / "outcomes.parquet"
    if not file.is_file():
        raise UserError(f"--pilot {pilot} has no outcomes.parquet: give the folder of a finished comparison")
    return pq.read_table(file)


def detectable(experiment: Experiment, outcomes: pa.Table, pilot: Path | None = None) -> list[dict[str, Any]]:
    """Per benchmark and number of seeds, the smallest difference in avg@k that is detected in four of five repetitions.

    "Detected": distinguishable after the correction of a report's table of differences. The variance is that of the
    pilot's paired differences from its baseline, the median over its algorithms. Raises UserError for a pilot without
    two seeds, or on other benchmarks.
    """
    matrices = result_matrices(outcomes, 1)
    names = [name for name in dict.fromkeys(name for name, _, _ in matrices) if name != BASE]
    baseline = experiment.baseline if experiment.baseline in names else names[0]
    tests = max(len(experiment.algorithms) - 1, 1) * len(METRICS)
    rows: list[dict[str, Any]] = []
    for benchmark, source in experiment.benchmarks.items():
        problems = len(load_problems(source))
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
            f"--pilot {pilot} has no differences of two seeds on {', '.join(experiment.benchmarks)}: "
            "give a comparison of two algorithms on these benchmarks, with two seeds or more"
        )
    return rows


def tables_of(found: Mapping[str, Any]) -> tuple[list[rich.table.Table], list[str]]:
    """A plan as tables and lines for the terminal."""
    costs = Table(
        ["algorithm", "cells", "gradient tokens", "sampled tokens", "FLOPs", "memory"],
        [
            [
                Entry(row["algorithm"]),
                Entry(str(row["cells"])),
                Entry(amount(row["gradient_tokens"])),
                Entry(amount(round(row["sampled_tokens"] + row["evaluated_tokens"]))),
                Entry(amount(row["flops"])),
                Entry(amount(row["bytes"], "B")),
            ]
            for row in found["rows"]
        ],
    )
    tables = [plain_table(costs, "a cell of each algorithm, its evaluation included")]
    if rows := found["smallest_differences"]:
        differences = Table(
            ["benchmark", "problems", "seeds", "corrected (points)", "alone (points)"],
            [
                [Entry(row["benchmark"]), Entry(str(row["problems"])), Entry(str(row["seeds"]))]
                + [Entry(points(row[key]).lstrip("+")) for key in ("corrected", "alone")]
                for row in rows
            ],
        )
        title = f"smallest difference in avg@k that is detected in {100 * POWER:.0f} % of repetitions"
        tables.append(plain_table(differences, title))
    return tables, _lines(found)


def _lines(found: Mapping[str, Any]) -> list[str]:
    lengths, speed = found["lengths"], found["speed"]
    length = f"a prompt has {lengths['prompt']:.0f} tokens, a sample {lengths['sample']:.0f}"
    lines = [
        f"{found['cells']} cells; {amount(found['sampled_tokens'])} sampled tokens and {amount(found['flops'])} FLOPs "
        f"in all, those of the shared buffer and the base model included; {amount(found['parameters'])} parameters",
        length + (f", taken to be {lengths['assumed']}" if lengths["assumed"] else " (measured)"),
    ]
    rates = (
        f"{amount(speed['flops_per_second'])} FLOPs and {amount(speed['tokens_per_second'])} sampled tokens per second"
    )
    workers = f"{found['workers']} worker{'s' * (found['workers'] != 1)}"
    if speed["gpu"] is None:
        lines.append(f"about {seconds(found['seconds'])} on this machine with {workers}; measured for one: {rates}")
    else:
        lines.append(
            f"about {seconds(found['seconds'])} with {workers} on {speed['gpu']}; assumed, not measured: {rates} "
            f"({100 * OF_TRAINING:.0f} and {100 * OF_SAMPLING:.0f} % of the bf16 matrix products on its data sheet)"
        )
        if found["parameters"] < SMALL:
            lines.append("A model this small keeps no GPU busy: it will take longer.")
        if (most := max(row["bytes"] for row in found["rows"])) > found["gpu_bytes"]:
            lines.append(
                f"memory: {amount(most, 'B')} do not fit into the {amount(found['gpu_bytes'], 'B')} of {speed['gpu']}: "
                "use adapters (training.lora), gradient_checkpointing, or several GPUs"
            )
    lines.append("The time of rewards, loading and reports is not in it.")
    if found["smallest_differences"]:
        lines.append(
            f"corrected: after Holm's correction for the {found['smallest_differences'][0]['differences']} differences "
            f"of a table; alone: of a single planned difference. Variances are those of {found['pilot']}."
        )
    else:
        lines.append("For the smallest difference that it can detect, give --pilot and a finished comparison.")
    return lines
