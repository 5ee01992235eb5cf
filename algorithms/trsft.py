"""TrSFT: trust-region SFT, whose weight falls off linearly below a probability α.

Loss: -log p_t where p_t ≥ α, else 1 - p_t/α - log α, averaged over the completion tokens of the step. The two meet at α
with one slope, so ∇p_t is weighted by 1/max(p_t, α) in place of SFT's 1/p_t: tokens inside the trust region p ≥ α are
learned as in SFT, and those outside it as in DFT, at 1/α of its weight. α → 0 is SFT, α = 1 is DFT.

The paper uses it on prefixes of demonstrations, next to RL on the rest of the completion (TRAPO); here it stands alone,
and can be a component of a `mixture`. Source: arXiv 2512.17636, whose code (Su-my/TRAPO, ``clip_low``) has α = 0.1.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.errors import UserError
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class TrSFT(Objective):
    """Trust-region SFT: c_t = min(1, p_t/α)."""

    name: ClassVar[str] = "trsft"
    source: ClassVar[str] = "arXiv 2512.17636"

    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise UserError(f"trsft needs alpha above 0 and at most 1, got {self.alpha}")

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        share = batch.logp.exp() / self.alpha
        outside = share < 1
        return Coefficients(
            share.clamp(max=1),
            loss=torch.where(outside, 1 - share - math.log(self.alpha), -batch.logp),
            metrics={"outside": outside.to(share.dtype)},
        )
