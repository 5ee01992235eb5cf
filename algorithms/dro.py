"""DRO: direct reward optimisation, the policy gradient with a quadratic penalty that keeps it near the sampling policy.

With A = r - mean_G, the loss of a token is

    -A log π_θ(y_t) + ½ β log²(π_θ/μ)(y_t),

summed over each completion, then averaged over completions; its coefficient is A - β log(π_θ/μ)(y_t), where a log-ratio
counts as at most 20 in size. ``level: sequence`` puts the log-ratio of the whole completion in place of the token's.

With ``level: token`` this is the loss of Tinker, to which the advantage is left. The sources have the sequence's:
Richemond et al., arXiv 2405.19107, with a learned value of the prompt in place of mean_G and a frozen reference in
place of μ; and Kimi k1.5, arXiv 2501.12599, with mean_G and μ. There the loss is 1/(2β) times the squared error of
β log(π_θ/μ)(y) against A, as in `oapl`, and needs no importance ratio. Source: arXiv 2405.19107, and the documentation
of Tinker, whose example has this β.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlzoo.advantages import group_centred
from rlzoo.bases import OffPolicyGradient
from rlzoo.bases.ratios import RATIO_MAX, sequence_log_ratio
from rlzoo.objective import Normaliser, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class DRO(OffPolicyGradient):
    """Direct reward optimisation: c_t = A - β log(π_θ/μ)(y_t)."""

    name: ClassVar[str] = "dro"
    normaliser: ClassVar[Normaliser] = Normaliser.SEQUENCE_SUM
    source: ClassVar[str] = "arXiv 2405.19107"

    beta: float = 0.05
    level: Literal["token", "sequence"] = "token"

    def advantage(self, batch: TokenBatch) -> Tensor:
        reward, group = self.needed(batch, "reward", "group")
        return group_centred(reward, group, batch.dtype)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        advantage, behaviour = self.needed(batch, "advantage", "behaviour_logp")
        limit = math.log(RATIO_MAX)
        log_ratio = torch.where(batch.mask, batch.logp - behaviour, 0).clamp(-limit, limit)
        penalty = self.beta / 2 * log_ratio.square()
        if self.level == "sequence":
            log_ratio = sequence_log_ratio(batch.logp, behaviour, batch.mask).expand_as(advantage)
            penalty = self.beta / 2 * log_ratio.square() / batch.mask.sum(1, keepdim=True).clamp(min=1)
        loss = -advantage * torch.where(batch.mask, batch.logp, 0) + penalty
        return Coefficients(advantage - self.beta * log_ratio, loss=loss, metrics={"log_ratio": log_ratio})
