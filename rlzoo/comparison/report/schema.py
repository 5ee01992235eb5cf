"""The schema of results.json and outcomes.parquet, which is checked when a run's folder is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlzoo.comparison.outcomes import OVERALL, ResultKey, ResultMatrix, result_matrices
from rlzoo.config import BASE
from rlzoo.errors import UserError

OUTCOME_COLUMNS = (
    "algorithm",
    "seed",
    "benchmark",
    "problem_id",
    "prompt",
    "decoding",
    "sample",
    "correct",
    "truncated",
    "text",
)


RETENTION_COLUMNS = ("retention", "base_text_logp", "base_text_tokens")
"""Columns that outcomes without retention sets may lack."""
RESULTS, OUTCOMES, VARIANCE = "results.json", "outcomes.parquet", "variance.json"
CELLS = "cells"
"""The folder of a study's cells, which results.json then names."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class BenchmarkResult(_Model):
    """The metrics of a model on one benchmark: three as fractions, and any others under their names."""

    model_config = ConfigDict(frozen=True, extra="allow")

    avg_at_k: float | None = None
    greedy: float | None = None
    pass_at_k: float | None = None
    k: int
    samples: int | None = None
    """The number of samples per problem; None: k."""

    def value(self, metric: str) -> float | None:
        """The value of any metric; None if there is none."""
        found: float | None = getattr(self, metric, None)
        return found


class ShownMetric(_Model):
    """The label and unit under which a metric is shown."""

    label: str
    unit: str = "%"


class CellCosts(_Model):
    """What one cell cost: tokens, FLOPs, seconds, and bytes at the peak."""

    gradient_tokens: float | None = None
    sampled_tokens: float | None = None
    flops: float | None = None
    wall_seconds: float | None = None
    peak_memory_bytes: float | None = None


class WarmUpResult(_Model):
    """The warm-up that made the base model."""

    objective: str
    steps: int
    costs: CellCosts = CellCosts()


class CurvePoint(_Model):
    """One point of a learning curve: its costs so far, and benchmark → metric → fraction."""

    step: int
    metrics: dict[str, dict[str, Any]]
    gradient_tokens: float | None = None
    sampled_tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None
    validation: dict[str, Any] | None = None
    """The metrics on validation, where cells end by it."""


class CellResult(_Model):
    """One trained model: an algorithm, a seed and a learning rate."""

    algorithm: str
    seed: int
    learning_rate: float | None = None
    metrics: dict[str, BenchmarkResult]
    mean_over_benchmarks: dict[str, float] = Field(default_factory=dict)
    """Metric → mean over benchmarks."""
    costs: CellCosts = CellCosts()
    start: dict[str, float] = Field(default_factory=dict)
    """The costs before the first step, such as those of the shared buffer."""
    ended: str | None = None
    """Why training ended: ``steps``, ``budget`` or ``flat``."""
    training: list[dict[str, Any]] = []
    """The metrics of each step."""
    curve: list[CurvePoint] | None = None
    token_probabilities: list[float] | None = None
    events: list[str] = []
    retention: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Retention set → metric → value."""


class SummaryRow(_Model):
    """The mean over seeds of an algorithm's results on a benchmark, or over all benchmarks, with its interval."""

    algorithm: str
    benchmark: str
    metric: str
    mean: float
    ci_low: float
    ci_high: float
    seeds: int


class RetentionResults(_Model):
    """What fine-tuning kept and lost: see `rlzoo.comparison.retention`."""

    base: dict[str, dict[str, float]]
    """Retention set → metric → value for the base model."""
    summary: list[SummaryRow] = []
    """The summaries of all algorithms and the base model; ``benchmark`` is the retention set."""


class TunedCell(_Model):
    """What one cell of a choice among learning rates cost, and its result on validation."""

    seed: int
    validation: float | None = None
    costs: CellCosts = CellCosts()


class Histogram(_Model):
    """Counts of the demonstrations' token probabilities under the base model."""

    edges: list[float] = []
    before: list[float] = []


