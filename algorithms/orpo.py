"""ORPO: SFT on the better completion of a pair, with a penalty on the odds of the worse one, and without a reference.

With ℓ(y) = (1/|y|) Σ_t log π_θ(y_t), P = exp(ℓ) and log odds(y) = ℓ - log(1 - P), the loss of a pair, averaged over
pairs, is

    -ℓ(y⁺) - λ log σ(Ω),    Ω = log odds(y⁺) - log odds(y⁻).

As d log odds / dℓ = 1/(1 - P), the coefficient of a token is (1 + λ σ(-Ω)/(1 - P⁺)) / |y⁺| in y⁺ and
-λ σ(-Ω)/(1 - P⁻) / |y⁻| in y⁻. Source: arXiv 2403.07691; λ = 0.1 as in TRL. The paper's SFT loss is taken as -ℓ(y⁺),
the mean over the tokens of a completion, in line with its definition of P; TRL averages over all tokens of the
micro-batch, including those of prompts. ℓ is kept below -1e-6, because the odds of a certain completion would be
infinite.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlzoo.bases import PairLoss, PairObjective, length, logistic, total
from rlzoo.objective import register
from rlzoo.types import Coefficients, TokenBatch

CERTAIN = -1e-6
"""The upper bound on mean log-probs."""


@register
@dataclass(frozen=True)
class ORPO(PairObjective):
    """Odds-ratio preference optimisation: c_t = (1[y⁺] ± λ σ(-Ω)/(1 - P)) / |y|."""

    name: ClassVar[str] = "orpo"
    source: ClassVar[str] = "arXiv 2403.07691"
    compared_with: ClassVar[str] = "TRL 1.16"

    lam: float = 0.1

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        mean = total(batch, batch.logp) / length(batch)
        held = mean.clamp(max=CERTAIN)
        odds = held - log1mexp(held)
        better, worse = self.sides(batch, odds)
        loss, pull = logistic(better - worse)
        slope = torch.where(mean < CERTAIN, -1 / torch.expm1(held), 0)  # d log odds / dℓ = 1/(1 - P)
        pull = self.lam * pull * slope
        own, _ = self.sides(batch, mean)
        found = PairLoss(self.lam * loss - own, (1 + pull) / length(batch), -pull / length(batch))
        return self.of_pairs(batch, odds, found, "log_odds_ratio")


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without the cancellation on either side of exp(x) = ½."""
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
