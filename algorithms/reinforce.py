"""REINFORCE: the plain policy gradient of a completion's reward, minus a baseline.

Loss: -(r - b) Σ_t log π_θ(y_t), averaged over completions. The coefficient of each token is r - b, where b is

- ``mean``: the mean reward of the optimizer batch, which includes the completion's own reward, so that the expected
  gradient is (B - 1)/B of the true one for a batch of B completions;
- ``none``: 0.

There is no importance ratio, so this is the gradient of the expected reward only on samples of the policy in training,
that is, in the first update on fresh samples. On a fixed buffer, or in later updates on a batch, it is that of a
likelihood weighted by rewards.
Source: Williams 1992, doi 10.1007/BF00992696.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rlzoo.advantages import group_centred
from rlzoo.bases import PolicyGradient
from rlzoo.objective import Normaliser, register
from rlzoo.types import TokenBatch


@register
@dataclass(frozen=True)
class Reinforce(PolicyGradient):
    """REINFORCE: c_t = r - b."""

    name: ClassVar[str] = "reinforce"
    normaliser: ClassVar[Normaliser] = Normaliser.SEQUENCE_SUM
    source: ClassVar[str] = "doi 10.1007/BF00992696"

    baseline: Literal["mean", "none"] = "mean"

    def advantage(self, batch: TokenBatch) -> torch.Tensor:
        (reward,) = self.needed(batch, "reward")
        if self.baseline == "none":
            return reward.to(batch.dtype)
        return group_centred(reward, torch.zeros_like(reward, dtype=torch.long), batch.dtype)
