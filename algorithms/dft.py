"""DFT: dynamic fine-tuning, SFT with each token weighted by its own probability.

Loss: -sg(π_θ(y_t)) log π_θ(y_t), averaged over the completion tokens of the step: divided by their number, not by
Σ p_t. The stop-gradient matters: without it the coefficient would be p(1 + log p), which is negative below p = 1/e.
Source: arXiv 2508.05629, eq. 9.
"""

from dataclasses import dataclass
from typing import ClassVar

from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class DFT(Objective):
    """Dynamic fine-tuning: c_t = p_t."""

    name: ClassVar[str] = "dft"
    source: ClassVar[str] = "arXiv 2508.05629"

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(batch.logp.exp())
