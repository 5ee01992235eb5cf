"""Importance ratios and what clipping does to them: pure functions of log-probs and advantages, with no gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Clipped(NamedTuple):
    """The clipped policy gradient of each token."""

    values: Float[Tensor, "B T"]
    """The coefficient: ρA, and 0 where the token is clipped."""
    loss: Float[Tensor, "B T"]
    """-min(ρA, clip(ρ) A)."""
    clipped: Bool[Tensor, "B T"]


def token_ratio(
    logp: Float[Tensor, "B T"], behaviour: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """ρ_t = π/μ of each token; 1 at masked positions, whatever stands there."""
    _same_shape(logp, behaviour, mask)
    return torch.where(mask, logp - behaviour, 0).exp()


def sequence_ratio(
    logp: Float[Tensor, "B T"], behaviour: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """s = exp(mean_t log ρ_t), the geometric mean of a row's ratios, at each of its tokens; 1 for a row of none."""
    _same_shape(logp, behaviour, mask)
    total = torch.where(mask, logp - behaviour, 0).sum(1, keepdim=True)
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).exp().expand_as(logp)


def clipped_gradient(
    ratio: Float[Tensor, "B T"], advantage: Float[Tensor, "B T"], below: float, above: float
) -> Clipped:
    """The gradient of min(ρA, clip(ρ, 1-ε_below, 1+ε_above) A): ρA, or 0 past a bound in the direction of A.

    A ratio beyond the bound that the advantage pulls it back to is not clipped. Source: arXiv 1707.06347, eq. 7.
    """
    _same_shape(ratio, advantage)
    clipped = ((advantage > 0) & (ratio > 1 + above)) | ((advantage < 0) & (ratio < 1 - below))
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - below, 1 + above) * advantage)
    return Clipped(torch.where(clipped, 0, ratio * advantage), -gain, clipped)


def _same_shape(*tensors: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"shapes differ: {', '.join(map(str, shapes))}")
