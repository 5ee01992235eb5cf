"""Results, intervals and paired differences of a comparison, computed from its table of outcomes by pure functions.

S seeds, P problems. Results and intervals are fractions in [0, 1].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from rlzoo.comparison.robust import iqm_interval, probability_of_improvement, sign_flip_p
from rlzoo.comparison.statistics import (
    SIGNIFICANT,
    Benchmarks,
    crossed_interval,
    detectable_difference,
    holm,
    p_value,
    result_interval,
)
from rlzoo.config import BASE
from rlzoo.errors import UserError, unknown
from rlzoo.evaluation.metrics import pass_at_k

SCHEMA = pa.schema(
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
        ("logged", pa.string()),
        ("components", pa.string()),
        ("answer", pa.string()),
        ("gold_logp", pa.float64()),
        ("gold_tokens", pa.int64()),
        ("retention", pa.bool_()),
        ("base_text_logp", pa.float64()),
        ("base_text_tokens", pa.int64()),
        ("reference", pa.string()),
    ]
)
"""The columns of outcomes.parquet."""
METRICS = ("avg_at_k", "greedy", "pass_at_k")
"""The metrics that have intervals and paired differences."""
ResultKey = tuple[str, str, str]
"""Algorithm, benchmark (or `OVERALL`), metric."""
BASE_SEEDS = (-1,)
"""The seeds of the base model: one pseudo-seed."""
OVERALL = "mean over benchmarks"
"""The name of the mean over benchmarks, where a benchmark is expected."""
BASE_TEXT = "base text"
"""The decoding of outcomes with the log-probs of the base model's text: see `rlzoo.comparison.retention`."""


@dataclass(frozen=True)
class ResultMatrix:
    """The result of one algorithm on one benchmark by one metric, for each seed and problem."""

    values: Float[np.ndarray, "S P"]
    """Fractions in [0, 1]."""
    seeds: tuple[int, ...]
    """The seed of each row."""
    problems: tuple[str, ...]
    """The problem of each column."""
    benchmarks: Benchmarks | None = None
    """The number of each problem's benchmark, where there are several: see `crossed_interval`."""

    @property
    def weights(self) -> Float[np.ndarray, " P"]:
        """The weight of each problem in the mean, in which all benchmarks have equal weights; their mean is 1."""
        if self.benchmarks is None:
            return np.ones(len(self.problems))
        _, number, sizes = np.unique(self.benchmarks, return_inverse=True, return_counts=True)
        weights: Float[np.ndarray, " P"] = len(self.problems) / (len(sizes) * sizes[number])
        return weights

    @property
    def by_benchmark(self) -> Float[np.ndarray, "S B"]:
        """The mean of each seed on each benchmark."""
        if self.benchmarks is None:
            return np.asarray(self.values.mean(1, keepdims=True))
        own = [self.values[:, self.benchmarks == name].mean(1) for name in np.unique(self.benchmarks)]
        means: Float[np.ndarray, "S B"] = np.stack(own, 1)
        return means

    def on(self, problems: Sequence[str]) -> ResultMatrix:
        """The results on some of the problems."""
        kept = np.isin(self.problems, problems)
        benchmarks = None if self.benchmarks is None else self.benchmarks[kept]
        names = tuple(name for name, keep in zip(self.problems, kept, strict=True) if keep)
        return ResultMatrix(self.values[:, kept], self.seeds, names, benchmarks)


def result_matrices(outcomes: pa.Table, k: int | Mapping[str, int]) -> dict[ResultKey, ResultMatrix]:
    """The results of every algorithm × benchmark × metric in a table of outcomes; k may differ by benchmark.

    If there are several benchmarks, `OVERALL` is added as another; retention sets are left out. avg_at_k is the
    fraction of a problem's samples that are correct, pass_at_k the estimate of `pass_at_k`, greedy 0 or 1. A metric
    without rows (for example, without greedy decoding) is left out. Raises UserError for a sample recorded twice, a
    problem that is missing for a seed, and k above the number of samples.
    """
    matrices = matrices_of(benchmark_rows(outcomes), k)
    return matrices | _overall(matrices)


def benchmark_rows(outcomes: pa.Table) -> pa.Table:
    """The outcomes on benchmarks."""
    return outcomes.filter(pc.invert(_of_retention(outcomes)))


def retention_rows(outcomes: pa.Table) -> pa.Table:
    """The outcomes on retention sets."""
    return outcomes.filter(_of_retention(outcomes))


