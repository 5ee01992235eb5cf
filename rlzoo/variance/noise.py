"""The noise of a gradient over the data: unbiased estimators of ‖G‖² and tr Σ with intervals, as pure functions.

With g_1 … g_U the gradients of independently drawn units and ḡ their mean,

    tr Σ ≈ U/(U-1) · (mean ‖g_u‖² - ‖ḡ‖²),    ‖G‖² ≈ ‖ḡ‖² - tr Σ / U

are unbiased for the trace of a unit's covariance and the squared norm of the expected gradient (arXiv 1812.06162,
appendix A.1). Intervals come from the jackknife over units, which needs ⟨g_u, ḡ⟩ besides the norms: those inner
products are estimated from random projections, the values themselves from nothing but exact sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

Estimate = dict[str, Any]
"""``value``, ``ci_low``, ``ci_high``; None where there is none, and then a ``reason``."""

FEWEST = 3
"""Units that an interval needs."""
TOO_FEW = f"fewer than {FEWEST} units"
DROWNED = "the noise hides the gradient: take more rows"


@dataclass(frozen=True)
class Units:
    """One objective's gradients, of the whole model or of one layer."""

    squared_norm: Float[np.ndarray, " U"]
    sketch: Float[np.ndarray, "U D"]
    mean_squared_norm: float
    """‖ḡ‖², exact."""

    def __len__(self) -> int:
        return len(self.squared_norm)

    def along_mean(self) -> Float[np.ndarray, " U"]:
        """⟨g_u, ḡ⟩ of each unit: projected, but for its own share and for the mean, which are exact."""
        own = (self.squared_norm - np.einsum("ud,ud->u", self.sketch, self.sketch)) / len(self)
        found = self.sketch @ self.sketch.mean(0) + own
        return _recentred(found, self.mean_squared_norm)

    def without_each(self) -> tuple[Float[np.ndarray, " U"], Float[np.ndarray, " U"]]:
        """mean ‖g‖² and ‖ḡ‖² with one unit left out, for each."""
        n, q = len(self), self.squared_norm
        power = (q.sum() - q) / (n - 1)
        mean = (n**2 * self.mean_squared_norm - 2 * n * self.along_mean() + q) / (n - 1) ** 2
        return power, np.maximum(mean, 0)

    def projected_without_each(self) -> Float[np.ndarray, " U"]:
        """‖ḡ‖² with one unit left out, by projections alone, as the inner products of two objectives are."""
        n = len(self)
        along = _recentred(self.sketch @ self.sketch.mean(0), self.mean_squared_norm)
        own = np.einsum("ud,ud->u", self.sketch, self.sketch)
        found: Float[np.ndarray, " U"] = (n**2 * self.mean_squared_norm - 2 * n * along + own) / (n - 1) ** 2
        return found.clip(min=0)


def trace_cov(units: int, power: Any, mean_squared_norm: Any) -> Any:
    """tr Σ from mean ‖g_u‖² and ‖ḡ‖²."""
    return units / (units - 1) * (power - mean_squared_norm)


def gradient_squared_norm(units: int, power: Any, mean_squared_norm: Any) -> Any:
    """‖G‖² from mean ‖g_u‖² and ‖ḡ‖²; it may come out negative."""
    return (units * mean_squared_norm - power) / (units - 1)


def data_noise(units: Units) -> dict[str, Estimate]:
    """grad_norm_sq, trace_cov, noise_scale = tr Σ/‖G‖² (in units), and snr = ‖G‖²/tr Σ."""
    if len(units) < FEWEST:
        return {name: nothing(TOO_FEW) for name in ("grad_norm_sq", "trace_cov", "noise_scale", "snr")}
    n, power = len(units), float(units.squared_norm.mean())
    left_out = units.without_each()

    def snr(count: int, p: Any, m: Any) -> Any:
        return gradient_squared_norm(count, p, m) / trace_cov(count, p, m)

    found: dict[str, Estimate] = {}
    for name, function in (("grad_norm_sq", gradient_squared_norm), ("trace_cov", trace_cov), ("snr", snr)):
        with np.errstate(divide="ignore", invalid="ignore"):
            value, others = function(n, power, units.mean_squared_norm), function(n - 1, *left_out)
        found[name] = _jackknife(value, [others], positive=name == "trace_cov")
    found["noise_scale"] = _inverse(found["snr"])
    return found


