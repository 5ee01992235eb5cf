"""RLOO: REINFORCE with the mean reward of the prompt's other completions as its baseline.

Loss: -(r - mean of the others) Σ_t log π_θ(y_t), averaged over completions. The coefficient of each token is
G/(G-1) (r - mean_G); 0 for a group of one. Since the baseline does not include the completion's own reward, it does
not change the expected gradient.

There is no importance ratio: see `reinforce` for what that means on a fixed buffer. The paper subtracts
β log(π_θ/π_ref) from the reward; here the reward is unchanged. Source: arXiv 2402.14740.
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
