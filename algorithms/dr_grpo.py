"""Dr. GRPO: GRPO without dividing by the standard deviation of a group and by the length of a sequence.

With ρ = π_θ/μ and A = r - mean_G, the loss of a token is

    -min(ρA, clip(ρ, 1-ε, 1+ε) A) / L,

summed over each sequence, then averaged over sequences. L is a constant for the whole run, the paper's budget of tokens
per completion: set ``max_length`` to the length limit in sampling. It only scales the gradient; if it were the length
of the longest completion in a batch, batches would have different weights.
Source: arXiv 2503.20783, which has no KL term either; μ, ``clip_high`` and ``delta`` as in `grpo`.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlzoo.advantages import group_centred
from rlzoo.bases import EpsilonClipped
from rlzoo.bases.ratios import check_positive
from rlzoo.objective import Normaliser, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class DrGRPO(EpsilonClipped):
    """GRPO done right: c_t = ρ_t (r - mean_G) 1[not clipped] / L."""

    name: ClassVar[str] = "dr-grpo"
    normaliser: ClassVar[Normaliser] = Normaliser.SEQUENCE_SUM
    source: ClassVar[str] = "arXiv 2503.20783"
    compared_with: ClassVar[str] = "TRL 1.16"

    max_length: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, max_length=self.max_length)

    def advantage(self, batch: TokenBatch) -> Tensor:
        reward, group = self.needed(batch, "reward", "group")
        return group_centred(reward, group, batch.dtype)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return self.clipped(batch, length=self.max_length)
