"""Statistics of a comparison: pass@k, intervals over seeds and problems, paired differences, as pure functions.

S seeds, P problems. Results and intervals are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from scipy import optimize, special

from rlzoo.config import BASE
from rlzoo.errors import UserError, unknown
from rlzoo.evaluation.metrics import pass_at_k

METRICS = ("avg_at_k", "greedy", "pass_at_k")
SIGNIFICANT = 0.05
"""A difference is called distinguishable from none if its corrected p-value is below this."""


class Interval(NamedTuple):
    """A mean and its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class _Spread:
    """The mean of a result matrix, its variance in two independent parts, and how well each is known."""

    mean: float
    parts: Float[np.ndarray, " 2"]
    """The variance of the mean along the axis with fewer levels (seeds, say), noise included, and what the other axis
    adds."""
    freedom: tuple[float, float]
    """Degrees of freedom of each part, the smaller first."""

    @property
    def standard_error(self) -> float:
        return float(np.sqrt(self.parts.sum()))

    def reach(self, tail: float) -> float:
        """The half-width of the interval that leaves out ``tail`` on each side: see `crossed_interval`."""
        if not self.parts.any():
            return 0.0
        few, many = self.freedom
        share = self.parts / self.parts.sum()
        one, other = _student(tail, few), _student(tail, many)
        cochran = other + (one - other) * (max(share[0] - IGNORED, 0) / (1 - IGNORED)) ** SLOPE
        welch = _student(tail, 1 / (share[0] ** 2 / few + share[1] ** 2 / many))
        weight = max(1 / few - 1 / many, LEAST)
        return float(weight * cochran + (1 - weight) * welch) * self.standard_error

    def safe_reach(self, tail: float) -> float:
        """The same for an interval whose coverage is never too low. Source: Banerjee, Sankhyā 22, 1960."""
        quantiles = np.array([_student(tail, freedom) for freedom in self.freedom])
        return float(np.sqrt((quantiles**2 * self.parts).sum()))


def _student(tail: float, freedom: float) -> float:
    """The value that Student's t exceeds with probability ``tail``."""
    return -float(special.stdtrit(freedom, tail))


IGNORED, SLOPE, LEAST = 0.08, 0.7, 0.2
"""Chosen so that the coverage for normal effects, computed by quadrature, is between 93 and 97 % whatever their shares
of the variance, for two or more seeds and eight or more problems."""
Benchmarks = Int[np.ndarray, " P"]
AGREE = 0.05
"""A mean square below this quantile of its distribution under noise alone is raised to it: seeds that agree better than
that, as they can in a small table, do so by chance."""


@dataclass(frozen=True)
class ResultMatrix:
    """The result of one algorithm on one benchmark by one metric, for each seed and problem."""

    values: Float[np.ndarray, "S P"]
    seeds: tuple[int, ...]
    problems: tuple[str, ...]
    benchmarks: Benchmarks | None = None
    """The number of each problem's benchmark, where there are several: see `crossed_interval`."""


ResultKey = tuple[str, str, str]
"""algorithm, benchmark (or `OVERALL`), metric"""
OVERALL = "mean over benchmarks"
"""The name under which the mean over benchmarks stands beside them."""


def crossed_interval(
    results: Float[np.ndarray, "S P"], level: float = 0.95, benchmarks: Benchmarks | None = None
) -> Interval:
    """The mean of a result matrix and its interval over further seeds and problems of the same kind.

    In y_ij = μ + seed_i + problem_j + noise_ij the variance of the mean is σ²_s/S + σ²_p/P + σ²_n/(SP). The two-way
    table's mean squares between seeds, between problems and of the residuals have the expectations Pσ²_s + σ²_n,
    Sσ²_p + σ²_n and σ²_n, so with fewer seeds than problems it is estimated by (MS_s + max(MS_p - MS_n, 0))/(SP): the
    noise is attributed to the seeds, which are few, and where problems add nothing the interval is Student's over the
    seeds' means, whatever the seeds' share. (To test first whether seeds differ would give too low a coverage: with two
    or three of them the test rarely rejects.) The two parts have S-1 and P-1 degrees of freedom: the Behrens-Fisher
    problem. The quantile lies between Welch's and Cochran's (the mean of both parts' quantiles weighted by their
    shares), the nearer to the latter the fewer seeds there are. With fewer problems than seeds, seeds and problems
    change places. With one seed the interval covers other problems only, with one problem other seeds only, and a
    single value has no width. Two seeds say little: Student's quantile is 12.7. experiments/benchmarks/coverage.py
    measures the coverage.

    With ``benchmarks``, the number of each problem's benchmark, the mean is that over benchmarks, with equal weights.
    Benchmarks are fixed; their problems are independent draws. So the seeds' variance is that of this mean, the
    problems' variance is taken within each benchmark, and its degrees of freedom are Satterthwaite's.

    Sources: Searle, Casella, McCulloch, Variance components, 1992, chapter 4; Welch, Biometrika 34, 1947; Cochran,
    Biometrics 20, 1964, p. 191; Satterthwaite, Biometrics Bulletin 2, 1946.
    Raises ValueError unless the matrix is 2-D, not empty and finite.
    """
    spread = _spread(results, benchmarks)
    reach = spread.reach((1 - level) / 2)
    return Interval(spread.mean, spread.mean - reach, spread.mean + reach)


