"""The noise of a gradient over new prompts: unbiased estimators with 95 % intervals, as pure functions.

Prompts are drawn independently; all rows of a prompt that an objective learns from make one gradient g_p, as what they
share is no independent evidence. With g_1 … g_P and their mean ḡ, and g'_p of another objective,

    tr Σ ≈ P/(P-1) · (mean ‖g_p‖² - ‖ḡ‖²),    ‖G‖² ≈ ‖ḡ‖² - tr Σ/P,    ⟨G, G'⟩ ≈ mean of ⟨g_p, g'_q⟩ over p ≠ q

are unbiased for the trace of a prompt's covariance, the squared norm of the expected gradient (arXiv 1812.06162,
appendix A.1) and the inner product of two; where both objectives look at the same prompts the last one is
(P ⟨ḡ, ḡ'⟩ - mean ⟨g_p, g'_p⟩)/(P-1). Ratios of these are not unbiased: the noise scale tr Σ/‖G‖², the cosine
⟨G, G'⟩/√(‖G‖² ‖G'‖²) and the norm ratio √(‖G‖²/‖G'‖²) are estimated by the ratios of unbiased estimates. Where the
estimate of a ‖G‖² that is divided by is not positive, the noise hides the gradient and there is no number.

Intervals invert tests: they hold every value that the estimates do not reject, with the estimates' covariance
(`rlzoo.variance.spread`) taken at that value. So they exist, perhaps without an end, however weak the gradient is.
Where they need inner products between prompts these come from random projections; values come from exact sums, but for
⟨g_p, g'_p⟩ of one prompt (`within`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, special, stats

from rlzoo.variance.spread import Joint, Side, centred, joint, row_means

Estimate = dict[str, Any]
"""``value``, ``ci_low``, ``ci_high``; None where there is none, and then a ``reason``."""

FEWEST = 3
"""Prompts that an interval needs."""
TOO_FEW = f"fewer than {FEWEST} prompts"
HIDDEN = "the noise hides the gradient: take more rows"
HIDDEN_OTHER = "the noise hides the gradient that it is compared with: take more rows"
NO_GRADIENT = "a gradient is 0"


@dataclass(frozen=True)
class Units:
    """One objective's gradients by prompt, of the whole model or of one layer."""

    squared_norm: Float[np.ndarray, " P"]
    sketch: Float[np.ndarray, "P D"]
    mean_squared_norm: float
    """‖ḡ‖², exact."""
    prompt: Int[np.ndarray, " P"]
    """Which prompt each is, the same number in all objectives."""

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
        """What the covariance of the estimates needs."""
        products, apart = self.sketch @ self.sketch.T, ~np.eye(len(self), dtype=bool)
        return Side(centred(products, apart), row_means(products, apart), self.grad_norm_sq, self.trace_cov)


def trace_cov(prompts: int, power: float, mean_squared_norm: float) -> float:
    """tr Σ from mean ‖g_p‖² and ‖ḡ‖²."""
    return prompts / (prompts - 1) * (power - mean_squared_norm)


def gradient_squared_norm(prompts: int, power: float, mean_squared_norm: float) -> float:
    """‖G‖² from mean ‖g_p‖² and ‖ḡ‖²; it may come out negative."""
    return (prompts * mean_squared_norm - power) / (prompts - 1)


