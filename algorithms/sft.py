"""SFT: supervised fine-tuning, the log-likelihood of demonstrations.

Loss: -log π_θ(y_t | x, y_<t), averaged over the completion tokens of the step. A truncated demonstration has no end of
sequence; ``truncated: drop`` leaves it out. Source: none, it is maximum likelihood.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class SFT(Objective):
    """Supervised fine-tuning: c_t = 1."""

    name: ClassVar[str] = "sft"

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(torch.ones_like(batch.logp))