def result_interval(
    results: Float[np.ndarray, "S P"], level: float = 0.95, benchmarks: Benchmarks | None = None
) -> Interval:
    """The interval of `crossed_interval` for results between 0 and 1, which never leaves that range.

    It contains the means μ with |ȳ - μ| ≤ t √(μ(1-μ)/n): the variance changes with the mean as a proportion's does,
    which matters near 0 and 1, and n = ȳ(1-ȳ)/SE² is the effective number of independent right-or-wrong answers. For
    one answer per problem by one seed, n is their number and t the normal quantile: the sum is then a binomial count,
    whose coverage oscillates between 92 and 98 % with the mean (Brown, Cai and DasGupta 2001). The same holds where
    results vary in no benchmark; n is then B² / Σ 1/P_b for B ``benchmarks``.

    Sources: Wilson, Journal of the American Statistical Association 22, 1927; with n from the standard error: Korn and
    Graubard, Survey Methodology 24, 1998. Raises ValueError as `crossed_interval` does.
    """
    spread, tail = _spread(results, benchmarks), (1 - level) / 2
    mean, error, (seeds, problems) = spread.mean, spread.standard_error, np.shape(results)
    sizes = np.array([problems]) if benchmarks is None else np.unique(benchmarks, return_counts=True)[1]
    counted = (seeds == 1 and len(sizes) == 1) or error == 0
    if problems > 1 and np.isin(results, (0, 1)).all() and counted:
        quantile, n = -float(special.ndtri(tail)), float(problems)
        if len(sizes) > 1:
            n = len(sizes) ** 2 / float((1 / sizes).sum())
    elif error > 0:
        quantile, n = spread.reach(tail) / error, mean * (1 - mean) / error**2
    else:
        return Interval(mean, mean, mean)
    add = quantile**2 / n
    centre = (mean + add / 2) / (1 + add)
    reach = float(np.sqrt(add * mean * (1 - mean) + add**2 / 4)) / (1 + add)
    return Interval(mean, max(centre - reach, 0.0), min(centre + reach, 1.0))


