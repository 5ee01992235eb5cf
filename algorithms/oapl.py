"""OAPL: regression of the policy's log-ratio to the policy that sampled on the optimal advantage.

With V* = β₁ log mean_G exp(r/β₁), the loss of a completion, averaged over completions, is

    (β₂ log(π_θ/μ)(y) - (r - V*))².

This is `a-star-po` with the policy that filled the buffer in place of the reference, so that samples of an older policy
need no importance weight: for β₁ = β₂ = β its minimum is μ exp((r - V*)/β), whatever the policy in training. ``beta``
is β₂ and ``value_beta`` β₁. Source: arXiv 2602.19362, read in summaries and in the tests of an implementation in
NeMo-RL, whose values are the defaults.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlzoo.advantages import optimal_value
from rlzoo.bases import LogRatioRegression
from rlzoo.bases.ratios import check_positive
from rlzoo.inputs import Behaviour, Input
from rlzoo.objective import register
from rlzoo.types import TokenBatch


@register
@dataclass(frozen=True)
class OAPL(LogRatioRegression):
    """Optimal advantage-based policy optimisation with a lagged policy: c_t = 2β₂ (r - V* - β₂ log(π_θ/μ)(y))."""

    name: ClassVar[str] = "oapl"
    source: ClassVar[str] = "arXiv 2602.19362"
    anchor: ClassVar[Input] = Behaviour()

    beta: float = 1e-3
    value_beta: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.name, beta=self.beta, value_beta=self.value_beta)

    def advantage(self, batch: TokenBatch) -> Tensor:
        reward, group = self.needed(batch, "reward", "group")
        return (reward - optimal_value(reward, group, self.value_beta)).to(batch.dtype)
