"""The noise of a gradient over new prompts: unbiased estimators with 95 % intervals, as pure functions.

Prompts are independent draws; all rows of a prompt that an objective learns from make one gradient g_p, because rows
that share a prompt are not independent. With g_1 … g_P and their mean ḡ, and g'_p of another objective,

    tr Σ ≈ P/(P-1) · (mean ‖g_p‖² - ‖ḡ‖²),    ‖G‖² ≈ ‖ḡ‖² - tr Σ/P,    ⟨G, G'⟩ ≈ mean of ⟨g_p, g'_q⟩ over p ≠ q

are unbiased for the trace of a prompt's covariance, the squared norm of the expected gradient (arXiv 1812.06162,
appendix A.1) and the inner product of two; where both objectives look at the same prompts the last one is
(P ⟨ḡ, ḡ'⟩ - mean ⟨g_p, g'_p⟩)/(P-1). Ratios of these are not unbiased: the noise scale tr Σ/‖G‖², the cosine
⟨G, G'⟩/√(‖G‖² ‖G'‖²) and the norm ratio √(‖G‖²/‖G'‖²) are estimated by the ratios of unbiased estimates. Where a test
at 5 % does not reject that a ‖G‖² is 0, the noise hides that gradient: then it has no cosine and no norm ratio, and its
noise scale has only a lower bound.

Intervals invert tests (`rlzoo.variance.intervals`): they hold every value that a test does not reject, with the
estimates' covariance (`rlzoo.variance.spread`) taken at that value, so they may have no upper end. Values come from
exact sums, except ⟨g_p, g'_p⟩ of one prompt (`within`); intervals take inner products between prompts from random
projections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize

from rlzoo.variance.intervals import (
    NORMAL,
    Estimate,
    end_of,
    estimated,
    exactly,
    freedom,
    hall,
    inverse_hall,
    normal_score,
    nothing,
    skewness,
    standard_error,
    student,
)
from rlzoo.variance.spread import Joint, Side, centred, joint, row_means

FEWEST = 3
"""The smallest number of prompts for an interval."""
TOO_FEW = f"fewer than {FEWEST} prompts"
HIDDEN = "noise hides the gradient: use more rows"
HIDDEN_OTHER = "noise hides the gradient that it is compared with: use more rows"
NO_GRADIENT = "a gradient is 0"


@dataclass(frozen=True)
class Units:
    """One objective's gradient per prompt, of the whole model or of one layer."""

    squared_norm: Float[np.ndarray, " P"]
    sketch: Float[np.ndarray, "P D"]
    mean_squared_norm: float
    """‖ḡ‖², exact."""
    prompt: Int[np.ndarray, " P"]
    """The number of each prompt, the same for all objectives."""

    def __len__(self) -> int:
        return len(self.squared_norm)

    @property
    def trace_cov(self) -> float:
        """tr Σ."""
        return trace_cov(len(self), float(self.squared_norm.mean()), self.mean_squared_norm)

    @property
    def grad_norm_sq(self) -> float:
        """‖G‖²; it may come out negative."""
        return gradient_squared_norm(len(self), float(self.squared_norm.mean()), self.mean_squared_norm)

    @cached_property
    def side(self) -> Side:
        """What the covariance of the estimates is computed from."""
        products, apart = self.sketch @ self.sketch.T, ~np.eye(len(self), dtype=bool)
        return Side(centred(products, apart), row_means(products, apart), self.grad_norm_sq, self.trace_cov)


def trace_cov(prompts: int, power: float, mean_squared_norm: float) -> float:
    """tr Σ from mean ‖g_p‖² and ‖ḡ‖²."""
    return prompts / (prompts - 1) * (power - mean_squared_norm)


def gradient_squared_norm(prompts: int, power: float, mean_squared_norm: float) -> float:
    """‖G‖² from mean ‖g_p‖² and ‖ḡ‖²; it may come out negative."""
    return (prompts * mean_squared_norm - power) / (prompts - 1)


def inner_product(first: int, other: int, common: int, of_means: float, within: float) -> float:
    """⟨G, G'⟩ from ⟨ḡ, ḡ'⟩ over ``first`` and ``other`` prompts, and the sum of ⟨g_p, g'_p⟩ over the common ones."""
    return (first * other * of_means - within) / (first * other - common)


