"""The variance of SFT read as a policy gradient, token by token: exact, and by Monte Carlo. Pure functions.

Fix a prefix x and the expert's token y*, with p = π(y*|x). To see y* by sampling y ~ π, the policy gradient weights
1[y = y*] by c/p, so that its mean is c ∇ log π(y*), the gradient of an objective with coefficient c. In the logits
‖∇ log π(y*)‖² is S = (1-p)² + Σ_{v≠y*} π_v², and so, exactly,

    tr Cov = c² S (1-p)/p:    S(1-p)/p for SFT (c = 1),    p(1-p)S for DFT (c = p).

Source: arXiv 2508.05629, section 3; N tokens throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

LEAST_PROBABILITY = 1e-2
"""Below this, too few draws hit the expert's token for Monte Carlo."""
FEWEST_EVENTS = 100
"""A bin is comparable if it has at least as many expected hits, and expected misses."""
NO_DRAWS = "no draws were requested"
SLOPE_BELOW = 0.1
FEWEST_FOR_SLOPE = 20
RESAMPLES = 2000


@dataclass(frozen=True)
class TokenTable:
    """What one forward pass gives for the expert's tokens."""

    row: Int[np.ndarray, " N"]
    """The sequence of each token."""
    logp: Float[np.ndarray, " N"]
    """log π(y*|x) in nats."""
    miss: Float[np.ndarray, " N"]
    """1 - π(y*|x), summed over the other tokens."""
    others: Float[np.ndarray, " N"]
    """Σ_{v≠y*} π_v²."""

    @property
    def score_norm(self) -> Float[np.ndarray, " N"]:
        """S = ‖∇_logits log π(y*)‖²."""
        found: Float[np.ndarray, " N"] = self.miss**2 + self.others
        return found

    def where(self, kept: Bool[np.ndarray, " N"]) -> TokenTable:
        """The tokens that are kept; sequences without any are left out."""
        _, row = np.unique(self.row[kept], return_inverse=True)
        return TokenTable(row, self.logp[kept], self.miss[kept], self.others[kept])


