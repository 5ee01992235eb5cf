"""CHORD-φ: SFT with each token weighted by the policy's uncertainty about it.

Loss: -sg(p_t (1 - p_t)) log p_t, averaged over the completion tokens of the step. φ = p(1 - p) is largest at p = ½:
like DFT, it learns little from unlikely tokens, which would disrupt the policy, and unlike DFT, little from those that
the policy knows. The weight is at most ¼, so its learning rate is not SFT's.

The paper mixes this loss with GRPO's on the policy's own samples, (1-μ) L_GRPO + μ L_φ: a `mixture` of `grpo` and
`chord`. Source: arXiv 2508.11408; the token mean is that of the authors' code (modelscope/Trinity-RFT).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class Chord(Objective):
    """CHORD's weight per token: c_t = p_t (1 - p_t)."""

    name: ClassVar[str] = "chord"
    source: ClassVar[str] = "arXiv 2508.11408"

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(-batch.logp.exp() * torch.expm1(batch.logp))