def within(first: Units, other: Units) -> float:
    """The sum of ⟨g_p, g'_p⟩ over common prompts: cosines from random projections, norms exact.

    With the norms known, the error is that of the cosine alone, (1 - cos²)/√D relative to ‖g_p‖ ‖g'_p‖: none for
    gradients that are proportional, and small beside the sampling error of ⟨ḡ, ḡ'⟩ for all.
    """
    _, a, b = np.intersect1d(first.prompt, other.prompt, assume_unique=True, return_indices=True)
    return within_by_prompt(first.squared_norm[a], other.squared_norm[b], first.sketch[a], other.sketch[b])


def within_by_prompt(
    first: Float[np.ndarray, " O"],
    other: Float[np.ndarray, " O"],
    first_sketch: Float[np.ndarray, "O D"],
    other_sketch: Float[np.ndarray, "O D"],
) -> float:
    """Σ_p ‖g_p‖ ‖g'_p‖ cos_p, with squared norms given and the cosine that of the projections."""
    products = np.einsum("pd,pd->p", first_sketch, other_sketch)
    size = np.linalg.norm(first_sketch, axis=1) * np.linalg.norm(other_sketch, axis=1)
    cosine = np.divide(products, size, out=np.zeros_like(size), where=size > 0)
    return float((cosine.astype(float) * np.sqrt(first * other)).sum())


def data_noise(units: Units) -> dict[str, Estimate]:
    """grad_norm_sq, trace_cov, noise_scale = tr Σ/‖G‖² (in prompts), and snr = ‖G‖²/tr Σ."""
    if len(units) < FEWEST:
        return {name: nothing(TOO_FEW) for name in ("grad_norm_sq", "trace_cov", "noise_scale", "snr")}
    side, norm, of_trace = units.side, units.grad_norm_sq, Trace.of(units)
    step = side.uncertain + abs(norm) / 9
    ends = (end_of(lambda x: side_allows(side, x), norm, way * step) for way in (-1, 1))
    found = {"grad_norm_sq": estimated(norm, *ends), "trace_cov": of_trace.estimate()}
    found["snr"] = _snr(side, of_trace)
    found["noise_scale"] = _inverse(found["snr"])
    return found


def against(units: Units, other: Units, of_means: float, same_prompts: float | None = None) -> dict[str, Estimate]:
    """Cosine and norm ratio of an objective's expected gradient to another's.

    ``of_means`` is ⟨ḡ, ḡ'⟩, exact; ``same_prompts`` is the sum that `within` gives, computed here if it is None. Where
    noise hides one of the two gradients there is neither value nor interval. An estimated cosine beyond ±1 is clipped
    to ±1. Two gradients that are proportional on every prompt have their cosine and ratio exactly, however noisy.
    """
    names = ("cosine", "norm_ratio")
    if units.mean_squared_norm == 0 or other.mean_squared_norm == 0:
        return {name: nothing(NO_GRADIENT) for name in names}
    if (factor := _proportional(units, other, of_means)) is not None:
        return {"cosine": exactly(float(np.sign(factor))), "norm_ratio": exactly(abs(factor))}
    if min(len(units), len(other)) < FEWEST:
        return {name: nothing(TOO_FEW) for name in names}
    first, second = units.side, other.side
    for side, reason in ((first, HIDDEN), (second, HIDDEN_OTHER)):
        if is_hidden(side):
            return {name: nothing(reason) for name in names}
    apart = units.prompt[:, None] != other.prompt[None]
    _, a, b = np.intersect1d(units.prompt, other.prompt, assume_unique=True, return_indices=True)
    t = max(student(side.freedom) for side in (first, second))
    shared = within(units, other) if same_prompts is None else same_prompts
    inner = inner_product(len(units), len(other), len(a), of_means, shared)
    covariance = joint(first, second, units.sketch @ other.sketch.T, apart, a, b, inner)
    norms = (first.grad_norm_sq, second.grad_norm_sq)
    ratio = _ratio(norms, covariance, (first.trace_cov, second.trace_cov), t)
    return {"cosine": _cosine(norms, inner, covariance, t), "norm_ratio": ratio}


def turned(cosine: Estimate) -> Estimate:
    """The cosine of `against` with the two objectives swapped."""
    other = {HIDDEN: HIDDEN_OTHER, HIDDEN_OTHER: HIDDEN}
    return cosine | {key: other.get(cosine[key], cosine[key]) for key in cosine.keys() & {"reason"}}


