"""APO: anchored preference optimisation, which says where the likelihoods of both completions of a pair should go.

With r = β Σ_t log(π_θ/π_ref)(y_t) and s(r) = σ(r) σ(-r), the loss of a pair, averaged over pairs, and the coefficients
of a token of y⁺ and of y⁻ are

- ``zero``, for better completions that are better than the policy's own: 1 - σ(r⁺) + σ(r⁻); β s(r⁺) and -β s(r⁻);
- ``down``, for those that are worse: 1 + σ(r⁺) - σ(r⁺ - r⁻); β [s(r⁺ - r⁻) - s(r⁺)] and -β s(r⁺ - r⁻).

Source: arXiv 2408.06266, eq. 7 and 8; formulas checked against TRL 1.16.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlzoo.bases import PairLoss, ReferencePairObjective
from rlzoo.objective import register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class APO(ReferencePairObjective):
    """Anchored preference optimisation: c_t = ±β σ(r) σ(-r), and its variant down."""

    name: ClassVar[str] = "apo"
    source: ClassVar[str] = "arXiv 2408.06266"
    compared_with: ClassVar[str] = "TRL 1.16"

    variant: Literal["zero", "down"] = "zero"

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        score = self.log_ratio(batch)
        better, worse = self.sides(batch, self.beta * score)
        if self.variant == "zero":
            loss = torch.sigmoid(-better) + torch.sigmoid(worse)
            up, down = slope(better), -slope(worse)
        else:
            loss = torch.sigmoid(better) + torch.sigmoid(worse - better)
            up, down = slope(better - worse) - slope(better), -slope(better - worse)
        return self.of_pairs(batch, score, PairLoss(loss, self.beta * up, self.beta * down))


def slope(x: Tensor) -> Tensor:
    """The derivative of σ, σ(x) σ(-x)."""
    return torch.sigmoid(x) * torch.sigmoid(-x)
