"""Statistics of a comparison: pass@k, intervals over seeds and problems, paired differences, as pure functions.

S seeds, P problems. Scores and intervals are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from scipy import optimize, stats

from rlzoo.errors import UserError, unknown
from rlzoo.estimators import pass_at_k

METRICS = ("avg_at_k", "greedy", "pass_at_k")
SIGNIFICANT = 0.05
"""A difference is called distinguishable from none where its corrected p-value is below this."""
BASE = "base"
"""The name under which outcomes carry the samples of the model that every cell started from."""


class Interval(NamedTuple):
    """A mean and its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class _Spread:
    """What is known of a score matrix's mean: its standard error, and the parts of its variance."""

    mean: float
    standard_error: float
    shares: tuple[float, ...]
    freedom: tuple[int, ...]
    """Degrees of freedom of each part, in the order of ``shares``."""

    def quantile(self, tail: float) -> float:
        """The value that the mean, in standard errors, exceeds with probability ``tail``."""
        return float(sum(s * stats.t.isf(tail, df) for s, df in zip(self.shares, self.freedom, strict=True)))


@dataclass(frozen=True)
class ScoreMatrix:
    """The score of one algorithm on one benchmark by one metric, for each seed and problem."""

    values: Float[np.ndarray, "S P"]
    seeds: tuple[int, ...]
    problems: tuple[str, ...]


ScoreKey = tuple[str, str, str]
"""algorithm, benchmark, metric"""


def crossed_interval(scores: Float[np.ndarray, "S P"], level: float = 0.95) -> Interval:
    """The mean of a score matrix and its interval over other seeds and other problems of the same kind.

    In y_ij = μ + seed_i + problem_j + noise_ij the variance of the mean is σ²_s/S + σ²_p/P + σ²_n/(SP). The mean
    squares of the two-way table estimate its parts, none below 0. The interval is the mean ± t standard errors; t is
    the mean of Student's quantiles with each part's degrees of freedom, weighed by its share of the variance (the
    noise goes with the larger of the other two): for three seeds that differ much it is near 4.3. One seed speaks of
    other problems alone, one problem of other seeds alone, one value of nothing. How often it covers the truth is
    what experiments/benchmarks/coverage.py counts.

    Sources: Searle, Casella, McCulloch, Variance components, 1992, chapter 4; Cochran, Biometrics 20, 1964, p. 191.
    Raises ValueError unless the matrix is 2-D, not empty and finite.
    """
    spread = _spread(scores)
    reach = spread.quantile((1 - level) / 2) * spread.standard_error if spread.standard_error else 0.0
    return Interval(spread.mean, spread.mean - reach, spread.mean + reach)


