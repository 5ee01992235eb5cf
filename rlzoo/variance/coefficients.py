"""Statistics of coefficients or weights: spread, tail, and effective sample size. Pure functions."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from scipy import stats

Statistics = dict[str, float | None]


def coefficient_statistics(c: Float[np.ndarray, " N"]) -> Statistics:
    """Statistics of N coefficients; None where one does not exist.

    - ``mean``; ``cv``: standard deviation / |mean|;
    - ``max_over_mean``: max |c| / mean |c|;
    - ``kurtosis``: Pearson's, 3 for a normal distribution;
    - ``hill``: the tail index of |c|, see `hill`; small means a heavy tail;
    - ``ess_fraction``: (Σ|c|)² / (N Σc²), the effective sample size over N: 1 where all are equal.
    """
    c = np.asarray(c, np.float64)
    size = np.abs(c)
    peak = size.max(initial=0.0)
    if peak == 0:
        return {"mean": 0.0, "cv": None, "max_over_mean": None, "kurtosis": None, "hill": None, "ess_fraction": None}
    mean, spread = float(c.mean()), float(c.std())
    constant = spread <= 1e-5 * peak  # rounding in float32
    return {
        "mean": mean,
        "cv": 0.0 if constant else None if abs(mean) <= 1e-6 * peak else spread / abs(mean),
        "max_over_mean": float(peak / size.mean()),
        "kurtosis": None if constant else float(stats.kurtosis(c, fisher=False)),
        "hill": hill(size),
        "ess_fraction": ess_fraction(size),
    }


def ess_fraction(weight: Float[np.ndarray, " N"]) -> float:
    """(Σw)² / (N Σw²) of non-negative weights that are not all 0. Source: Kong 1992."""
    scaled = weight / weight.max()  # squares of weights near the ends of float64 would overflow
    return float(scaled.sum() ** 2 / (len(scaled) * np.square(scaled).sum()))


def hill(size: Float[np.ndarray, " N"]) -> float | None:
    """Hill's estimate of the tail index α in P(X > x) ~ x^-α, from the ⌊√N⌋ largest of N.

    1 / mean log(X_(i) / X_(k+1)); the variance is infinite for α < 2, the mean for α < 1. None for N < 100, and if the
    largest values agree to one part in a thousand, so that there is no tail.
    Source: Hill 1975, doi 10.1214/aos/1176343247.
    """
    if len(size) < 100:
        return None
    k = math.isqrt(len(size))
    top = np.sort(size)[-k - 1 :]
    if top[0] <= 0:
        return None
    excess = float(np.log(top[1:] / top[0]).mean())
    return None if excess <= 1e-3 else 1 / excess