def p_value(results: Float[np.ndarray, "S P"], benchmarks: Benchmarks | None = None) -> float:
    """A two-sided p-value for a mean of 0: under the null hypothesis p ≤ α with probability at most α, for every α.

    Once corrected for their number, p-values are decided far out in the tails, where the calibration of
    `crossed_interval` at 95 % says nothing. So this one is a little larger than the level at which that interval ends
    at 0: a test with the mean of the squared quantiles of two independent variances, weighted by the variances, never
    rejects too often (Banerjee, Sankhyā 22, 1960). A single value, which has no interval, gives 1. Raises ValueError as
    `crossed_interval` does.
    """
    spread = _spread(results, benchmarks)
    if spread.mean == 0 or np.size(results) == 1:
        return 1.0
    if spread.standard_error == 0:
        return 0.0
    distance = abs(spread.mean)
    each = 2 * special.stdtr(spread.freedom, -distance / spread.standard_error)
    if each.min() == 0 or spread.parts.min() == 0:
        return float(each.max() if each.min() == 0 else each[spread.parts.argmax()])
    low, high = np.log(each.min()) - 1e-3, min(np.log(each.max()) + 1e-3, 0.0)  # the weighted mean lies between the two
    return float(np.exp(optimize.brentq(lambda p: spread.safe_reach(np.exp(p) / 2) - distance, low, high)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's method.

    The k-th smallest of m becomes max_{j ≤ k} (m - j + 1) p_(j), at most 1. The probability that any true null
    hypothesis gets a value of at most α is at most α, whatever the dependence.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    found: list[float] = corrected.tolist()
    return found


def _spread(results: Float[np.ndarray, "S P"], benchmarks: Benchmarks | None = None) -> _Spread:
    """The mean of a result matrix and the parts of its variance: see `crossed_interval`."""
    results = np.asarray(results, dtype=np.float64)
    if results.ndim != 2 or results.size == 0 or not np.isfinite(results).all():
        raise ValueError(f"crossed_interval needs a finite [seeds, problems] matrix, got shape {results.shape}")
    seeds, problems = results.shape
    blocks = [results]
    if benchmarks is not None and len(names := np.unique(benchmarks)) > 1:
        blocks = [results[:, benchmarks == name] for name in names]
        # so that the mean of all values is that over benchmarks
        blocks = [block * (problems / (len(blocks) * block.shape[1])) for block in blocks]
        results = np.concatenate(blocks, axis=1)
    mean = results.mean()
    within = [_within(block) for block in blocks]
    shares = [block.shape[1] / problems for block in blocks]
    squares = [share * one.problems for share, one in zip(shares, within, strict=True)]
    by_seed, by_problem = problems * np.square(results.mean(1) - mean).sum() / max(seeds - 1, 1), sum(squares)
    freedom = seeds - 1, _joint_freedom(squares, [block.shape[1] - 1 for block in blocks])
    few, many = (0, 1) if 0 < freedom[0] <= freedom[1] or freedom[1] == 0 else (1, 0)
    known, found = (max(freedom[few], 1), max(freedom[many], 1)), (by_seed, by_problem)
    if not min(freedom):
        parts, known = (found[few], 0.0), (known[0], known[0])
    else:
        noise = sum(share * one.noise for share, one in zip(shares, within, strict=True))
        least = special.gammaincinv(freedom[few] / 2, AGREE) * 2 / freedom[few] * noise
        parts = max(found[few], least), max(found[many] - noise, 0.0)
    return _Spread(float(mean), np.array(parts) / results.size, known)


class _Within(NamedTuple):
    """Mean squares of one benchmark: between problems, and of the residuals. 0 where there is no degree of freedom."""

    problems: float
    noise: float


def _within(results: Float[np.ndarray, "S P"]) -> _Within:
    (seeds, problems), mean = results.shape, results.mean()
    by_seed, by_problem = results.mean(1) - mean, results.mean(0) - mean
    rest = results - mean - by_seed[:, None] - by_problem
    freedom = (seeds - 1) * (problems - 1)
    return _Within(
        seeds * np.square(by_problem).sum() / max(problems - 1, 1), np.square(rest).sum() / freedom if freedom else 0.0
    )


def _joint_freedom(variances: Sequence[float], freedom: Sequence[int]) -> float:
    """The degrees of freedom of a sum of independent estimates of variances (Satterthwaite)."""
    if len(freedom) == 1:
        return freedom[0]
    known = [(one**2, degrees) for one, degrees in zip(variances, freedom, strict=True) if degrees]
    spread = sum(square / degrees for square, degrees in known)
    return sum(variances) ** 2 / spread if spread else sum(freedom)


def paired_difference(
    a: Float[np.ndarray, "S P"],
    b: Float[np.ndarray, "S P"],
    level: float = 0.95,
) -> Interval:
    """The mean of a - b and its interval; effects of seeds and problems that both share cancel.

    Raises ValueError if the shapes differ: rows must be the same seeds, and columns the same problems.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired_difference needs equal shapes, got {a.shape} and {b.shape}")
    return crossed_interval(a - b, level)


def result_matrices(outcomes: pa.Table, k: int | Mapping[str, int]) -> dict[ResultKey, ResultMatrix]:
    """The results behind every algorithm × benchmark × metric of an outcomes table; k may differ by benchmark.

    With several benchmarks, `OVERALL` is one too. avg_at_k is the fraction of a problem's samples that is correct,
    pass_at_k the estimate of `pass_at_k`, greedy 0 or 1. A metric without rows (no greedy decoding, say) is left out.
    Raises UserError for a row recorded twice, a problem that a seed lacks, or k above the number of samples.
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
            matrices[algorithm, benchmark, metric] = _pivot(
                results, column["seed"][rows], column["problem_id"][rows], where
            )
    return matrices | _overall(matrices)


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


def _pivot(
    results: Float[np.ndarray, " N"], seed: Int[np.ndarray, " N"], problem: np.ndarray, where: str
) -> ResultMatrix:
    seeds, row = np.unique(seed, return_inverse=True)
    problems, column = np.unique(problem, return_inverse=True)
    values = np.full((len(seeds), len(problems)), np.nan)
    values[row, column] = results
    if np.isnan(values).any():
        s, p = np.argwhere(np.isnan(values))[0]
        raise UserError(f"outcomes of {where}: seed {seeds[s]} lacks problem {problems[p]!r}; run that cell again")
    return ResultMatrix(values, tuple(int(s) for s in seeds), tuple(str(p) for p in problems))


def summarise(outcomes: pa.Table, k: int | Mapping[str, int]) -> list[dict[str, Any]]:
    """Mean and 95 % interval of every algorithm (the base model among them, as "base") × benchmark × metric, those of
    the mean over several benchmarks (as `OVERALL`) last.

    Rows have the keys algorithm, benchmark, metric, mean, ci_low, ci_high and seeds, the number of seeds.
    """
    rows: list[dict[str, Any]] = []
    for (algorithm, benchmark, metric), matrix in _ordered(result_matrices(outcomes, k)):
        mean, low, high = result_interval(matrix.values, benchmarks=matrix.benchmarks)
        row = {"algorithm": algorithm, "benchmark": benchmark, "metric": metric, "mean": mean}
        rows.append(row | {"ci_low": low, "ci_high": high, "seeds": len(matrix.seeds)})
    return rows


def compare_to(outcomes: pa.Table, baseline: str, k: int | Mapping[str, int]) -> list[dict[str, Any]]:
    """Paired differences (algorithm - baseline) of every other algorithm × benchmark (or `OVERALL`) × metric.

    Rows have the keys algorithm, benchmark, metric, difference, ci_low, ci_high, p and seeds, the number of seeds that
    both have; a pair with no seed in common is left out. The interval is that of one difference; p is corrected by
    `holm` for all differences on the benchmark. Raises UserError for an unknown baseline.
    """
    matrices = result_matrices(outcomes, k)
    names = dict.fromkeys(algorithm for algorithm, _, _ in matrices)
    if baseline not in names:
        raise unknown("baseline", baseline, names)
    rows: list[dict[str, Any]] = []
    for (algorithm, benchmark, metric), matrix in _ordered(matrices):
        other = matrices.get((baseline, benchmark, metric))
        difference = None if algorithm == baseline or other is None else difference_of(matrix, other)
        if difference is None:
            continue
        mean, low, high = crossed_interval(difference.values, benchmarks=difference.benchmarks)
        row: dict[str, Any] = {"algorithm": algorithm, "benchmark": benchmark, "metric": metric}
        row |= {"difference": mean, "ci_low": low, "ci_high": high}
        rows.append(row | {"p": p_value(difference.values, difference.benchmarks), "seeds": len(difference.seeds)})
    for benchmark in {row["benchmark"] for row in rows}:
        table = [row for row in rows if row["benchmark"] == benchmark]
        for row, corrected in zip(table, holm([row["p"] for row in table]), strict=True):
            row["p"] = corrected
    return rows


def compare_pairs(
    matrices: Mapping[ResultKey, ResultMatrix], benchmark: str, metric: str
) -> dict[tuple[str, str], float]:
    """The p-value of the paired difference of each pair of algorithms, corrected by `holm` for the number of pairs.

    The base model and pairs with no seed in common are left out. Each pair is there under both orders of its names.
    """
    found = {a: m for (a, b, by), m in matrices.items() if (b, by) == (benchmark, metric) and a != BASE}
    all_of = {(a, b): difference_of(found[a], found[b]) for a, b in combinations(found, 2)}
    p = {pair: p_value(one.values, one.benchmarks) for pair, one in all_of.items() if one is not None}
    corrected = dict(zip(p, holm(list(p.values())), strict=True))
    return corrected | {(b, a): value for (a, b), value in corrected.items()}


def difference_of(a: ResultMatrix, b: ResultMatrix) -> ResultMatrix | None:
    """a - b on their common seeds and problems; None if there are none.

    The base model has one pseudo-seed, -1: its row is repeated for every seed of the other.
    """
    seeds_a, seeds_b = list(a.seeds), list(b.seeds)
    if seeds_a == [-1] or seeds_b == [-1]:
        rows_a = np.zeros(len(seeds_b), int) if seeds_a == [-1] else np.arange(len(seeds_a))
        rows_b = np.zeros(len(seeds_a), int) if seeds_b == [-1] else np.arange(len(seeds_b))
    else:
        _, rows_a, rows_b = np.intersect1d(seeds_a, seeds_b, return_indices=True)
    problems, columns_a, columns_b = np.intersect1d(a.problems, b.problems, return_indices=True)
    if not len(rows_a) or not len(columns_a):
        return None
    values = a.values[np.ix_(rows_a, columns_a)] - b.values[np.ix_(rows_b, columns_b)]
    seeds = [seeds_b[row] for row in rows_b] if seeds_a == [-1] else [seeds_a[row] for row in rows_a]
    benchmarks = None if a.benchmarks is None else a.benchmarks[columns_a]
    return ResultMatrix(values, tuple(seeds), tuple(map(str, problems)), benchmarks)


def _ordered(matrices: Mapping[ResultKey, ResultMatrix]) -> list[tuple[ResultKey, ResultMatrix]]:
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
