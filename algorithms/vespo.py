"""VESPO: the policy gradient with a smooth weight of the ratio of the whole completion.

With w = (π_θ/μ)(y) and A = (r - mean_G)/(std_G + 1e-4), the loss of a token is

    -sg(φ(w)) A log π_θ(y_t),    φ(w) = exp(λ + k log w - λw) = w^k e^{λ(1-w)},

averaged over the completion tokens of the step. φ(1) = 1; φ falls to 0 as w goes to 0 or grows large, and k and λ say
how fast on either side, with other values for A < 0. Unlike in `gspo`, w is not normalised by length. log w is held
between log 1e-8 and 20, as in the official code and TRL. There is no KL term; μ as in `grpo`.
Source: arXiv 2602.10693, with the values of its code.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.bases import OffPolicyGradient
from rlzoo.bases.ratios import RATIO_MAX, sequence_log_ratio
from rlzoo.objective import register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class VESPO(OffPolicyGradient):
    """Variational sequence-level soft policy optimisation: c_t = w^k e^{λ(1-w)} A, with w = (π_θ/μ)(y)."""

    name: ClassVar[str] = "vespo"
    source: ClassVar[str] = "arXiv 2602.10693"
    compared_with: ClassVar[str] = "TRL 1.16"

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        advantage, behaviour = self.needed(batch, "advantage", "behaviour_logp")
        log_ratio = sequence_log_ratio(batch.logp, behaviour, batch.mask)
        log_ratio = log_ratio.clamp(math.log(1e-8), math.log(RATIO_MAX)).expand_as(advantage)
        is_bad = advantage < 0
        k = torch.full_like(advantage, self.k_positive).masked_fill(is_bad, self.k_negative)
        decay = torch.full_like(advantage, self.lambda_positive).masked_fill(is_bad, self.lambda_negative)
        weight = (k * log_ratio - decay * log_ratio.expm1()).exp()
        return Coefficients(weight * advantage, metrics={"log_ratio": log_ratio, "weight": weight})
