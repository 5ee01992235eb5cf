"""Power: the family of probability-based losses between SFT and beyond DFT.

Loss: (1 - p_t^α)/α where p_t ≥ τ and 0 elsewhere, averaged over the completion tokens of the step. Its gradient weighs
∇ log p_t by p_t^α: α = 0 is SFT (the loss tends to -log p), α = 1 DFT, and the larger α, the less an unlikely token
counts. ``threshold`` τ leaves out the tokens that the policy thinks less likely than that; they still count in the
denominator. α = 10 is the paper's -p¹⁰, for models that know their demonstrations: on others nothing is left of the
gradient. Source: arXiv 2510.00526, whose -p^α differs by a constant and the factor α.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class Power(Objective):
    """Power family: c_t = p_t^α 1[p_t ≥ τ]."""

    name: ClassVar[str] = "power"
    source: ClassVar[str] = "arXiv 2510.00526"

    alpha: float = 10.0
    threshold: float = 0.0

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        weight = (self.alpha * batch.logp).exp()
        loss = -torch.expm1(self.alpha * batch.logp) / self.alpha if self.alpha else -batch.logp
        kept = batch.logp.exp() >= self.threshold
        return Coefficients(
            torch.where(kept, weight, 0),
            loss=torch.where(kept, loss, 0),
            metrics={"kept": kept.to(weight.dtype)},
        )
