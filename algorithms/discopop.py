"""DiscoPOP: a preference loss that a language model proposed, between DPO's logistic loss and an exponential one.

With z = β [Σ_t log(π_θ/π_ref)(y⁺) - Σ_t log(π_θ/π_ref)(y⁻)] and m = σ(z/τ), the loss of a pair, averaged over pairs, is

    (1-m) softplus(-z) + m exp(-z),

and the coefficient of a token of y is ±β times its negative derivative in z, with + for y⁺,

    (1-m) σ(-z) + m exp(-z) + m (1-m) [softplus(-z) - exp(-z)] / τ,

which is negative where |z| is small, as the loss has a hump there. Source: arXiv 2406.08414, eq. 5 (log-ratio modulated
loss), with its τ = 0.05; formula checked against TRL 1.16.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from rlzoo.bases import ReferencePairObjective, logistic, of_margin
from rlzoo.bases.ratios import check_positive
from rlzoo.objective import register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class DiscoPOP(ReferencePairObjective):
    """Discovered preference optimisation: c_t = ±β times the slope of (1-m) softplus(-z) + m exp(-z), m = σ(z/τ)."""

    name: ClassVar[str] = "discopop"
    source: ClassVar[str] = "arXiv 2406.08414"
    compared_with: ClassVar[str] = "TRL 1.16"

    tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, tau=self.tau)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        score = self.log_ratio(batch)
        better, worse = self.sides(batch, score)
        z = self.beta * (better - worse)
        share, rest = torch.sigmoid(z / self.tau), torch.sigmoid(-z / self.tau)
        exponential = torch.exp(functional.logsigmoid(z / self.tau) - z)  # m exp(-z), which does not overflow
        loss, pull = logistic(z)
        pull = rest * pull + exponential + rest * (share * loss - exponential) / self.tau
        return self.of_pairs(batch, score, of_margin(rest * loss + exponential, self.beta * pull))
