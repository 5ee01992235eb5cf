"""Estimates with 95 % intervals, and the tests that intervals invert, as pure functions.

An interval holds every value that a two-sided test at 5 % does not reject. A statistic is compared with a normal
distribution after its skewness is taken into account, by `normal_score` where its variance comes from the hypothesis
and by `hall` where it comes from the same sample, and after its quantile is widened by Student's for a variance that
is estimated (`student`, `freedom`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import special, stats

Estimate = dict[str, Any]
"""``value``, ``ci_low``, ``ci_high``; None where there is none, and then a ``reason``."""
NORMAL = float(stats.norm.ppf(0.975))


def estimated(value: float | None, low: float | None, high: float | None) -> Estimate:
    """A value with its interval; an end that is infinite is None."""
    ends = zip(("value", "ci_low", "ci_high"), (value, low, high), strict=True)
    return {key: None if v is None or math.isinf(v) else float(v) for key, v in ends}


def exactly(value: float) -> Estimate:
    """A value without uncertainty."""
    return estimated(value, value, value)


def nothing(reason: str) -> Estimate:
    """No value, and why."""
    return {**estimated(None, None, None), "reason": reason}


def student(freedom: float) -> float:
    """The 97.5 % quantile of Student's distribution, with at least two degrees of freedom."""
    return -float(special.stdtrit(max(freedom, 2), 0.025))


def freedom(terms: Float[np.ndarray, " P"]) -> float:
    """Degrees of freedom of the sample variance of P terms: 2(P-1)/(κ-1), at most P-1, κ being their kurtosis.

    Source: Satterthwaite 1946, doi 10.2307/3002019.
    """
    squares = np.square(terms - terms.mean())
    power = float(squares.mean())
    kurtosis = float(np.square(squares).mean()) / power**2 if power > 0 else 3.0
    return (len(terms) - 1) * min(1.0, 2 / max(kurtosis - 1, 1e-9))


def normal_score(x: float, skew: float) -> float:
    """The normal quantile at the probability that a standardised variable of this skewness is below x.

    Its distribution is taken to be a shifted gamma distribution with the same three moments, which is close for a
    quadratic form of normal variables. Source: Imhof 1961, doi 10.1093/biomet/48.3-4.419, section 4.
    """
    if abs(skew) < 1e-3:
        return x
    if skew < 0:
        return -normal_score(-x, -skew)
    shape = 4 / skew**2
    at = max(shape + x * shape**0.5, 0.0)
    below = float(special.gammainc(shape, at))
    return float(special.ndtri(below) if below < 0.5 else -special.ndtri(special.gammaincc(shape, at)))


def standard_error(terms: Float[np.ndarray, " P"]) -> float:
    """The standard error of a sum of independent terms, after subtracting their mean."""
    return float(np.sqrt(np.square(terms).sum() * len(terms) / (len(terms) - 1)))


def skewness(terms: Float[np.ndarray, " P"], size: float) -> float:
    """The third cumulant of the sum of terms over its standard error cubed."""
    return float(np.clip((terms**3).sum() / size**3, -3, 3)) if size else 0.0


def hall(x: float, skew: float) -> float:
    """The normal score of Student's ratio, of a sum of this skewness. Source: Hall 1992, see `inverse_hall`."""
    return x + skew / 3 * x**2 + skew**2 / 27 * x**3 + skew / 6


def inverse_hall(y: float, skew: float) -> float:
    """The ratio whose `hall` is y. Source: Hall 1992, doi 10.1111/j.2517-6161.1992.tb01872.x."""
    return y if abs(skew) < 1e-6 else 3 / skew * float(np.cbrt(1 + skew * (y - skew / 6)) - 1)


def end_of(accepts: Callable[[float], bool], start: float, step: float) -> float:
    """Where a set that contains ``start`` ends, in the direction of ``step``; infinite if it does not end there."""
    inside, outside = start, start + step
    for _ in range(60):
        if step == 0 or not accepts(outside):
            break
        inside, outside = outside, start + 2 * (outside - start)
    else:
        return math.copysign(math.inf, step)
    for _ in range(30):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if accepts(middle) else (inside, middle)
    return inside


def rank_correlation(a: Float[np.ndarray, " U"], b: Float[np.ndarray, " U"]) -> Estimate:
    """Spearman's ρ with its 95 % interval through Fisher's z, with variance (1 + ρ²/2)/(U - 3).

    Source: Bonett and Wright 2000, doi 10.1007/BF02294183. No value for fewer than 5 units or a constant side.
    """
    if len(a) < 5:
        return nothing("fewer than 5 units")
    if np.ptp(a) <= 1e-9 * abs(a).max() or np.ptp(b) <= 1e-9 * abs(b).max():
        return nothing("one of the two is the same for all units")
    rho = float(np.clip(stats.spearmanr(a, b).statistic, -1, 1))
    if abs(rho) > 1 - 1e-12:
        return exactly(rho)
    reach = NORMAL * np.sqrt((1 + rho**2 / 2) / (len(a) - 3))
    low, high = np.tanh(np.arctanh(rho) + np.array([-reach, reach]))
    return estimated(rho, low, high)