def log_trace_cov(table: TokenTable, c: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """log of tr Cov = c² S (1-p)/p of each token; -inf where it is 0."""
    with np.errstate(divide="ignore"):
        size = 2 * np.log(np.abs(c)) + np.log(table.score_norm)
        found: Float[np.ndarray, " N"] = size + np.log(table.miss) - table.logp
    return found


def block_variances(
    table: TokenTable, c: Float[np.ndarray, " N"], hits: Int[np.ndarray, "N R"], draws: int
) -> Float[np.ndarray, "N R"]:
    """R independent unbiased estimates of every token's tr Cov, each from ``draws`` samples of which ``hits`` hit.

    The estimator takes the value (c/p) s* or 0; the trace of the sample covariance is (c/p)² S q(1-q) n/(n-1), with q
    the share of hits.
    """
    q = hits / draws
    with np.errstate(divide="ignore"):
        scale = np.exp(2 * (np.log(np.abs(c)) - table.logp)) * table.score_norm
    found: Float[np.ndarray, "N R"] = scale[:, None] * q * (1 - q) * draws / (draws - 1)
    return found


def bootstrap_mean(blocks: Float[np.ndarray, " R"], seed: int) -> tuple[float, float, float]:
    """The mean of R estimates and its 95 % bias-corrected and accelerated bootstrap interval."""
    mean = float(blocks.mean())
    if np.ptp(blocks) == 0:
        return mean, mean, mean
    found = stats.bootstrap((blocks,), np.mean, n_resamples=RESAMPLES, rng=np.random.default_rng(seed), method="BCa")
    return mean, float(found.confidence_interval.low), float(found.confidence_interval.high)


def bin_edges(logp: Float[np.ndarray, " N"]) -> Float[np.ndarray, " E"]:
    """Edges in log10 p: sixteenths of a decade down to `LEAST_PROBABILITY`, halves below."""
    fine = np.linspace(np.log10(LEAST_PROBABILITY), 0, 33)
    lowest = min(float(logp.min()) / np.log(10), -2.0)
    coarse = np.arange(-2 - 0.5 * np.ceil(2 * (-2 - lowest)), -2, 0.5)
    return np.concatenate([coarse, fine])


def bins(
    table: TokenTable, c: Float[np.ndarray, " N"], estimates: Float[np.ndarray, "N R"] | None, draws: int, seed: int
) -> list[dict[str, Any]]:
    """Mean tr Cov per token in bins of log10 p, predicted and by Monte Carlo, and where the two can be compared.

    ``estimates`` are those of `block_variances`, ``draws`` the samples per token behind them; None and 0 for none.
    """
    edges = bin_edges(table.logp)
    x = np.minimum(table.logp / np.log(10), 0)
    place = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
    predicted, p = np.exp(log_trace_cov(table, c)), np.exp(table.logp)
    found = []
    for number in np.unique(place):
        inside = place == number
        expected = draws * min(p[inside].sum(), (1 - p[inside]).sum())
        reason = None
        if estimates is None:
            reason = NO_DRAWS
        elif edges[number] < np.log10(LEAST_PROBABILITY) - 1e-9:
            reason = f"p < {LEAST_PROBABILITY:g}: too few draws hit the token"
        elif expected < FEWEST_EVENTS:
            reason = f"{expected:.0f} hits or misses are expected, {FEWEST_EVENTS} needed"
        row: dict[str, Any] = {
            "log10_p_low": float(edges[number]),
            "log10_p_high": float(edges[number + 1]),
            "log10_p": float(x[inside].mean()),
            "tokens": int(inside.sum()),
            "predicted": float(predicted[inside].mean()),
            "comparable": reason is None,
            **dict.fromkeys(("monte_carlo", "ci_low", "ci_high")),
        }
        if estimates is not None and reason is None:
            mean, low, high = bootstrap_mean(estimates[inside].mean(0), seed + int(number))
            row |= {"monte_carlo": mean, "ci_low": low, "ci_high": high}
        found.append(row | ({"reason": reason} if reason else {}))
    return found


def comparable(
    table: TokenTable, c: Float[np.ndarray, " N"], estimates: Float[np.ndarray, "N R"] | None, seed: int
) -> dict[str, Any]:
    """The tokens with p ≥ `LEAST_PROBABILITY`: their share, and the sum of their tr Cov, predicted and sampled."""
    inside = table.logp >= np.log(LEAST_PROBABILITY)
    found: dict[str, Any] = {
        "fraction": float(inside.mean()),
        "predicted": float(np.exp(log_trace_cov(table, c))[inside].sum()),
        **dict.fromkeys(("monte_carlo", "ci_low", "ci_high")),
    }
    if estimates is None or not inside.any():
        return {**found, "reason": NO_DRAWS if estimates is None else f"no token has p ≥ {LEAST_PROBABILITY:g}"}
    mean, low, high = bootstrap_mean(estimates[inside].sum(0), seed)
    return {**found, "monte_carlo": mean, "ci_low": low, "ci_high": high}


def slope(
    table: TokenTable, c: Float[np.ndarray, " N"], seed: int, prompt: Int[np.ndarray, " R"] | None = None
) -> dict[str, Any]:
    """The slope of log(tr Cov) against log p over tokens with p ≤ `SLOPE_BELOW`, at equal score norm S.

    The law tr Cov ∝ 1/p or p is one context's, for which S is fixed; over tokens S varies between (1-p)² and 2(1-p)²
    and falls as p rises, so it is taken to the left side: log(tr Cov / S) is fitted. So the slope shows how
    c depends on p, and nothing about the model. ``slope_raw`` has S left in. Intervals: bootstrap over prompts;
    ``prompt`` is that of each row, and without it every row is one.
    """
    with np.errstate(divide="ignore"):
        y = log_trace_cov(table, c)
        chosen = (table.logp <= np.log(SLOPE_BELOW)) & np.isfinite(y)
    if chosen.sum() < FEWEST_FOR_SLOPE or np.ptp(table.logp[chosen]) < np.log(10):
        reason = (
            f"{int(chosen.sum())} tokens have p ≤ {SLOPE_BELOW:g}: a slope needs {FEWEST_FOR_SLOPE} of them, "
            "over a decade of p"
        )
        return {"slope": None, "slope_ci": None, "slope_raw": None, "slope_reason": reason}
    x, row = table.logp[chosen], table.row[chosen] if prompt is None else prompt[table.row[chosen]]
    raw = y[chosen]
    fixed = raw - np.log(table.score_norm[chosen])
    _, number = np.unique(row, return_inverse=True)
    sums = np.stack(
        [np.bincount(number, v) for v in (np.ones_like(x), x, fixed, x * x, x * fixed)]
    )  # a prompt's share of the normal equations

    def fit(*parts: Float[np.ndarray, "... R"], axis: int = -1) -> Any:
        n, sx, sy, sxx, sxy = (part.sum(axis) for part in parts)
        return (n * sxy - sx * sy) / (n * sxx - sx * sx)

    value = float(fit(*sums))
    interval: Sequence[float] | None = None
    if sums.shape[1] >= 5:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = stats.bootstrap(
                tuple(sums), fit, paired=True, vectorized=True, n_resamples=RESAMPLES,
                rng=np.random.default_rng(seed), method="percentile",
            )  # fmt: skip
        interval = [float(found.confidence_interval.low), float(found.confidence_interval.high)]
    return {"slope": value, "slope_ci": interval, "slope_raw": float(np.polyfit(x, raw, 1)[0])}


def importance_weights(table: TokenTable, c: Float[np.ndarray, " N"]) -> Mapping[str, Any]:
    """The weight w = 1[y = y*] c/p of SFT as a policy gradient: log10 quantiles, and the mean over tokens of E_π[w²].

    E_π[w²] = c²/p, which for c = 1 is 1 + χ²(δ_{y*} ‖ π).
    """
    with np.errstate(divide="ignore"):
        log_weight = np.log(np.abs(c)) - table.logp
        log_second = 2 * np.log(np.abs(c)) - table.logp
    top = log_second.max()
    return {
        "kind": "1[y = y*] c / π(y*)",
        "log10_quantiles": quantiles(log_weight / np.log(10)),
        "log10_second_moment": float((top + np.log(np.exp(log_second - top).mean())) / np.log(10))
        if np.isfinite(top)
        else None,
    }


def sequences(table: TokenTable) -> dict[str, Any]:
    """The whole completion as one action, P = Π p_t: log10 quantiles over sequences of P and of tr Cov in closed form.

    In logits ‖∇ log P‖² = Σ_t S_t, and tr Cov is that times (1-P)/P for SFT and P(1-P) for a DFT with the weight P.
    Monte Carlo cannot estimate these: it would take about 1/P samples to hit the expert once.
    """
    _, number = np.unique(table.row, return_inverse=True)
    log_p, power = np.bincount(number, table.logp), np.bincount(number, table.score_norm)
    with np.errstate(divide="ignore"):
        core = np.log(power) + np.log(-np.expm1(np.minimum(log_p, -1e-300)))
    ten = np.log(10)
    return {
        "log10_p": quantiles(log_p / ten),
        "log10_trace_cov_sft": quantiles((core - log_p) / ten),
        "log10_trace_cov_dft": quantiles((core + log_p) / ten),
        "comparable": {
            "fraction": float((log_p >= np.log(LEAST_PROBABILITY)).mean()),
            "reason": f"Monte Carlo would need P ≥ {LEAST_PROBABILITY:g}",
        },
    }


def quantiles(values: Float[np.ndarray, " N"]) -> dict[str, float | None]:
    """The minimum, the 5, 25, 50, 75 and 95 % quantiles, and the maximum."""
    at = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
    with np.errstate(invalid="ignore"):
        found = np.quantile(values, at)
    return {f"{q:g}": float(v) if np.isfinite(v) else None for q, v in zip(at, found, strict=True)}


def no_reading(reason: str) -> dict[str, Any]:
    """Token moments of an objective that cannot be read as importance weighting of expert tokens."""
    return {**dict.fromkeys(("predicted_trace_cov", "comparable", "slope", "slope_ci")), "reason": reason}