def _of_retention(outcomes: pa.Table) -> Any:
    """Whether each row is of a retention set; older tables have none."""
    if "retention" not in outcomes.column_names:
        return pa.array(np.zeros(len(outcomes), bool))
    return pc.fill_null(outcomes["retention"], False)


def matrices_of(outcomes: pa.Table, k: int | Mapping[str, int]) -> dict[ResultKey, ResultMatrix]:
    """`result_matrices` of all rows, whatever their problem set, and without `OVERALL`."""
    cells = ["algorithm", "benchmark", "decoding"]
    grouped = outcomes.group_by([*cells, "seed", "problem_id"], use_threads=False)  # threads change the order of rows
    table = grouped.aggregate([("correct", "sum"), ("correct", "count"), ("sample", "count_distinct")])
    column = {name: table[name].to_numpy() for name in table.column_names}
    if np.any(column["sample_count_distinct"] != column["correct_count"]):
        row = int(np.argmax(column["sample_count_distinct"] != column["correct_count"]))
        where = ", ".join(f"{name} {column[name][row]}" for name in [*cells, "seed", "problem_id"])
        raise UserError(f"outcomes hold a sample twice ({where}): keep one learning rate and one row per sample")
    matrices: dict[ResultKey, ResultMatrix] = {}
    for algorithm, benchmark, decoding in dict.fromkeys(zip(*(column[name] for name in cells), strict=True)):
        rows = np.logical_and.reduce(
            [column[n] == v for n, v in zip(cells, (algorithm, benchmark, decoding), strict=True)]
        )
        correct, n = (
            column["correct_sum"][rows].astype(np.int64),
            column["correct_count"][rows].astype(np.int64),
        )
        where = f"{algorithm!r} on {benchmark!r}"
        for metric, results in _results(decoding, correct, n, k if isinstance(k, int) else k[benchmark]):
            matrices[algorithm, benchmark, metric] = pivot(
                results, column["seed"][rows], column["problem_id"][rows], where
            )
    return matrices


def _overall(matrices: Mapping[ResultKey, ResultMatrix]) -> dict[ResultKey, ResultMatrix]:
    """The results on all benchmarks together, by common seeds, of each algorithm × metric with results on each."""
    benchmarks = list(dict.fromkeys(benchmark for _, benchmark, _ in matrices))
    found: dict[ResultKey, ResultMatrix] = {}
    for algorithm, metric in dict.fromkeys((algorithm, metric) for algorithm, _, metric in matrices):
        own = [matrices.get((algorithm, benchmark, metric)) for benchmark in benchmarks]
        each = [one for one in own if one is not None]
        seeds = tuple(seed for seed in each[0].seeds if all(seed in one.seeds for one in each))
        if len(benchmarks) > 1 and len(each) == len(benchmarks) and seeds:
            found[algorithm, OVERALL, metric] = ResultMatrix(
                np.concatenate([one.values[[one.seeds.index(seed) for seed in seeds]] for one in each], axis=1),
                seeds,
                tuple(f"{name}/{p}" for name, one in zip(benchmarks, each, strict=True) for p in one.problems),
                np.repeat(np.arange(len(each)), [len(one.problems) for one in each]),
            )
    return found


def _results(
    decoding: str, correct: Int[np.ndarray, " N"], n: Int[np.ndarray, " N"], k: int
) -> Iterator[tuple[str, Float[np.ndarray, " N"]]]:
    if decoding == "greedy":
        yield "greedy", correct / n
    else:
        yield "avg_at_k", correct / n
        yield "pass_at_k", pass_at_k(correct, n, k)


def pivot(
    results: Float[np.ndarray, " N"], seed: Int[np.ndarray, " N"], problem: np.ndarray, where: str
) -> ResultMatrix:
    """Results as a matrix of seeds × problems. Raises UserError, naming ``where``, for a seed that lacks a problem."""
    seeds, row = np.unique(seed, return_inverse=True)
    problems, column = np.unique(problem, return_inverse=True)
    values = np.full((len(seeds), len(problems)), np.nan)
    values[row, column] = results
    if np.isnan(values).any():
        s, p = np.argwhere(np.isnan(values))[0]
        raise UserError(f"outcomes of {where}: seed {seeds[s]} lacks problem {problems[p]!r}; run that cell again")
    return ResultMatrix(values, tuple(int(s) for s in seeds), tuple(str(p) for p in problems))


