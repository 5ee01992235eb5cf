"""Intervals and p-values of the mean of a matrix of results, seeds × problems, as pure functions.

S seeds, P problems. Results and intervals are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, special

SIGNIFICANT = 0.05
"""A difference is called distinguishable from zero if its corrected p-value is below this."""


class Interval(NamedTuple):
    """A mean and the ends of its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class _Spread:
    """The mean of a result matrix, its variance in two independent parts, and their degrees of freedom."""

    mean: float
    parts: Float[np.ndarray, " 2"]
    """The variance of the mean along the axis with fewer levels (usually seeds), including noise, and what the other
    axis adds."""
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
        """`reach` for an interval whose coverage is never too low. Source: Banerjee, Sankhyā 22, 1960."""
        quantiles = np.array([_student(tail, freedom) for freedom in self.freedom])
        return float(np.sqrt((quantiles**2 * self.parts).sum()))

    def detectable(self, level: float, power: float) -> float:
        """The true mean whose p-value is below ``level`` with probability ``power``: see `smallest_difference`."""
        if not self.parts.any():
            return 0.0
        tails = (np.arange(GRID) + 0.5) / GRID
        estimates = [part * special.chdtri(f, tails) / f for part, f in zip(self.parts, self.freedom, strict=True)]
        one, other = (_student(level / 2, f) ** 2 * own for f, own in zip(self.freedom, estimates, strict=True))
        reach = np.sqrt(np.add.outer(one, other))
        error = self.standard_error
        most = float(reach.max()) + 9 * error
        return float(optimize.brentq(lambda d: special.ndtr((d - reach) / error).mean() - power, 0, most))


def _student(tail: float, freedom: float) -> float:
    """The value that Student's t exceeds with probability ``tail``."""
    return -float(special.stdtrit(freedom, tail))


IGNORED, SLOPE, LEAST = 0.08, 0.7, 0.2
"""Chosen so that the coverage for normal effects, computed by quadrature, is between 93 and 97 % whatever their shares
of the variance, for two or more seeds and eight or more problems."""
GRID = 100
"""The number of quantiles of each estimated variance over which the power of a test is averaged."""
Benchmarks = Int[np.ndarray, " P"]
"""The number of each problem's benchmark."""
AGREE = 0.05
"""A mean square below this quantile of its distribution under noise alone is raised to the quantile: seeds that agree
better than that, as may happen in a small table, do so by chance."""


def crossed_interval(
    results: Float[np.ndarray, "S P"], level: float = 0.95, benchmarks: Benchmarks | None = None
) -> Interval:
    """The mean of a result matrix, with its interval over further seeds and problems of the same kind.

    In y_ij = μ + seed_i + problem_j + noise_ij the variance of the mean is σ²_s/S + σ²_p/P + σ²_n/(SP). The two-way
    table's mean squares between seeds, between problems and of the residuals have the expectations Pσ²_s + σ²_n,
    Sσ²_p + σ²_n and σ²_n, so with fewer seeds than problems it is estimated by (MS_s + max(MS_p - MS_n, 0))/(SP): the
    noise is attributed to the seeds, which are few, and where problems add nothing the interval is Student's over the
    seeds' means, whatever the seeds' share. (Testing first whether seeds differ would make coverage too low: with two
    or three seeds such a test rarely rejects.) The two parts have S-1 and P-1 degrees of freedom: the Behrens-Fisher
    problem. The quantile lies between Welch's and Cochran's (the mean of both parts' quantiles weighted by their
    shares), and the fewer seeds there are, the closer it is to Cochran's. With fewer problems than seeds, seeds and
    problems swap roles. With one seed the interval covers other problems only, with one problem other seeds only, and a
    single value has no width. Two seeds say little: Student's quantile is 12.7. experiments/benchmarks/coverage.py
    measures the coverage.

    With ``benchmarks``, the number of each problem's benchmark, the mean is that over benchmarks, with equal weights.
    Benchmarks are fixed; their problems are independent draws. Thus the seeds' variance is that of this mean, the
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

    Corrected p-values depend on the far tails, about which the calibration of `crossed_interval` at 95 % says nothing.
    Therefore this p-value is slightly larger than the level at which that interval ends at 0: a test with the mean of
    the squared quantiles of two independent variances, weighted by the variances, never rejects too often (Banerjee,
    Sankhyā 22, 1960). A single value, which has no interval, gives 1. Raises ValueError as `crossed_interval` does.
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


def smallest_difference(
    results: Float[np.ndarray, "S P"], seeds: int, problems: int, level: float = 0.05, power: float = 0.8
) -> float:
    """The smallest true difference that ``seeds`` × ``problems`` detect at ``level`` with probability ``power``.

    ``results`` [S, P] are paired differences of a pilot, whose variance components σ²_s, σ²_p and σ²_n (see
    `crossed_interval`) give the standard error √(σ²_s/S' + σ²_p/P' + σ²_n/(S'P')) of the larger design. Detected means
    that `p_value` is below the level: the mean, which is normal, must exceed that test's threshold, in which both
    variances are estimates, χ² with their degrees of freedom. The power is averaged over these. A pilot of few seeds
    knows σ²_s only roughly.

    Source: Cohen, Statistical power analysis for the behavioral sciences, 1988, chapter 2. Raises ValueError unless the
    pilot has two seeds and two problems, and the design too.
    """
    results = np.asarray(results, dtype=np.float64)
    if results.ndim != 2 or min(results.shape) < 2 or min(seeds, problems) < 2:
        raise ValueError(f"two seeds and two problems are needed, got {results.shape} and {(seeds, problems)}")
    s, p = results.shape
    within = _within(results)
    by_seed = p * np.square(results.mean(1) - results.mean()).sum() / (s - 1)
    of_seed, of_problem = max(by_seed - within.noise, 0.0) / p, max(within.problems - within.noise, 0.0) / s
    parts = of_seed / seeds + within.noise / (seeds * problems), of_problem / problems
    freedom = seeds - 1, problems - 1
    if seeds > problems:
        parts = of_problem / problems + within.noise / (seeds * problems), of_seed / seeds
        freedom = problems - 1, seeds - 1
    return _Spread(0.0, np.array(parts), freedom).detectable(level, power)


def detectable_difference(
    results: Float[np.ndarray, "S P"], level: float = 0.05, power: float = 0.8, benchmarks: Benchmarks | None = None
) -> float:
    """The smallest true difference that these seeds and problems detect: as `smallest_difference` for their own design.

    With one seed it is a difference over further problems alone, and infinite for a single value. Raises ValueError as
    `crossed_interval` does.
    """
    return _spread(results, benchmarks).detectable(level, power) if np.size(results) > 1 else float("inf")


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
