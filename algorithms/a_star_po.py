"""A*-PO: regression of the policy's log-ratio to the reference on the optimal advantage.

With V* = β₁ log mean_G exp(r/β₁), the loss of a completion, averaged over completions, is

    (β₂ log(π_θ/π_ref)(y) - (r - V*))².

Where β₁ = β₂ = β and the group was sampled by π_ref, its minimum is π_ref exp((r - V*)/β), which maximises
E[r] - β KL(π ‖ π_ref). A larger β₁ estimates V* with less noise. ``beta`` is β₂ and ``value_beta`` β₁.

The paper has two stages: V* from samples of π_ref, once; then training on single fresh samples. On a fixed buffer that
the initial policy has sampled, the samples of the first stage are also those that are trained on. With fresh samples,
V* is that of the policy in training, unless ``value_column`` names a column of the problems that holds V*. The official
code and TRL leave out prompts whose samples are all wrong, which are kept here. Source: arXiv 2505.20686, with the
values of its code; TRL's a2po.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlzoo.advantages import optimal_value
from rlzoo.bases import LogRatioRegression
from rlzoo.bases.ratios import check_positive
from rlzoo.errors import UserError
from rlzoo.inputs import Column, Input
from rlzoo.objective import register
from rlzoo.types import TokenBatch


@register
@dataclass(frozen=True)
class AStarPO(LogRatioRegression):
    """Policy optimisation by optimal-advantage regression: c_t = 2β₂ (r - V* - β₂ log(π_θ/π_ref)(y))."""

    name: ClassVar[str] = "a-star-po"
    source: ClassVar[str] = "arXiv 2505.20686"
    compared_with: ClassVar[str] = "TRL 1.16"

    beta: float = 1e-3
    value_beta: float = 0.5
    value_column: str | None = None

    def __post_init__(self) -> None:
        check_positive(self.name, beta=self.beta, value_beta=self.value_beta)

    @property
    def requires(self) -> tuple[Input, ...]:
        return super().requires if self.value_column is None else (*super().requires, Column(self.value_column))

    def advantage(self, batch: TokenBatch) -> Tensor:
        reward, group = self.needed(batch, "reward", "group")
        if self.value_column is None:
            return (reward - optimal_value(reward, group, self.value_beta)).to(batch.dtype)
        value = batch[self.value_column]
        if value.ndim != 1:
            raise UserError(f"a-star-po needs one number per row in the column {self.value_column!r}, not a list")
        return (reward - value).to(batch.dtype)
