"""TOPR: REINFORCE on stale samples, in which a bad completion counts less the less likely it has become.

With w = (π_θ/μ)(y), the ratio of the whole completion, and A = r - baseline, the loss of a completion is

    -A log π_θ(y) where A ≥ 0,    -sg(min(w, 1)) A log π_θ(y) where A < 0,

averaged over completions. Good completions are imitated at full weight however unlikely they are, and the push against
a bad one tapers off as it succeeds, so that a fixed buffer can be used for long. The paper's rewards are ±1, and its
baseline shifts the balance between good and bad. With rewards of 0 and 1 the default ``baseline`` of ½ is the same up
to a factor of 2, and 0 leaves the good completions only.

A long completion soon has a w near 0 or above 1. An implementation for verl takes the geometric mean over tokens as w,
and averages the loss over tokens; here both are the paper's. μ as in `grpo`. Source: arXiv 2503.14286, known from its
abstract, summaries and implementations.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlzoo.bases import OffPolicyGradient
from rlzoo.bases.ratios import sequence_log_ratio
from rlzoo.objective import Normaliser, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class TOPR(OffPolicyGradient):
    """Tapered off-policy REINFORCE: c_t = A where A ≥ 0, min((π_θ/μ)(y), 1) A where A < 0."""

    name: ClassVar[str] = "topr"
    normaliser: ClassVar[Normaliser] = Normaliser.SEQUENCE_SUM
    source: ClassVar[str] = "arXiv 2503.14286"

    baseline: float = 0.5

    def advantage(self, batch: TokenBatch) -> Tensor:
        (reward,) = self.needed(batch, "reward")
        return (reward - self.baseline).to(batch.dtype)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        advantage, behaviour = self.needed(batch, "advantage", "behaviour_logp")
        weight = sequence_log_ratio(batch.logp, behaviour, batch.mask).clamp(max=0).exp().expand_as(advantage)
        values = torch.where(advantage < 0, weight * advantage, advantage)
        return Coefficients(values, metrics={"taper": torch.where(advantage < 0, weight, torch.nan)})