def summarise(outcomes: pa.Table, k: int | Mapping[str, int]) -> list[dict[str, Any]]:
    """The mean and 95 % interval of every algorithm × benchmark × metric, as fractions; the base model is ``base``.

    With several benchmarks, the mean over them (`OVERALL`) comes last. Rows have the keys algorithm, benchmark, metric,
    mean, ci_low, ci_high and seeds, the number of seeds. Raises UserError as `result_matrices` does.
    """
    rows: list[dict[str, Any]] = []
    for (algorithm, benchmark, metric), matrix in ordered(result_matrices(outcomes, k)):
        mean, low, high = result_interval(matrix.values, benchmarks=matrix.benchmarks)
        row = {"algorithm": algorithm, "benchmark": benchmark, "metric": metric, "mean": mean}
        rows.append(row | {"ci_low": low, "ci_high": high, "seeds": len(matrix.seeds)})
    return rows


def compare_to(outcomes: pa.Table, baseline: str, k: int | Mapping[str, int]) -> list[dict[str, Any]]:
    """Paired differences (algorithm - baseline) of every other algorithm × benchmark (or `OVERALL`) × metric.

    Rows have the keys algorithm, benchmark, metric, difference, ci_low, ci_high, p, detectable, detectable_alone,
    problems and seeds, the number of seeds in common; a pair without any is left out. The interval is that of a single
    difference; p is corrected by `holm` for all differences on the benchmark. ``detectable`` is the smallest true
    difference that is detected with a power of 80 % after this correction, ``detectable_alone`` without it. Raises
    UserError for an unknown baseline, and as `result_matrices` does.
    """
    matrices = result_matrices(outcomes, k)
    _known(baseline, matrices)
    rows: list[dict[str, Any]] = []
    found: list[ResultMatrix] = []
    for (algorithm, benchmark, metric), matrix in ordered(matrices):
        other = matrices.get((baseline, benchmark, metric))
        difference = None if algorithm == baseline or other is None else difference_of(matrix, other)
        if difference is None:
            continue
        row: dict[str, Any] = {"algorithm": algorithm, "benchmark": benchmark, "metric": metric}
        rows.append(row | tested(difference))
        found.append(difference)
    number = Counter(row["benchmark"] for row in rows)
    for row, one in zip(rows, found, strict=True):
        level = SIGNIFICANT / number[row["benchmark"]]
        row["detectable"] = detectable_difference(one.values, level, benchmarks=one.benchmarks)
    _correct(rows, "p")
    return rows


def tested(difference: ResultMatrix) -> dict[str, Any]:
    """Mean, interval, uncorrected p-value and smallest detectable size of a paired difference: see `compare_to`."""
    mean, low, high = crossed_interval(difference.values, benchmarks=difference.benchmarks)
    return {
        "difference": mean,
        "ci_low": low,
        "ci_high": high,
        "p": p_value(difference.values, difference.benchmarks),
        "detectable_alone": detectable_difference(difference.values, benchmarks=difference.benchmarks),
        "seeds": len(difference.seeds),
        "problems": len(difference.problems),
    }


def check_robustness(outcomes: pa.Table, baseline: str, k: int | Mapping[str, int]) -> list[dict[str, Any]]:
    """What assumes less than `compare_to`, of every algorithm × benchmark (or `OVERALL`) × metric.

    Rows have the keys algorithm, benchmark, metric, iqm, iqm_low, iqm_high (`iqm_interval`); better, better_low and
    better_high, the probability that a run is better than one of the baseline (`probability_of_improvement`);
    p_problems and p_seeds, the p-values of `sign_flip_p` for flips of problems and of seeds, each corrected by `holm`
    for all on the benchmark; and seeds, the number in common with the baseline. An interval that would mislead has NaN
    ends. The baseline's own rows, and those without common seeds, have an IQM alone. Raises UserError as `compare_to`
    does.
    """
    matrices = result_matrices(outcomes, k)
    _known(baseline, matrices)
    rows: list[dict[str, Any]] = []
    for (algorithm, benchmark, metric), matrix in ordered(matrices):
        iqm, low, high = iqm_interval(matrix.by_benchmark)
        row: dict[str, Any] = {"algorithm": algorithm, "benchmark": benchmark, "metric": metric}
        row |= {"iqm": iqm, "iqm_low": low, "iqm_high": high}
        other = matrices.get((baseline, benchmark, metric))
        rows.append(row | (flipped(matrix, other) if algorithm != baseline and other is not None else {}))
    _correct(rows, "p_problems")
    _correct(rows, "p_seeds")
    return rows


