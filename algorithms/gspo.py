"""GSPO: GRPO with one ratio per sequence, the geometric mean of its tokens' ratios.

With s = (π_θ(y)/μ(y))^(1/|y|) and A = (r - mean_G)/(std_G + 1e-4), the loss of a sequence is

    -min(sA, clip(s, 1-ε_low, 1+ε_high) A),

averaged over sequences. Where s is not clipped, its gradient is -sA · mean_t ∇log π_θ(y_t): a token has the coefficient
sA, and a sequence the weight 1/|y|. The bounds are far tighter than GRPO's, because a mean of |y| log-ratios is far
smaller than a single one. There is no KL term; μ and ``delta`` as in `grpo`. Source: arXiv 2507.18071, with the bounds
of section 5.1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.advantages import group_normalised
from rlzoo.inputs import Behaviour, Input
from rlzoo.objective import Normaliser, Objective, register
from rlzoo.ratios import check_upper_bound, clipped_gradient, ratio_metrics, sequence_ratio
from rlzoo.types import Coefficients, Selection, TokenBatch


@register
@dataclass(frozen=True)
class GSPO(Objective):
    """Group sequence policy optimisation: c_t = s A 1[not clipped], with s the ratio of the sequence."""

    name: ClassVar[str] = "gspo"
    learns_from: ClassVar[Selection] = Selection.GROUPS
    normaliser: ClassVar[Normaliser] = Normaliser.PER_SEQUENCE
    source: ClassVar[str] = "arXiv 2507.18071"

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    delta: float | None = None

    def __post_init__(self) -> None:
        check_upper_bound("gspo", "delta", self.delta, self.clip_high)

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Behaviour(),)

    def advantages(self, batch: TokenBatch) -> torch.Tensor:
        reward, group = self.needed(batch, "reward", "group")
        advantage = group_normalised(reward, group, dtype=batch.dtype)
        return torch.where(batch.mask, advantage[:, None], 0)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        advantage, behaviour = self.needed(batch, "advantage", "behaviour_logp")
        ratio = sequence_ratio(batch.logp, behaviour, batch.mask)
        values, loss, clipped = clipped_gradient(ratio, advantage, self.clip_low, self.clip_high, self.delta)
        metrics = ratio_metrics(batch.logp, ratio, advantage, values, clipped)
        metrics["sequence_ratio"] = metrics.pop("ratio")  # s is not an importance weight
        return Coefficients(values, loss=loss, metrics=metrics)