class Failure(_Model):
    """A cell that did not finish."""

    algorithm: str
    seed: int
    learning_rate: float | None = None
    error: str


class Results(_Model):
    """The content of results.json. Optional fields may be missing or null there."""

    experiment: str
    description: str | None = None
    created: str
    versions: dict[str, str | None] = Field(default_factory=dict)
    config: Any = None
    metrics: dict[str, ShownMetric] = Field(default_factory=dict)
    """All metrics of the run by name."""
    mean_over_benchmarks: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Algorithm (the base model among them) → metric → mean over seeds and benchmarks."""
    warm_up: WarmUpResult | None = None
    base: dict[str, BenchmarkResult]
    """The results of the base model, after the warm-up if there is one."""
    base_curve: CurvePoint | None = None
    """The point at step 0 that all learning curves start from."""
    cells: list[CellResult]
    summary: list[SummaryRow]
    base_summary: list[SummaryRow] = []
    """The summary of the base model."""
    token_probabilities: Histogram | None = None
    learning_rates: dict[str, dict[str, float | None]] | None = None
    tuning: dict[str, dict[str, list[TunedCell]]] = Field(default_factory=dict)
    """Algorithm → learning rate → all cells that were trained with it, where a learning rate was chosen."""
    retention: RetentionResults | None = None
    """None without retention sets."""
    wall_seconds: float | None = None
    failed: list[Failure] | None = None
    dropped_rows: dict[str, Any] = Field(default_factory=dict)
    """Problem set or table → its `BadRows.summary`."""
    events: list[str] = []
    """What happened to the buffer before training."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The experiment's settings: the configuration, or nothing if the results have none."""
        return self.config if isinstance(self.config, dict) else {}

    @cached_property
    def algorithms(self) -> tuple[str, ...]:
        """The algorithms that have results, in display order."""
        return tuple(dict.fromkeys(cell.algorithm for cell in self.cells))

    def baseline(self, asked: str | None = None) -> str:
        """The algorithm that the others are compared with: one that was asked for, unless all of its cells failed.

        Otherwise the experiment's, if it has results, and else the first algorithm; the base model if there is only one
        algorithm.
        """
        failed = {failure.algorithm for failure in self.failed or []} - set(self.algorithms)
        if asked is not None and asked not in failed:
            return asked
        own = self.settings.get("baseline")
        if len(self.algorithms) < 2:
            return BASE
        return own if own in self.algorithms else self.algorithms[0]

    @cached_property
    def benchmarks(self) -> tuple[str, ...]:
        """The benchmarks, in display order."""
        return tuple(self.base)

    @cached_property
    def overall(self) -> tuple[str, ...]:
        """The benchmarks and, if there are several, the mean over them."""
        return (*self.benchmarks, *([OVERALL] if any(row.benchmark == OVERALL for row in self.summary) else []))

    @cached_property
    def k(self) -> Mapping[str, int]:
        """The k of pass@k per benchmark."""
        return {benchmark: found.k for benchmark, found in self.base.items()}

    def label(self, metric: str, benchmark: str) -> str:
        """The name of a metric in tables and figures."""
        if benchmark == OVERALL:
            labels = {self.label(metric, each) for each in self.benchmarks}
            return labels.pop() if len(labels) == 1 else metric
        scores = self.base[benchmark]
        names = {"avg_at_k": f"avg@{scores.samples or scores.k}", "pass_at_k": f"pass@{scores.k}"}
        return names.get(metric, metric)

    def mean(self, algorithm: str, benchmark: str, metric: str) -> float | None:
        """The mean of any metric over the seeds that have it; None if there is none."""
        own = [cell.metrics.get(benchmark) for cell in self.cells if cell.algorithm == algorithm]
        own = [self.base[benchmark]] if algorithm == BASE else own
        known = [v for found in own if found is not None and (v := found.value(metric)) is not None]
        return sum(known) / len(known) if known else None

    def row(self, algorithm: str, benchmark: str, metric: str) -> SummaryRow | None:
        """The summary of a metric; for the base model without one, its point value."""
        found = self._rows.get((algorithm, benchmark, metric))
        value = getattr(self.base[benchmark], metric) if algorithm == BASE and benchmark != OVERALL else None
        if found is None and value is not None:
            nan = float("nan")
            return SummaryRow(
                algorithm=BASE,
                benchmark=benchmark,
                metric=metric,
                mean=value,
                ci_low=nan,
                ci_high=nan,
                seeds=1,
            )
        return found

    @cached_property
    def _rows(self) -> dict[tuple[str, str, str], SummaryRow]:
        return {(row.algorithm, row.benchmark, row.metric): row for row in [*self.summary, *self.base_summary]}


