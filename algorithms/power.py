"""Power: the family of probability-based losses that leads from SFT to DFT and beyond.

Loss: (1 - p_t^α)/α where p_t ≥ τ, averaged over those tokens of the step. The gradient weights ∇ log p_t by p_t^α:
α = 0 is SFT (the loss tends to -log p), α = 1 is DFT, and the larger α, the less an unlikely token counts.
``threshold`` τ excludes less likely tokens, both from the sum and from the count that it is divided by, as in the
authors' code.

Which α works best depends on how much the base knows about the task. The paper finds -p, -p¹⁰ (α = 1 and 10) and the
threshold ahead of SFT where the base knows much, as in mathematics; SFT (α = 0) ahead where it knows nothing, as in an
invented puzzle; and none ahead in between. The default is α = 1, which is DFT: α = 10 weights a token of p = ½ by a
thousandth, and leaves no gradient unless the base is nearly certain of its demonstrations.
Source: arXiv 2510.00526, whose -p^α differs by a constant and the factor α.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class Power(Objective):
    """Power family: c_t = p_t^α 1[p_t ≥ τ] / (the share of tokens with p_t ≥ τ)."""

    name: ClassVar[str] = "power"
    source: ClassVar[str] = "arXiv 2510.00526"
    shown_too: ClassVar[Sequence[Mapping[str, Any]]] = ({"alpha": 0.5}, {"alpha": 10.0})

    alpha: float = 1.0
    threshold: float = 0.0

    @property
    def is_coupled(self) -> bool:
        return self.threshold > 0  # kept tokens are counted over the whole step

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        weight = (self.alpha * batch.logp).exp()
        loss = -torch.expm1(self.alpha * batch.logp) / self.alpha if self.alpha else -batch.logp
        if not self.is_coupled:
            return Coefficients(weight, loss=loss)
        kept = batch.mask & (batch.logp.exp() >= self.threshold)
        share = kept.sum().clamp(min=1).to(weight.dtype) / batch.mask.sum().clamp(min=1)
        return Coefficients(
            torch.where(kept, weight / share, 0),
            loss=torch.where(kept, loss / share, 0),
            metrics={"kept": kept.to(weight.dtype)},
        )