def inner_product(first: int, other: int, common: int, of_means: float, within: float) -> float:
    """⟨G, G'⟩ from ⟨ḡ, ḡ'⟩ of so many prompts each, and from the sum of ⟨g_p, g'_p⟩ over those that both have."""
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
    side, t = units.side, _quantile(units.side.along)
    norm, trace = units.grad_norm_sq, units.trace_cov
    second, lever = side.second, side.lever
    # (‖G‖² - x)² = t² (second + 4 λ x), and without the first-order part below 0
    half = norm + 2 * t * t * lever
    root = half**2 - norm**2 + t * t * second
    low, high = norm - t * np.sqrt(second), norm + t * np.sqrt(second)
    if root >= 0 and half + np.sqrt(root) >= 0:
        high = half + np.sqrt(root)
    if root >= 0 and half - np.sqrt(root) >= 0:
        low = half - np.sqrt(root)
    found = {"grad_norm_sq": _estimate(norm, low, high)}
    spread = (units.squared_norm - 2 * side.along) / len(units)
    spread = spread - spread.mean()
    found["trace_cov"] = _trace(trace, spread, _quantile(spread))
    of_ratio = 2 * side.along / len(units) - norm / max(trace, 1e-300) * spread
    found["snr"] = _snr(norm, trace, side, spread, _quantile(of_ratio))
    found["noise_scale"] = _inverse(found["snr"])
    return found


def against(units: Units, other: Units, of_means: float, same_prompts: float | None = None) -> dict[str, Estimate]:
    """Cosine and norm ratio of an objective's expected gradient to another's.

    ``of_means`` is ⟨ḡ, ḡ'⟩, exact; ``same_prompts`` the sum that `within` estimates if it is not given. An estimate of
    a cosine beyond ±1 is cut to that. Two gradients that are proportional on every prompt have their cosine and ratio
    exactly, however noisy they are.
    """
    names = ("cosine", "norm_ratio")
    if units.mean_squared_norm == 0 or other.mean_squared_norm == 0:
        return {name: nothing(NO_GRADIENT) for name in names}
    if (factor := _proportional(units, other, of_means)) is not None:
        return {"cosine": _exactly(float(np.sign(factor))), "norm_ratio": _exactly(abs(factor))}
    if min(len(units), len(other)) < FEWEST:
        return {name: nothing(TOO_FEW) for name in names}
    apart = units.prompt[:, None] != other.prompt[None]
    _, a, b = np.intersect1d(units.prompt, other.prompt, assume_unique=True, return_indices=True)
    first, second = units.side, other.side
    t = max(_quantile(side.along) for side in (first, second))
    shared = within(units, other) if same_prompts is None else same_prompts
    inner = inner_product(len(units), len(other), len(a), of_means, shared)
    covariance = joint(first, second, units.sketch @ other.sketch.T, apart, a, b, inner)
    norms = (first.grad_norm_sq, second.grad_norm_sq)
    cosine = _cosine(norms, inner, covariance, t)
    ratio = _ratio(norms, covariance, (first.trace_cov, second.trace_cov), t)
    for side, reason in ((first, HIDDEN), (second, HIDDEN_OTHER)):
        if is_hidden(side):
            return {
                "cosine": {**cosine, "value": None, "reason": reason},
                "norm_ratio": {**ratio, "value": None, "reason": reason},
            }
    return {"cosine": cosine, "norm_ratio": ratio}


def turned(cosine: Estimate) -> Estimate:
    """The cosine of `against` with the two objectives exchanged."""
    other = {HIDDEN: HIDDEN_OTHER, HIDDEN_OTHER: HIDDEN}
    return cosine | {key: other.get(cosine[key], cosine[key]) for key in cosine.keys() & {"reason"}}


def is_hidden(side: Side) -> bool:
    """Whether noise hides the gradient: ‖G‖² = 0 is not rejected at 95 %."""
    return side.grad_norm_sq <= _student((side.count - 1) / 3) * float(np.sqrt(side.second))


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


def _quantile(terms: Float[np.ndarray, " P"]) -> float:
    """Student's for a sum of terms with mean 0, whose variance is known to 2 (P-1)/(κ+3) degrees of freedom.

    A sample variance has 2P/(κ-1), κ being the terms' kurtosis (Satterthwaite's rule); a third of P where they are
    normal, as the direction along which noise is measured is estimated too.
    """
    squares = np.square(terms)
    power = float(squares.mean())
    kurtosis = float(np.square(squares).mean()) / power**2 if power > 0 else 3.0
    return _student(2 * (len(terms) - 1) / (kurtosis + 3))


