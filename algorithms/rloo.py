"""RLOO: REINFORCE with the mean reward of the prompt's other completions as its baseline.

Loss: -(r - mean of the others) Σ_t log π_θ(y_t), averaged over completions. The coefficient of each token is
G/(G-1) (r - mean_G); 0 for a group of one. Since the baseline does not include the completion's own reward, it does
not change the expected gradient.

There is no importance ratio: see `reinforce` for what that means on a fixed buffer. The paper subtracts
β log(π_θ/π_ref) from the reward; here the reward is unchanged. Source: arXiv 2402.14740.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlzoo.advantages import leave_one_out
from rlzoo.bases import PolicyGradient
from rlzoo.objective import Normaliser, register
from rlzoo.types import TokenBatch


@register
@dataclass(frozen=True)
class RLOO(PolicyGradient):
    """REINFORCE, leave one out: c_t = G/(G-1) (r - mean_G)."""

    name: ClassVar[str] = "rloo"
    normaliser: ClassVar[Normaliser] = Normaliser.SEQUENCE_SUM
    source: ClassVar[str] = "arXiv 2402.14740"
    compared_with: ClassVar[str] = "TRL 1.16"

    def advantage(self, batch: TokenBatch) -> Tensor:
        reward, group = self.needed(batch, "reward", "group")
        return leave_one_out(reward, group, batch.dtype)