def flipped(a: ResultMatrix, b: ResultMatrix) -> dict[str, Any]:
    """The uncorrected permutation tests of a - b and the probability that a is better: see `check_robustness`."""
    difference = difference_of(a, b)
    if difference is None:
        return {}
    weighted = difference.values * difference.weights
    one, other = (matrix.on(difference.problems).by_benchmark for matrix in (a, b))
    better, low, high = probability_of_improvement(one, other, fixed=BASE_SEEDS in (a.seeds, b.seeds))
    return {
        "p_problems": sign_flip_p(weighted.mean(0)),
        "p_seeds": sign_flip_p(weighted.mean(1)),
        "better": better,
        "better_low": low,
        "better_high": high,
        "seeds": len(difference.seeds),
    }


def _known(baseline: str, matrices: Mapping[ResultKey, ResultMatrix]) -> None:
    names = dict.fromkeys(algorithm for algorithm, _, _ in matrices)
    if baseline not in names:
        raise unknown("baseline", baseline, names)


def _correct(rows: Sequence[dict[str, Any]], key: str) -> None:
    """Correct the p-values under a key by `holm`, for all rows of a benchmark that have one."""
    for benchmark in {row["benchmark"] for row in rows}:
        table = [row for row in rows if row["benchmark"] == benchmark and key in row]
        for row, corrected in zip(table, holm([row[key] for row in table]), strict=True):
            row[key] = corrected


def compare_pairs(
    matrices: Mapping[ResultKey, ResultMatrix], benchmark: str, metric: str
) -> dict[tuple[str, str], float]:
    """The p-value of the paired difference of each pair of algorithms, corrected by `holm` for the number of pairs.

    The base model and pairs without common seeds are left out. Each pair has an entry for both orders of its names.
    """
    found = {a: m for (a, b, by), m in matrices.items() if (b, by) == (benchmark, metric) and a != BASE}
    all_of = {(a, b): difference_of(found[a], found[b]) for a, b in combinations(found, 2)}
    p = {pair: p_value(one.values, one.benchmarks) for pair, one in all_of.items() if one is not None}
    corrected = dict(zip(p, holm(list(p.values())), strict=True))
    return corrected | {(b, a): value for (a, b), value in corrected.items()}


def difference_of(a: ResultMatrix, b: ResultMatrix) -> ResultMatrix | None:
    """a - b on their common seeds and problems; None if there are none.

    The base model has a single pseudo-seed, -1: its row is repeated for every seed of the other matrix.
    """
    if BASE_SEEDS in (a.seeds, b.seeds):
        rows_a = np.zeros(len(b.seeds), int) if a.seeds == BASE_SEEDS else np.arange(len(a.seeds))
        rows_b = np.zeros(len(a.seeds), int) if b.seeds == BASE_SEEDS else np.arange(len(b.seeds))
    else:
        _, rows_a, rows_b = np.intersect1d(a.seeds, b.seeds, return_indices=True)
    problems, columns_a, columns_b = np.intersect1d(a.problems, b.problems, return_indices=True)
    if not len(rows_a) or not len(columns_a):
        return None
    values = a.values[np.ix_(rows_a, columns_a)] - b.values[np.ix_(rows_b, columns_b)]
    seeds = [b.seeds[row] for row in rows_b] if a.seeds == BASE_SEEDS else [a.seeds[row] for row in rows_a]
    benchmarks = None if a.benchmarks is None else a.benchmarks[columns_a]
    return ResultMatrix(values, tuple(seeds), tuple(map(str, problems)), benchmarks)


def ordered(matrices: Mapping[ResultKey, ResultMatrix]) -> list[tuple[ResultKey, ResultMatrix]]:
    """Sorted by benchmark, then algorithm, both in order of appearance, then metric."""
    algorithms = list(dict.fromkeys(algorithm for algorithm, _, _ in matrices))
    benchmarks = list(dict.fromkeys(benchmark for _, benchmark, _ in matrices))
    return sorted(
        matrices.items(),
        key=lambda item: (
            benchmarks.index(item[0][1]),
            algorithms.index(item[0][0]),
            METRICS.index(item[0][2]),
        ),
    )
