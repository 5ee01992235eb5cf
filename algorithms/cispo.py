"""CISPO: the policy gradient with a clipped importance weight, so that every token keeps its gradient.

With ρ = π_θ/μ and A = (r - mean_G)/(std_G + 1e-4), the loss of a token is

    -sg(clip(ρ, ratio_min, ratio_max)) A log π_θ(y_t),

averaged over the completion tokens of the step (in the paper, of a group). The stop-gradient matters: without it a
clipped token has no gradient. There is no KL term; μ as in `grpo`. Source: arXiv 2506.13585, eq. 4 and 5, where the
bounds are 1 - ε_low and 1 + ε_high; the paper uses no lower bound and does not state the upper one, for which
arXiv 2510.13786 recommends 5.
"""

from dataclasses import dataclass
from typing import ClassVar

from rlzoo.bases import OffPolicyGradient
from rlzoo.bases.ratios import ratio_metrics, token_ratio
from rlzoo.objective import register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class CISPO(OffPolicyGradient):
    """Clipped importance-weight policy optimisation: c_t = clip(ρ_t) A."""

    name: ClassVar[str] = "cispo"
    source: ClassVar[str] = "arXiv 2506.13585"
    compared_with: ClassVar[str] = "TRL 1.16"

    ratio_min: float = 0.0
    ratio_max: float = 5.0

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        advantage, behaviour = self.needed(batch, "advantage", "behaviour_logp")
        ratio = token_ratio(batch.logp, behaviour, batch.mask)
        weight = ratio.clamp(self.ratio_min, self.ratio_max)
        values = weight * advantage
        return Coefficients(values, metrics=ratio_metrics(batch.logp, ratio, advantage, values, weight != ratio))
