"""Checks of a comparison that assume less than intervals of means do, as pure functions.

S seeds, B benchmarks, N units. Results are fractions in [0, 1].
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import optimize, special

from rlzoo.comparison.statistics import Interval

FLIPS = 10_000
"""The number of random sign-flips where there are too many to try all."""
ENUMERATED = 13
"""The most units of which every combination of sign-flips is tried."""
RESAMPLES = 2000
FEWEST_FOR_BOOTSTRAP = 10
"""Seeds. With fewer a bootstrap interval covers the true value too rarely: with 3 in 75 % of cases, with 5 in 90 %."""
FEWEST_FOR_IMPROVEMENT = 3
"""Seeds of each algorithm. With two, nearly every probability is in the interval."""


def sign_flip_p(differences: Float[np.ndarray, " N"]) -> float:
    """The two-sided p-value of a paired permutation test of the mean of N units' differences.

    If the two algorithms are exchangeable within a unit, swapping them changes the sign of its difference. p is the
    share of all 2^N combinations of signs (of `FLIPS` random ones and the observed one for more than `ENUMERATED`
    units) whose mean is at least as far from 0 as the observed mean, so it is never below 2/2^N. What a unit is decides
    what is tested:

    - A **problem**, with its difference averaged over seeds: do these very models differ on further problems of the
      same kind? A small p says nothing about models trained with further seeds.
    - A **seed**, with its difference averaged over problems: do models trained with further seeds differ on these
      problems? With three seeds there are eight combinations, and p is at least 0.25.

    Sources: Fisher, The design of experiments, 1935, §21; Phipson and Smyth, Statistical Applications in Genetics and
    Molecular Biology 9, 2010 (counting the observed one). Raises ValueError without finite differences.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if differences.ndim != 1 or not len(differences) or not np.isfinite(differences).all():
        raise ValueError(f"sign_flip_p needs finite differences [units], got shape {differences.shape}")
    known = differences[differences != 0]  # the sign of 0 does not matter
    if not len(known):
        return 1.0
    threshold = abs(known.sum()) - 1e-9 * np.abs(known).sum()  # equal sums may differ in rounding
    if len(known) <= ENUMERATED:
        bits = np.arange(2 ** len(known))[:, None] >> np.arange(len(known)) & 1
        return float(np.mean(np.abs((1 - 2 * bits) @ known) >= threshold))
    rng, extreme, left = np.random.default_rng(0), 0, FLIPS
    while left:
        rows = min(left, max(1, 2**22 // len(known)))  # at most 32 MiB at a time
        drawn = np.unpackbits(rng.integers(256, size=(rows, -(-len(known) // 8)), dtype=np.uint8), axis=1)
        sums = known.sum() - 2 * drawn[:, : len(known)].astype(np.float32) @ known.astype(np.float32)
        extreme += int((np.abs(sums) >= threshold - 1e-6 * np.abs(known).sum()).sum())
        left -= rows
    return (1 + extreme) / (1 + FLIPS)


def interquartile_mean(results: Float[np.ndarray, "*any N"]) -> Float[np.ndarray, " *any"]:
    """The mean of the middle half of N results, along the last axis.

    A value that is only partly in the middle half counts in part: of three, the outer two count a quarter each, which
    differs from rliable's truncation to whole values (that of three is the plain mean). One run that collapsed hardly
    moves it, but it says nothing about how often runs collapse. Source: Agarwal et al., arXiv 2108.13264.
    """
    count = np.shape(results)[-1]
    edges = np.clip(np.arange(count + 1) / count, 0.25, 0.75)
    found: Float[np.ndarray, " *any"] = np.sort(results, axis=-1) @ (2 * np.diff(edges))
    return found


def iqm_interval(
    results: Float[np.ndarray, "S B"], level: float = 0.95, fewest: int = FEWEST_FOR_BOOTSTRAP
) -> Interval:
    """The interquartile mean of all seeds' results on all benchmarks, with a bootstrap interval over further seeds.

    Percentiles of `RESAMPLES` samples of seeds with replacement. A resampled seed keeps its results on all benchmarks,
    as one model gave them (rliable, whose runs belong to one task each, resamples each task alone). Benchmarks and
    problems are fixed. Below ``fewest`` seeds the ends are NaN, because the bootstrap takes few seeds for all there
    are: experiments/benchmarks/coverage.py measures its coverage.

    Source: Agarwal et al., arXiv 2108.13264.
    """
    seeds = len(results)
    mean = float(interquartile_mean(np.ravel(results)))
    if seeds < fewest:
        return Interval(mean, float("nan"), float("nan"))
    drawn = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))
    means = interquartile_mean(np.asarray(results)[drawn].reshape(RESAMPLES, -1))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high))


def probability_of_improvement(
    one: Float[np.ndarray, "S B"], other: Float[np.ndarray, "Z B"], fixed: bool = False, level: float = 0.95
) -> Interval:
    """P(X > Y): how probable it is that one run of an algorithm has a better result than one of another.

    The share of all S × Z pairs of runs in which the first is better, ties counting half (Mann and Whitney's U), and
    the mean of these shares over benchmarks. It says nothing about the size of the improvement. The interval is for
    further seeds on these problems. It contains the P with (P̂ - P)² ≤ z² V(P), where V is the variance of P̂ for
    exponential results; where all pairs agree it is not empty, as a bootstrap's would be. ``fixed``: the one with a
    single row is no run, but fixed, such as the base model, so that every seed is one trial (Wilson's interval). Below
    `FEWEST_FOR_IMPROVEMENT` seeds the ends are NaN.

    Sources: Agarwal et al., arXiv 2108.13264; Newcombe, Statistics in Medicine 25, 2006, p. 559 (method 5).
    """
    a, b = np.round(one, 12)[:, None], np.round(other, 12)[None]  # equal means may differ in rounding
    share = float(((a > b) + 0.5 * (a == b)).mean())
    m, n = len(one), len(other)
    if (max(m, n) if fixed else min(m, n)) < FEWEST_FOR_IMPROVEMENT:
        return Interval(share, float("nan"), float("nan"))
    z, k = -float(special.ndtri((1 - level) / 2)), (m + n) / 2 - 1

    def excess(p: float) -> float:
        variance = p * (1 - p) / max(m, n)
        if not fixed:
            variance *= (1 + k * (1 - p) / (2 - p) + k * p / (1 + p)) / min(m, n)
        return float((share - p) ** 2 - z**2 * variance)

    tiny = 1e-9
    low = optimize.brentq(excess, 0, share - tiny) if share > tiny else 0.0
    high = optimize.brentq(excess, share + tiny, 1) if share < 1 - tiny else 1.0
    return Interval(share, float(low), float(high))