def side_allows(side: Side, size: float, trace: Trace | None = None, share: float = 0.0) -> bool:
    """Whether a test at 5 % does not reject that ‖G‖² is ``size``; or ``share`` · tr Σ, estimated by that size."""
    first, second, third = float(side.first(max(size, 0.0))), side.second, float(side.third(max(size, 0.0)))
    variance, skew = first + second, 0.0
    # the second-order part is a sum over all pairs of prompts, and its variance as much better known
    uncertain = first**2 / side.freedom + second**2 / math.comb(side.count, 2)
    if trace is not None:
        own = share * trace.error
        variance += own**2 - 2 * own * math.sqrt(first) * trace.correlation
        uncertain += own**4 / trace.freedom
        skew = -trace.skew * own**3
    variance = max(variance, (1e-12 * side.grad_norm_sq) ** 2, 1e-180)  # equal gradients have only rounding
    ratio = (side.grad_norm_sq - size) / variance**0.5
    widened = NORMAL / student(variance**2 / max(uncertain, 1e-300))
    return abs(hall(normal_score(ratio * widened, third / variance**1.5), skew / variance**1.5)) <= NORMAL


def is_hidden(side: Side) -> bool:
    """Whether noise hides the gradient: ‖G‖² = 0 is not rejected at 5 %."""
    return side.grad_norm_sq <= 0 or side_allows(side, 0.0)


def _proportional(units: Units, other: Units, of_means: float) -> float | None:
    """k where g_p = k g'_p for all prompts, up to rounding."""
    if not np.array_equal(units.prompt, other.prompt):
        return None
    size = float(np.sqrt(units.mean_squared_norm * other.mean_squared_norm))
    factor = float(np.sign(of_means) * np.sqrt(units.mean_squared_norm / other.mean_squared_norm))
    alike = abs(of_means) >= (1 - 1e-9) * size and np.allclose(
        units.squared_norm, factor**2 * other.squared_norm, rtol=1e-5, atol=1e-9 * units.squared_norm.max()
    )
    return (
        factor
        if alike and np.allclose(units.sketch, factor * other.sketch, rtol=1e-3, atol=1e-4 * np.abs(units.sketch).max())
        else None
    )


@dataclass(frozen=True)
class Trace:
    """The estimate of tr Σ, a mean of squared norms whose few large ones skew Student's ratio."""

    value: float
    error: float
    """The standard error of the estimate."""
    skew: float
    freedom: float
    correlation: float
    """The correlation with the first-order part of ‖G‖²."""

    @classmethod
    def of(cls, units: Units) -> Trace:
        """The estimate, with its error from the sample variance of ‖g_p - G‖²."""
        along = units.side.along
        terms = (units.squared_norm - 2 * along) / len(units)
        terms = terms - terms.mean()
        error, sizes = standard_error(terms), float(np.linalg.norm(along) * np.linalg.norm(terms))
        correlation = float(along @ terms) / sizes if sizes else 0.0
        return cls(units.trace_cov, error, skewness(terms, error), freedom(terms), correlation)

    def estimate(self) -> Estimate:
        """The estimate with its interval, by `inverse_hall`."""
        if self.error <= 1e-9 * abs(self.value):
            return exactly(self.value)
        size = self.error * student(self.freedom) / NORMAL
        low, high = (self.value - size * inverse_hall(end, self.skew) for end in (NORMAL, -NORMAL))
        return estimated(self.value, max(low, 0.0), high)


def _snr(side: Side, trace: Trace) -> Estimate:
    """‖G‖²/tr Σ: the values x for which ‖G‖² - x tr Σ may be 0."""
    if trace.value <= 0:
        return nothing("its noise is 0")
    value = side.grad_norm_sq / trace.value
    step = side.uncertain / trace.value + abs(value) / 9
    ends = (end_of(lambda x: side_allows(side, x * trace.value, trace, x), value, way * step) for way in (-1, 1))
    return estimated(value, *ends)


def _inverse(snr: Estimate) -> Estimate:
    """The noise scale with the inverse of the signal's interval: its lower bound alone where that reaches 0, and not
    even this if the signal's has no upper end."""
    if snr["value"] is None:
        return dict(snr)
    low, high = snr["ci_low"], snr["ci_high"]
    if low is None or low <= 0:
        return {**estimated(None, 1 / high if high is not None and high > 0 else None, None), "reason": HIDDEN}
    return estimated(1 / snr["value"], 0.0 if high is None else 1 / high, 1 / low)