@dataclass(frozen=True)
class FinishedRun:
    """The results and outcomes in the folder of a run."""

    results: Results
    outcomes: pa.Table
    variance: dict[str, Any] | None = None
    """The content of variance.json, if the folder has one of `rlzoo variance` for the same experiment."""

    @cached_property
    def matrices(self) -> dict[ResultKey, ResultMatrix]:
        """The results of every algorithm × benchmark × metric. Raises UserError as `result_matrices` does."""
        return result_matrices(self.outcomes, self.results.k)


def parse_results(data: Any, where: str = "results") -> Results:
    """The checked content of a results.json. Raises UserError naming the first wrong field."""
    try:
        return Results.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        told = f"{field} is missing" if first["type"] == "missing" else f"{field}: {first['msg']}"
        raise UserError(f"{where}: {told}; run `rlzoo compare` again to rewrite it") from None


def _cell(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(file)!r} cannot be read ({error}): save the study again") from None


def read_results(directory: Path) -> dict[str, Any]:
    """The content of a run's results.json, or a study's with its cells, unchecked. Raises UserError if it is broken."""
    if not directory.is_dir():
        raise UserError(f"run directory {str(directory)!r} does not exist: name one that `rlzoo compare` wrote")
    for name in (RESULTS, OUTCOMES):
        if not (directory / name).is_file():
            raise UserError(f"{str(directory)!r} has no {name}: name a directory that `rlzoo compare` wrote")
    file = directory / RESULTS
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{str(file)!r} is not valid JSON ({error}): run `rlzoo compare` again") from None
    if isinstance(data, dict) and (directory / CELLS).is_dir():
        data = {**data, "cells": [_cell(directory / CELLS / f"{name}.json") for name in data.get("cells", ())]}
    found: dict[str, Any] = data
    return found


def read_run(directory: Path) -> FinishedRun:
    """Read a run's folder, or a study's. Raises UserError for a missing or broken file."""
    data, file = read_results(directory), directory / OUTCOMES
    try:
        there = pq.read_schema(file).names
        wanted = [*OUTCOME_COLUMNS, *(column for column in RETENTION_COLUMNS if column in there)]
        outcomes = pq.read_table(file, columns=wanted)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{str(file)!r} cannot be read ({reason}): run `rlzoo compare` again") from None
    if missing := [column for column in OUTCOME_COLUMNS if column not in outcomes.column_names]:
        raise UserError(f"{str(file)!r} lacks the columns {', '.join(missing)}: run `rlzoo compare` again")
    return FinishedRun(parse_results(data, str(directory / RESULTS)), outcomes, _variance(directory))


def variance_file(directory: Path) -> Path | None:
    """The variance.json of a run, which `rlzoo variance --out RUN/variance` wrote, or that of a study."""
    files = (directory / "variance" / VARIANCE, directory / VARIANCE)
    return next((file for file in files if file.is_file()), None)


def _variance(directory: Path) -> dict[str, Any] | None:
    if (file := variance_file(directory)) is None:
        return None
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found["model"], found["created"], found["objectives"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{str(file)!r} was not written by rlzoo variance ({error}): remove it or run it again"
        ) from None
    return found
