"""MaxRL: advantages relative to the mean reward of the group, which approximate maximum likelihood of a correct answer.

With ρ = π_θ/μ, the loss of a token is

    -min(ρA, clip(ρ, 1-ε, 1+ε) A),    A = (r - mean_G)/mean_G,

summed over each sequence, then averaged over sequences. For rewards of 0 and 1 and ρ = 1, the expected gradient is that
of Σ_k pass@k / k over k < G, the first terms of the series of log p for the probability p of a correct answer: the
first alone is REINFORCE, and the limit maximum likelihood. A prompt has the weight (1 - (1-p)^(G-1))/p, so that hard
prompts count more than in `grpo`, whose weight is about 1/√(p(1-p)).

A group whose samples are all wrong has A = 0, as in prime-rl and SkyRL; with A = -1 there, the series would have one
term more, that of k = G (theorem 2). Rewards should not be negative: a group with a mean of 0 or less has A = 0. The
estimator is on-policy; the clipped ratio extends it to a fixed buffer and to later updates on a batch. μ,
``clip_high`` and ``delta`` as in `grpo`.
Source: arXiv 2602.02710, known from its project page and those implementations.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlzoo.advantages import group_centred, group_mean
from rlzoo.bases import EpsilonClipped
from rlzoo.objective import Normaliser, register
from rlzoo.types import TokenBatch


@register
@dataclass(frozen=True)
class MaxRL(EpsilonClipped):
    """Maximum likelihood reinforcement learning: c_t = ρ_t (r - mean_G)/mean_G 1[not clipped]."""

    name: ClassVar[str] = "maxrl"
    normaliser: ClassVar[Normaliser] = Normaliser.SEQUENCE_SUM
    source: ClassVar[str] = "arXiv 2602.02710"

    def advantage(self, batch: TokenBatch) -> Tensor:
        reward, group = self.needed(batch, "reward", "group")
        mean = group_mean(reward, group)
        relative = group_centred(reward, group) / torch.where(mean > 0, mean, 1)
        return torch.where(mean > 0, relative, 0).to(batch.dtype)
