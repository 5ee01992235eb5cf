"""Dr. GRPO: GRPO without dividing by the standard deviation of a group and by the length of a sequence.

With ρ = π_θ/μ and A = r - mean_G, the loss of a token is

    -min(ρA, clip(ρ, 1-ε, 1+ε) A) / L,

summed over each sequence, then averaged over sequences. L is a constant for the whole run, the paper's budget of tokens
per completion: set ``max_length`` to the length limit in sampling. It only scales the gradient; if it were the length
of the longest completion in a batch, batches would have different weights.
Source: arXiv 2503.20783, which has no KL term either; μ and ``delta`` as in `grpo`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.advantages import group_centred
from rlzoo.errors import UserError
from rlzoo.inputs import Behaviour, Input
from rlzoo.objective import Normaliser, Objective, register
from rlzoo.ratios import check_upper_bound, clipped_gradient, ratio_metrics, token_ratio
from rlzoo.types import Coefficients, Selection, TokenBatch


@register
@dataclass(frozen=True)
class DrGRPO(Objective):
    """GRPO done right: c_t = ρ_t (r - mean_G) 1[not clipped] / L."""

    name: ClassVar[str] = "dr-grpo"
    learns_from: ClassVar[Selection] = Selection.GROUPS
    normaliser: ClassVar[Normaliser] = Normaliser.SEQUENCE_SUM
    source: ClassVar[str] = "arXiv 2503.20783"

    clip: float = 0.2
    max_length: int = 256
    delta: float | None = None

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise UserError(f"dr-grpo needs max_length ≥ 1, got {self.max_length}")
        check_upper_bound("dr-grpo", "delta", self.delta, self.clip)

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Behaviour(),)

    def advantages(self, batch: TokenBatch) -> torch.Tensor:
        reward, group = self.needed(batch, "reward", "group")
        advantage = group_centred(reward, group, batch.dtype)
        return torch.where(batch.mask, advantage[:, None], 0)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        advantage, behaviour = self.needed(batch, "advantage", "behaviour_logp")
        ratio = token_ratio(batch.logp, behaviour, batch.mask)
        values, loss, clipped = clipped_gradient(ratio, advantage, self.clip, self.clip, self.delta)
        metrics = ratio_metrics(batch.logp, ratio, advantage, values, clipped)
        return Coefficients(values / self.max_length, loss=loss / self.max_length, metrics=metrics)
