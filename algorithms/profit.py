"""ProFit: probability-guided token selection, SFT without unlikely tokens.

Loss: -1[p_t ≥ τ] log p_t, averaged over all completion tokens of the step, kept or not. τ = 0 is SFT. `power` with
alpha = 0 and a threshold selects the same tokens, but divides by the number of those that are kept, so its step does
not shrink with their share.

Source: arXiv 2601.09195, eq. 5, which divides by the length of the sequence; its code (Utaotao/ProFit) divides by the
completion tokens of the step, as here, and its script has τ = 0.1.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from rlzoo.errors import UserError
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class ProFit(Objective):
    """Probability-guided token selection: c_t = 1[p_t ≥ τ]."""

    name: ClassVar[str] = "profit"
    source: ClassVar[str] = "arXiv 2601.09195"

    threshold: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise UserError(f"profit needs a threshold of at least 0 and below 1, got {self.threshold}")

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        least = math.log(self.threshold) if self.threshold else -math.inf
        kept = (batch.logp >= least).to(batch.dtype)
        return Coefficients(kept, metrics={"kept": kept})