def _student(freedom: float) -> float:
    return -float(special.stdtrit(max(freedom, 2), 0.025))


NORMAL = float(stats.norm.ppf(0.975))


def _trace(trace: float, spread: Float[np.ndarray, " P"], t: float) -> Estimate:
    """tr Σ, a mean of squared norms, whose few large ones skew Student's ratio: Hall's transformation corrects that.

    Source: Hall 1992, doi 10.1111/j.2517-6161.1992.tb01872.x.
    """
    size = _size(spread)
    if size <= 1e-9 * abs(trace):
        return _exactly(trace)
    skew = _skew(spread, size)
    low, high = (trace - size * t / NORMAL * _unhall(end, skew) for end in (NORMAL, -NORMAL))
    return _estimate(trace, max(low, 0.0), high)


def _snr(norm: float, trace: float, side: Side, spread: Float[np.ndarray, " P"], t: float) -> Estimate:
    """‖G‖²/tr Σ: the values x for which ‖G‖² - x tr Σ may be 0."""
    if trace <= 0:
        return nothing("its noise is 0")
    size, lever = _size(spread), side.lever
    skew = _skew(spread, size) if size else 0.0
    lean = float(side.along @ spread) / max(float(np.linalg.norm(side.along) * np.linalg.norm(spread)), 1e-300)

    second, slope = side.second, 4 * trace * lever

    def accepts(x: float) -> bool:
        first, own = math.sqrt(slope * max(x, 0.0)), x * size
        deviation = math.sqrt(max(second + first**2 - 2 * own * first * lean + own**2, 1e-300))
        return abs(_hall((norm - x * trace) / deviation * NORMAL / t, -skew * (own / deviation) ** 3)) <= NORMAL

    value = norm / trace
    step = float(np.sqrt(side.second + (value * size) ** 2)) / trace
    return _estimate(value, *(_edge(accepts, value, way * step) for way in (-1, 1)))


def _edge(accepts: Callable[[float], bool], start: float, step: float) -> float:
    """Where a set that holds ``start`` ends, in the direction of ``step``."""
    inside, outside = start, start + step
    for _ in range(60):
        if step == 0 or not accepts(outside):
            break
        inside, outside = outside, start + 2 * (outside - start)
    for _ in range(40):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if accepts(middle) else (inside, middle)
    return inside


def _inverse(snr: Estimate) -> Estimate:
    """The noise scale with the inverse of the signal's interval: without an upper end where that reaches 0."""
    if snr["value"] is None:
        return dict(snr)
    low, high = snr["ci_low"], snr["ci_high"]
    found = _estimate(
        1 / snr["value"] if low > 0 else None, 1 / high if high > 0 else None, 1 / low if low > 0 else None
    )
    return found if low > 0 else {**found, "reason": HIDDEN}


def _ratio(norms: tuple[float, float], covariance: Joint, scales: tuple[float, float], t: float) -> Estimate:
    """√(‖G‖²/‖G'‖²): the values whose square x may have ‖G‖² - x ‖G'‖² = 0. Source: Fieller 1954."""
    one, two = norms
    middle = scales[0] / scales[1] if min(scales) > 0 else 1.0
    at = middle * np.logspace(-8, 8, 321)
    if min(norms) > 0:
        at = np.sort(np.append(at, one / two))
    # what the two have in common under a hypothesis is weighted by variances at their own estimates, but at no more
    # than noise alone would give: else one that came out too large gets too little weight, and both seem shorter
    certain = np.sqrt(np.diag(covariance.second)[:2])
    own = covariance.at(*np.clip(norms, 0, certain)[:, None])
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
    value = float(np.sqrt(one / two)) if min(norms) > 0 else None
    if not len(inside):
        return _estimate(value, 0.0, None)
    low, high = inside[0], inside[-1]

    def cross(a: float, b: float) -> float:
        return float(np.sqrt(optimize.brentq(lambda x: float(score(np.array([x]))[0]) or 1e-300, a, b, rtol=1e-6)))

    def end(x: int, beyond: int) -> float:
        inner, outer = score(at[[x, beyond]])
        return float(np.sqrt(at[x])) if inner >= 0 or outer <= 0 else cross(at[x], at[beyond])

    return _estimate(
        value, 0.0 if low == 0 else end(low, low - 1), None if high == len(at) - 1 else end(high, high + 1)
    )


