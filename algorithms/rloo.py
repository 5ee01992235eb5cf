"""RLOO: REINFORCE with the mean reward of the prompt's other completions as its baseline.

Loss: -(r - mean of the others) Σ_t log π_θ(y_t), averaged over completions. The coefficient of each token is
G/(G-1) (r - mean_G); a group of one has none to compare with, and 0. As the baseline does not hold the completion's own
reward, it leaves the expected gradient as it is.

There is no importance ratio: see `reinforce` for what that means on a fixed buffer. The paper takes β log(π_θ/π_ref)
off the reward; here the reward is as it comes. Source: arXiv 2402.14740.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.advantages import leave_one_out
from rlzoo.objective import Normaliser, Objective, register
from rlzoo.types import Coefficients, Selection, TokenBatch


@register
@dataclass(frozen=True)
class RLOO(Objective):
    """REINFORCE, leave one out: c_t = G/(G-1) (r - mean_G)."""

    name: ClassVar[str] = "rloo"
    learns_from: ClassVar[Selection] = Selection.GROUPS
    normaliser: ClassVar[Normaliser] = Normaliser.SEQUENCE_SUM
    source: ClassVar[str] = "arXiv 2402.14740"

    def advantages(self, batch: TokenBatch) -> torch.Tensor:
        reward, group = self.needed(batch, "reward", "group")
        advantage = leave_one_out(reward, group, batch.dtype)
        return torch.where(batch.mask, advantage[:, None], 0)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        (advantage,) = self.needed(batch, "advantage")
        return Coefficients(advantage)