def _inverse(snr: Estimate) -> Estimate:
    """The noise scale; unbounded above where the interval of its inverse reaches 0."""
    if snr["value"] is None or snr["value"] <= 0:
        return nothing(snr.get("reason", DROWNED))
    low, high = snr["ci_low"], snr["ci_high"]
    return {
        "value": 1 / snr["value"],
        "ci_low": None if high is None else 1 / high,
        "ci_high": 1 / low if low is not None and low > 0 else None,
    }


def against(units: Units, other: Units, inner: float, paired: bool) -> dict[str, Estimate]:
    """cosine and norm ratio of the mean gradient to another objective's.

    ``inner`` is ⟨ḡ, ḡ'⟩, exact; ``paired`` says whether both look at the same units. The values are those of the
    measured means: noise in them pulls a cosine towards 0.
    """
    if units.mean_squared_norm == 0 or other.mean_squared_norm == 0:
        return {name: nothing("a gradient is 0") for name in ("cosine", "norm_ratio")}
    if min(len(units), len(other)) < FEWEST:
        return {name: nothing(TOO_FEW) for name in ("cosine", "norm_ratio")}
    own, others = units.projected_without_each(), other.projected_without_each()
    n, m = len(units), len(other)
    along = _recentred(units.sketch @ other.sketch.mean(0), inner)
    beside = _recentred(other.sketch @ units.sketch.mean(0), inner)
    if paired:
        both = np.einsum("ud,ud->u", units.sketch, other.sketch)
        parts = [((n**2 * inner - n * along - n * beside + both) / (n - 1) ** 2, own, others)]
    else:
        parts = [
            ((n * inner - along) / (n - 1), own, np.full(n, other.mean_squared_norm)),
            ((m * inner - beside) / (m - 1), np.full(m, units.mean_squared_norm), others),
        ]
    cosine = inner / np.sqrt(units.mean_squared_norm * other.mean_squared_norm)
    ratio = np.sqrt(units.mean_squared_norm / other.mean_squared_norm)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = [np.clip(x / np.sqrt(a * b), -1, 1) for x, a, b in parts]
        ratios = [np.sqrt(a / b) for _, a, b in parts]
    return {
        "cosine": _cosine(float(np.clip(cosine, -1, 1)), cosines),
        "norm_ratio": _jackknife(float(ratio), ratios, positive=True),
    }


def _cosine(value: float, left_out: list[Float[np.ndarray, " U"]]) -> Estimate:
    if abs(value) > 1 - 1e-9:  # the same gradient: projections must not blur that
        return {"value": value, "ci_low": value, "ci_high": value}
    return _jackknife(value, left_out, through=(np.arctanh, np.tanh))


def _recentred(values: Float[np.ndarray, " U"], mean: float) -> Float[np.ndarray, " U"]:
    moved: Float[np.ndarray, " U"] = values + mean - values.mean()
    return moved


Maps = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def _jackknife(
    value: float, left_out: list[Float[np.ndarray, " U"]], *, positive: bool = False, through: Maps | None = None
) -> Estimate:
    """The value with its 95 % jackknife interval; one array of left-out values a sample that was drawn.

    Source: Efron and Stein, The jackknife estimate of variance, 1981, doi 10.1214/aos/1176345462. ``through`` is a map
    to a scale on which the interval is symmetric, and its inverse; the logarithm for a ``positive`` value.
    """
    if not np.isfinite(value):
        return nothing("its noise is 0")
    if positive and value > 0:
        through = (np.log, np.exp)
    to, back = through or (_same, _same)
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = [to(values) for values in left_out]
        centre = to(value)
    if not np.isfinite(centre) or not all(np.isfinite(values).all() for values in moved):
        return {
            "value": float(value),
            "ci_low": None,
            "ci_high": None,
            "reason": "not positive without one of the units",
        }
    variance = sum(float((len(v) - 1) * np.var(v)) for v in moved)
    reach = stats.t.ppf(0.975, min(map(len, left_out)) - 1) * np.sqrt(variance)
    return {"value": float(value), "ci_low": float(back(centre - reach)), "ci_high": float(back(centre + reach))}


def _same(x: Any) -> Any:
    return x


def nothing(reason: str) -> Estimate:
    """No value, and why."""
    return {"value": None, "ci_low": None, "ci_high": None, "reason": reason}


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