def p_value(scores: Float[np.ndarray, "S P"]) -> float:
    """The two-sided p-value of a mean of 0: the interval of `crossed_interval` at level 1 - p ends at 0.

    A single value, which has no interval, gives 1. Raises ValueError as `crossed_interval` does.
    """
    spread = _spread(scores)
    if spread.mean == 0 or np.size(scores) == 1:
        return 1.0
    if spread.standard_error == 0:
        return 0.0
    reach = abs(spread.mean) / spread.standard_error
    each = [float(stats.t.sf(reach, df)) for df in spread.freedom]
    if len(set(each)) == 1 or min(each) == 0:
        return 2 * max(each)
    low, high = (
        np.log(min(each)) - 1e-6,
        np.log(max(each)) + 1e-6,
    )  # a mean of quantiles lies between: so does its inverse
    return float(2 * np.exp(optimize.brentq(lambda tail: spread.quantile(np.exp(tail)) - reach, low, high)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, so that any true null hypothesis among them falls below α with probability
    at most α, whatever their dependence: the k-th smallest of m becomes max_{j ≤ k} (m - j + 1) p_(j), at most 1.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    found: list[float] = corrected.tolist()
    return found


def _spread(scores: Float[np.ndarray, "S P"]) -> _Spread:
    """The mean of a score matrix and the parts of its variance: see `crossed_interval`."""
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.size == 0 or not np.isfinite(scores).all():
        raise ValueError(f"crossed_interval needs a finite [seeds, problems] matrix, got shape {scores.shape}")
    (seeds, problems), mean = scores.shape, scores.mean()
    by_seed, by_problem = scores.mean(1) - mean, scores.mean(0) - mean
    noise_freedom = (seeds - 1) * (problems - 1)
    rest = scores - mean - by_seed[:, None] - by_problem
    noise = np.square(rest).sum() / max(noise_freedom, 1)
    seed = max(problems * np.square(by_seed).sum() / max(seeds - 1, 1) - noise, 0.0)
    problem = max(seeds * np.square(by_problem).sum() / max(problems - 1, 1) - noise, 0.0)
    freedom = (
        seeds - 1,
        problems - 1,
        noise_freedom if seed == problem == 0 else (seeds if seed > problem else problems) - 1,
    )
    total = seed + problem + noise
    parts = [(part / total, df) for part, df in zip((seed, problem, noise), freedom, strict=True) if part > 0]
    shares, known = tuple(share for share, _ in parts), tuple(df for _, df in parts)
    return _Spread(float(mean), float(np.sqrt(total / scores.size)), shares, known)


def paired_difference(
    a: Float[np.ndarray, "S P"],
    b: Float[np.ndarray, "S P"],
    level: float = 0.95,
) -> Interval:
    """The mean of a - b and its interval; what the two share by seed and problem cancels.

    Raises ValueError if the shapes differ: rows must be the same seeds and columns the same problems.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired_difference needs equal shapes, got {a.shape} and {b.shape}")
    return crossed_interval(a - b, level)


def score_matrices(outcomes: pa.Table, k: int | Mapping[str, int]) -> dict[ScoreKey, ScoreMatrix]:
    """The scores behind every algorithm × benchmark × metric of an outcomes table; k may differ by benchmark.

    avg_at_k is the share of a problem's samples that is correct, pass_at_k the estimate of `pass_at_k`,
    greedy 0 or 1. A metric with no rows (no greedy decoding, say) is left out. Raises UserError for a row
    recorded twice, a problem that a seed lacks, or k above the number of samples.
    """
    cells = ["algorithm", "benchmark", "decoding"]
    table = outcomes.group_by([*cells, "seed", "problem_id"]).aggregate(
        [("correct", "sum"), ("correct", "count"), ("sample", "count_distinct")]
    )
    column = {name: table[name].to_numpy() for name in table.column_names}
    if np.any(column["sample_count_distinct"] != column["correct_count"]):
        row = int(np.argmax(column["sample_count_distinct"] != column["correct_count"]))
        where = ", ".join(f"{name} {column[name][row]}" for name in [*cells, "seed", "problem_id"])
        raise UserError(f"outcomes hold a sample twice ({where}): keep one learning rate and one row per sample")
    matrices: dict[ScoreKey, ScoreMatrix] = {}
    for algorithm, benchmark, decoding in dict.fromkeys(zip(*(column[name] for name in cells), strict=True)):
        rows = np.logical_and.reduce(
            [column[n] == v for n, v in zip(cells, (algorithm, benchmark, decoding), strict=True)]
        )
        correct, n = (
            column["correct_sum"][rows].astype(np.int64),
            column["correct_count"][rows].astype(np.int64),
        )
        where = f"{algorithm!r} on {benchmark!r}"
        for metric, scores in _scores(decoding, correct, n, k if isinstance(k, int) else k[benchmark]):
            matrices[algorithm, benchmark, metric] = _pivot(
                scores, column["seed"][rows], column["problem_id"][rows], where
            )
    return matrices


def _scores(
    decoding: str, correct: Int[np.ndarray, " N"], n: Int[np.ndarray, " N"], k: int
) -> Iterator[tuple[str, Float[np.ndarray, " N"]]]:
    if decoding == "greedy":
        yield "greedy", correct / n
    else:
        yield "avg_at_k", correct / n
        yield "pass_at_k", pass_at_k(correct, n, k)


def _pivot(
    scores: Float[np.ndarray, " N"], seed: Int[np.ndarray, " N"], problem: np.ndarray, where: str
) -> ScoreMatrix:
    seeds, row = np.unique(seed, return_inverse=True)
    problems, column = np.unique(problem, return_inverse=True)
    values = np.full((len(seeds), len(problems)), np.nan)
    values[row, column] = scores
    if np.isnan(values).any():
        s, p = np.argwhere(np.isnan(values))[0]
        raise UserError(f"outcomes of {where}: seed {seeds[s]} lacks problem {problems[p]!r}; run that cell again")
    return ScoreMatrix(values, tuple(int(s) for s in seeds), tuple(str(p) for p in problems))


def summarise(outcomes: pa.Table, k: int | Mapping[str, int]) -> list[dict[str, Any]]:
    """Mean and 95 % interval of every algorithm (the base model among them, as "base") × benchmark × metric.

    Rows have the keys algorithm, benchmark, metric, mean, ci_low, ci_high and seeds, the number of seeds.
    """
    rows: list[dict[str, Any]] = []
    for (algorithm, benchmark, metric), matrix in _ordered(score_matrices(outcomes, k)):
        mean, low, high = crossed_interval(matrix.values)
        row = {"algorithm": algorithm, "benchmark": benchmark, "metric": metric}
        within = {"ci_low": max(low, 0.0), "ci_high": min(high, 1.0)}  # no score lies outside
        rows.append(row | {"mean": mean} | within | {"seeds": len(matrix.seeds)})
    return rows


def compare_to(outcomes: pa.Table, baseline: str, k: int | Mapping[str, int]) -> list[dict[str, Any]]:
    """Paired differences (algorithm - baseline) of every other algorithm × benchmark × metric.

    Rows have the keys algorithm, benchmark, metric, difference, ci_low, ci_high, p and seeds, the number of seeds that
    both have; a pair with no seed in common is left out. The interval speaks of one difference alone; p is corrected by
    `holm` for all differences on the benchmark. Raises UserError for an unknown baseline.
    """
    matrices = score_matrices(outcomes, k)
    names = dict.fromkeys(algorithm for algorithm, _, _ in matrices)
    if baseline not in names:
        raise unknown("baseline", baseline, names)
    rows: list[dict[str, Any]] = []
    for (algorithm, benchmark, metric), matrix in _ordered(matrices):
        other = matrices.get((baseline, benchmark, metric))
        pair = None if algorithm == baseline or other is None else align(matrix, other)
        if pair is None:
            continue
        difference, low, high = paired_difference(*pair)
        row: dict[str, Any] = {"algorithm": algorithm, "benchmark": benchmark, "metric": metric}
        row |= {"difference": difference, "ci_low": low, "ci_high": high}
        rows.append(row | {"p": p_value(pair[0] - pair[1]), "seeds": len(pair[0])})
    for benchmark in {row["benchmark"] for row in rows}:
        family = [row for row in rows if row["benchmark"] == benchmark]
        for row, corrected in zip(family, holm([row["p"] for row in family]), strict=True):
            row["p"] = corrected
    return rows


def compare_pairs(
    matrices: Mapping[ScoreKey, ScoreMatrix], benchmark: str, metric: str
) -> dict[tuple[str, str], float]:
    """The p-value of the paired difference of every two algorithms, corrected by `holm` for the number of pairs.

    The base model is none of them, and pairs with no seed in common are left out. Keys have both orders.
    """
    found = {a: m for (a, b, by), m in matrices.items() if (b, by) == (benchmark, metric) and a != BASE}
    aligned = {(a, b): align(found[a], found[b]) for a, b in combinations(found, 2)}
    p = {pair: p_value(both[0] - both[1]) for pair, both in aligned.items() if both is not None}
    corrected = dict(zip(p, holm(list(p.values())), strict=True))
    return corrected | {(b, a): value for (a, b), value in corrected.items()}


def align(a: ScoreMatrix, b: ScoreMatrix) -> tuple[Float[np.ndarray, "S P"], Float[np.ndarray, "S P"]] | None:
    """The values of both on the seeds and problems that they share, or None if they share none.

    The base model has one pseudo-seed, -1: its row stands beside every seed of the other.
    """
    seeds_a, seeds_b = list(a.seeds), list(b.seeds)
    if seeds_a == [-1] or seeds_b == [-1]:
        rows_a = np.zeros(len(seeds_b), int) if seeds_a == [-1] else np.arange(len(seeds_a))
        rows_b = np.zeros(len(seeds_a), int) if seeds_b == [-1] else np.arange(len(seeds_b))
    else:
        _, rows_a, rows_b = np.intersect1d(seeds_a, seeds_b, return_indices=True)
    _, columns_a, columns_b = np.intersect1d(a.problems, b.problems, return_indices=True)
    if not len(rows_a) or not len(columns_a):
        return None
    return a.values[np.ix_(rows_a, columns_a)], b.values[np.ix_(rows_b, columns_b)]


def _ordered(matrices: Mapping[ScoreKey, ScoreMatrix]) -> list[tuple[ScoreKey, ScoreMatrix]]:
    """By benchmark, then algorithm, each in order of appearance, then metric."""
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