def _cosine(norms: tuple[float, float], inner: float, covariance: Joint, t: float) -> Estimate:
    """⟨G, G'⟩/√(‖G‖² ‖G'‖²): the values x for which some ‖G‖² and ‖G'‖² explain all three estimates.

    For a pair (a, b) at Mahalanobis distance q² ≤ t² of the two estimates, ⟨G, G'⟩ lies within √(t² - q²) conditional
    standard deviations of its regression on them; the interval is the range of that over √(ab).
    """
    here = covariance.at(*np.maximum(norms, 0)[:, None])[:2, :2, 0]
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
    value = float(np.clip(inner / np.sqrt(norms[0] * norms[1]), -1, 1)) if min(norms) > 0 else None
    if not kept.any():
        return _estimate(value, -1.0, 1.0)
    expected, size = inner - (slope * off).sum(0), np.sqrt(tried.prod(0))
    reach = np.sqrt(np.maximum(rest, 0) * np.maximum(t * t - distance, 0))
    low, high = ((expected - reach) / size)[kept].min(), ((expected + reach) / size)[kept].max()
    return _estimate(value, float(np.clip(low, -1, 1)), float(np.clip(high, -1, 1)))


def _floor(norms: tuple[float, float]) -> Float[np.ndarray, " 2"]:
    """The least variance of estimates of ‖G‖² to reckon with, where all gradients are the same up to rounding."""
    return 1e-18 * np.square(norms) + 1e-280


def _disc(rings: int, spokes: int) -> Float[np.ndarray, "2 N"]:
    """Points of the unit disc."""
    angle, radius = np.meshgrid(np.linspace(0, 2 * np.pi, spokes, endpoint=False), np.linspace(0, 1, rings))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)]).reshape(2, -1)


DISC = _disc(41, 64)


def _size(spread: Float[np.ndarray, " P"]) -> float:
    """The standard error of a sum of independent terms."""
    return float(np.sqrt(np.square(spread).sum() * len(spread) / (len(spread) - 1)))


def _skew(spread: Float[np.ndarray, " P"], size: float) -> float:
    """The third cumulant of the sum over its standard error cubed."""
    return float(np.clip((spread**3).sum() / size**3, -3, 3))


def _hall(x: float, skew: float) -> float:
    return x + skew / 3 * x**2 + skew**2 / 27 * x**3 + skew / 6


def _unhall(y: float, skew: float) -> float:
    return y if abs(skew) < 1e-6 else 3 / skew * float(np.cbrt(1 + skew * (y - skew / 6)) - 1)


def _estimate(value: float | None, low: float | None, high: float | None) -> Estimate:
    return {
        key: None if v is None else float(v)
        for key, v in zip(("value", "ci_low", "ci_high"), (value, low, high), strict=True)
    }


def _exactly(value: float) -> Estimate:
    return _estimate(value, value, value)


def nothing(reason: str) -> Estimate:
    """No value, and why."""
    return {**_estimate(None, None, None), "reason": reason}


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
        return {"value": rho, "ci_low": rho, "ci_high": rho}
    reach = stats.norm.ppf(0.975) * np.sqrt((1 + rho**2 / 2) / (len(a) - 3))
    low, high = np.tanh(np.arctanh(rho) + np.array([-reach, reach]))
    return {"value": rho, "ci_low": float(low), "ci_high": float(high)}
