"""EXO: efficient exact optimisation, the reverse KL from the policy's own preference to the label's.

With z = β [Σ_t log(π_θ/π_ref)(y⁺) - Σ_t log(π_θ/π_ref)(y⁻)] and q = σ(z), the policy prefers y⁺ with probability q, the
label with probability 1-ε. The loss of a pair, averaged over pairs, is

    q log(q/(1-ε)) + (1-q) log((1-q)/ε),

and the coefficient of a token of y is ±β q (1-q) [log((1-ε)/ε) - z], with + for y⁺: it vanishes where the policy's
preference is the label's, and also where the policy is certain, be it wrongly. DPO has the KL the other way round.
Source: arXiv 2402.00856, eq. 16, for K = 2 completions, with its ε = 1e-3; formula checked against TRL 1.16.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from rlzoo.bases import ReferencePairObjective, check_smoothing, of_margin
from rlzoo.bases.ratios import check_positive
from rlzoo.objective import register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class EXO(ReferencePairObjective):
    """Efficient exact optimisation: c_t = ±β q (1-q) [log((1-ε)/ε) - z], with q = σ(z)."""

    name: ClassVar[str] = "exo"
    source: ClassVar[str] = "arXiv 2402.00856"
    compared_with: ClassVar[str] = "TRL 1.16"

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, label_smoothing=self.label_smoothing)
        check_smoothing(self, self.label_smoothing)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        score, wrong = self.log_ratio(batch), self.label_smoothing
        better, worse = self.sides(batch, score)
        z = self.beta * (better - worse)
        q, other = torch.sigmoid(z), torch.sigmoid(-z)
        loss = q * (functional.logsigmoid(z) - math.log1p(-wrong)) + other * (
            functional.logsigmoid(-z) - math.log(wrong)
        )
        pull = self.beta * q * other * (math.log1p(-wrong) - math.log(wrong) - z)
        return self.of_pairs(batch, score, of_margin(loss, pull))
