"""Importance ratios and clipping: pure functions of log-probs (in nats) and advantages, all [B, T], without gradients.

Functions of several tensors raise ValueError if their shapes differ.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlzoo.errors import UserError

RATIO_MAX = math.exp(20)
"""Ratios are bounded by this, as in verl, so that no coefficient is infinite on stale data."""


class Clipped(NamedTuple):
    """The clipped policy gradient of each token."""

    values: Float[Tensor, "B T"]
    """The coefficient: ρA, and 0 where the token is clipped."""
    loss: Float[Tensor, "B T"]
    """-min(ρA, clip(ρ) A), with ρ at most the upper bound."""
    clipped: Bool[Tensor, "B T"]


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp(log ratio), at most `RATIO_MAX`."""
    return log_ratio.exp().clamp(max=RATIO_MAX)


def token_ratio(
    logp: Float[Tensor, "B T"], behaviour: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """ρ_t = π(y_t)/μ(y_t) per token, at most `RATIO_MAX`; 1 at masked positions."""
    _same_shape(logp, behaviour, mask)
    return ratio_of(torch.where(mask, logp - behaviour, 0))


def sequence_ratio(
    logp: Float[Tensor, "B T"], behaviour: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """s = exp(mean_t log ρ_t), the geometric mean of a row's ratios, repeated at each position of the row.

    At most `RATIO_MAX`; 1 for a row without tokens. Source: GSPO, arXiv 2507.18071.
    """
    _same_shape(logp, behaviour, mask)
    total = torch.where(mask, logp - behaviour, 0).sum(1, keepdim=True)
    return ratio_of(total / mask.sum(1, keepdim=True).clamp(min=1)).expand_as(logp)


def sequence_log_ratio(
    logp: Float[Tensor, "B T"], other: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B 1"]:
    """log(π/π_0)(y) = Σ_t log(π/π_0)(y_t) of a row's completion, each term within ±20; 0 for a row without tokens."""
    _same_shape(logp, other, mask)
    limit = math.log(RATIO_MAX)
    return torch.where(mask, logp - other, 0).clamp(-limit, limit).sum(1, keepdim=True)


def clipped_gradient(
    ratio: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    below: float,
    above: float,
    most: float | None = None,
) -> Clipped:
    """The gradient of min(ρA, clip(ρ, 1-ε_below, 1+ε_above) A): ρA, or 0 past a bound in the direction of A.

    A ratio that the advantage pulls back towards the bound is not clipped, so ρA is unbounded where A < 0. ``most``
    bounds it: from ρ = ``most`` on, the loss is -``most`` A and its gradient 0. None: `RATIO_MAX`.
    Sources: arXiv 1707.06347, eq. 7; for the upper bound dual-clip PPO, arXiv 1912.09729, and two-sided GRPO,
    arXiv 2505.07291, which are the same.
    """
    _same_shape(ratio, advantage)
    most = RATIO_MAX if most is None else most
    past = (advantage < 0) & (ratio >= most)
    clipped = ((advantage > 0) & (ratio > 1 + above)) | ((advantage < 0) & (ratio < 1 - below)) | past
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - below, 1 + above) * advantage)
    gain = torch.where(past, most * advantage, gain)
    return Clipped(torch.where(clipped, 0, ratio * advantage), -gain, clipped)


def ratio_metrics(
    logp: Float[Tensor, "B T"],
    ratio: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    clipped: Bool[Tensor, "B T"] | None = None,
) -> dict[str, Tensor]:
    """What an objective with ratios reports per token, given its coefficients ``values`` without a KL term.

    ``ratio``, ρ; ``ratio_deviation``, |ρ - 1|; ``clipped``, 0 or 1, unless nothing is; ``signal``, |ρA| (1 - π), the
    size of the gradient of ρA with respect to the token's logit; and ``signal_clipped``, |ρA - c| (1 - π), what
    clipping takes from it.
    """
    _same_shape(logp, ratio, advantage, values)
    slope = -logp.expm1()
    return {
        "ratio": ratio,
        "ratio_deviation": (ratio - 1).abs(),
        **({} if clipped is None else {"clipped": clipped.to(ratio.dtype)}),
        "signal": (ratio * advantage).abs() * slope,
        "signal_clipped": (ratio * advantage - values).abs() * slope,
    }


def k3(
    logp: Float[Tensor, "B T"], reference: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """The k3 estimate x - log x - 1 of KL(π ‖ π_ref), x = π_ref/π, and its coefficient x - 1 in a loss; both [B, T].

    0 at masked positions. x is at most `RATIO_MAX`, where the loss is flat and the coefficient 0.
    Source: Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    _same_shape(logp, reference, mask)
    limit = math.log(RATIO_MAX)
    log_ratio = torch.where(mask, reference - logp, 0).clamp(max=limit)
    excess = log_ratio.expm1()
    return excess - log_ratio, torch.where(log_ratio < limit, excess, 0)


def kl_estimate(
    which: Literal["k1", "k2", "k3"],
    logp: Float[Tensor, "B T"],
    reference: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    ratio: Float[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """An estimate of KL(π ‖ π_ref) per token, and its coefficient in a loss; both [B, T], and 0 at masked positions.

    With d = log(π/π_ref): k1 = d, with the coefficient -1; k2 = d²/2, with -d; `k3`. With ``ratio`` ρ = π/μ it is ρk in
    place of k, with the coefficient ρ(c - k).
    """
    _same_shape(logp, reference, mask)
    gap = torch.where(mask, logp - reference, 0)
    match which:
        case "k1":
            kl, pull = gap, torch.where(mask, -torch.ones_like(gap), 0)
        case "k2":
            kl, pull = gap.square() / 2, -gap
        case "k3":
            kl, pull = k3(logp, reference, mask)
    if ratio is None:
        return kl, pull
    return ratio * kl, ratio * (-gap if which == "k3" else pull - kl)  # c - k of k3 cancels to -d


def upper_clip(clip: float, clip_high: float | None) -> float:
    """ε_high: ``clip_high``, or ``clip`` on both sides of 1 if it is None."""
    return clip if clip_high is None else clip_high


def check_upper_bound(owner: str, option: str, most: float | None, above: float) -> None:
    """Check that an upper bound on the ratio lies above that of the clip, 1 + ``above``. Raises UserError otherwise."""
    if most is not None and not most > 1 + above:
        raise UserError(
            f"{owner} needs {option} above 1 + {above:g}, the bound of the clip, got {most:g}: raise it or leave it out"
        )


def check_positive(owner: str, **options: float) -> None:
    """Check that options are above 0. Raises UserError otherwise."""
    for option, value in options.items():
        if not value > 0:
            raise UserError(f"{owner} needs {option} above 0, got {value:g}")


def _same_shape(*tensors: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"shapes differ: {', '.join(map(str, shapes))}")
