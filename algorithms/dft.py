"""DFT: dynamic fine-tuning, SFT with each token weighted by its own probability.

Loss: -sg(w_t) log π_θ(y_t), averaged over the completion tokens of the step: divided by their number, not by Σ w_t. The
stop-gradient matters: without it the coefficient would be p(1 + log p), which is negative below p = 1/e. The weight:

- ``token``: w_t = p_t = π_θ(y_t), the paper's method;
- ``sentence``: w_t = Π_s p_s, the probability of the whole completion, which is nearly 0 for a long one;
- ``geometric_mean``: w_t = (Π_s p_s)^(1/n), for a completion of n tokens.

The paper has the last two as ablations: with its 1.5B model, they gain 0 and 1 points over the base, and ``token`` 16.
``aggregation: sequence`` averages over the tokens of each completion first, as in `sft`.
Source: arXiv 2508.05629, eq. 9.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rlzoo.objective import Normaliser, Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class DFT(Objective):
    """Dynamic fine-tuning: c_t = p_t."""

    name: ClassVar[str] = "dft"
    source: ClassVar[str] = "arXiv 2508.05629"
    compared_with: ClassVar[str] = "TRL 1.16"

    variant: Literal["token", "sentence", "geometric_mean"] = "token"
    aggregation: Literal["token", "sequence"] = "token"

    @property
    def normaliser(self) -> Normaliser:
        return Normaliser(f"per_{self.aggregation}")

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        if self.variant == "token":
            return Coefficients(batch.logp.exp())
        log_weight = torch.where(batch.mask, batch.logp, 0).sum(1, keepdim=True)
        if self.variant == "geometric_mean":
            log_weight = log_weight / batch.mask.sum(1, keepdim=True).clamp(min=1)
        weight = log_weight.exp().expand_as(batch.logp)
        return Coefficients(weight, metrics={"weight": weight})