def _ratio(norms: tuple[float, float], covariance: Joint, scales: tuple[float, float], t: float) -> Estimate:
    """√(‖G‖²/‖G'‖²): the values whose square x may have ‖G‖² - x ‖G'‖² = 0. Source: Fieller 1954."""
    one, two = norms
    middle = scales[0] / scales[1] if min(scales) > 0 else 1.0
    at = np.sort(np.append(middle * np.logspace(-8, 8, 321), one / two))
    # what the two have in common under a hypothesis is weighted by variances at their own estimates, but at no more
    # than noise alone would give: else one that came out too large gets too little weight, and both seem shorter
    certain = np.sqrt(np.diag(covariance.second)[:2])
    own = covariance.at(*np.minimum(norms, certain)[:, None])
    first, second = np.maximum(np.diag(own[:2, :2, 0]), _floor(norms))

    def score(x: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """The squared statistic less its limit."""
        weights = x * x / first + 1 / second
        common = np.maximum((x * one / first + two / second) / weights, 0)
        uncertain = (certain[0] ** 2 / first + certain[1] ** 2 / second) / weights
        common = common**3 / np.maximum(common**2 + uncertain, 1e-300)  # where it may be noise, rather none
        v = covariance.at(x * common, common)
        variance = v[0, 0] - 2 * x * v[0, 1] + x * x * v[1, 1]
        found: Float[np.ndarray, " N"] = (one - x * two) ** 2 - t * t * np.maximum(variance, 0)
        return found

    inside = np.flatnonzero(score(at) <= 1e-12 * one * one)
    low, high = inside[0], inside[-1]

    def cross(a: float, b: float) -> float:
        return float(np.sqrt(optimize.brentq(lambda x: float(score(np.array([x]))[0]) or 1e-300, a, b, rtol=1e-6)))

    def end(x: int, beyond: int) -> float:
        inner, outer = score(at[[x, beyond]])
        return float(np.sqrt(at[x])) if inner >= 0 or outer <= 0 else cross(at[x], at[beyond])

    bottom = 0.0 if low == 0 else end(low, low - 1)
    return estimated(float(np.sqrt(one / two)), bottom, None if high == len(at) - 1 else end(high, high + 1))


def _cosine(norms: tuple[float, float], inner: float, covariance: Joint, t: float) -> Estimate:
    """⟨G, G'⟩/√(‖G‖² ‖G'‖²): the values x for which some ‖G‖² and ‖G'‖² explain all three estimates.

    For a pair (a, b) at Mahalanobis distance q² ≤ t² of the two estimates, ⟨G, G'⟩ lies within √(t² - q²) conditional
    standard deviations of its regression on them; the interval is the range of that over √(ab).
    """
    here = covariance.at(*np.array(norms)[:, None])[:2, :2, 0]
    ridge = 1e-10 * np.maximum(np.diag(here), _floor(norms))
    tried = np.array(norms)[:, None] + np.linalg.cholesky(here + np.diag(ridge)) @ (2.5 * t * DISC)
    tried = tried[:, (tried > 0).all(0)]
    v = covariance.at(*tried)
    one, two, both = v[0, 0] + ridge[0], v[1, 1] + ridge[1], v[0, 1]
    off = np.array(norms)[:, None] - tried
    scale = one * two - both**2
    distance = (two * off[0] ** 2 - 2 * both * off[0] * off[1] + one * off[1] ** 2) / scale
    slope = np.array([two * v[0, 2] - both * v[1, 2], one * v[1, 2] - both * v[0, 2]]) / scale
    rest = v[2, 2] - (slope * v[:2, 2]).sum(0)
    kept = distance <= t * t
    expected, size = inner - (slope * off).sum(0), np.sqrt(tried.prod(0))
    reach = np.sqrt(np.maximum(rest, 0) * np.maximum(t * t - distance, 0))
    low, high = ((expected - reach) / size)[kept].min(), ((expected + reach) / size)[kept].max()
    value = inner / np.sqrt(norms[0] * norms[1])
    return estimated(*(float(np.clip(x, -1, 1)) for x in (value, low, high)))


def _floor(norms: tuple[float, float]) -> Float[np.ndarray, " 2"]:
    """The least variance of estimates of ‖G‖² to reckon with, where all gradients are the same up to rounding."""
    return 1e-18 * np.square(norms) + 1e-280


def _disc(rings: int, spokes: int) -> Float[np.ndarray, "2 N"]:
    """Points of the unit disc."""
    angle, radius = np.meshgrid(np.linspace(0, 2 * np.pi, spokes, endpoint=False), np.linspace(0, 1, rings))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)]).reshape(2, -1)


DISC = _disc(41, 64)
