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

from rlzoo.bases import ClippedPolicyGradient
from rlzoo.objective import Normaliser, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class GSPO(ClippedPolicyGradient):
    """Group sequence policy optimisation: c_t = s A 1[not clipped], with s the ratio of the sequence."""

    name: ClassVar[str] = "gspo"
    normaliser: ClassVar[Normaliser] = Normaliser.PER_SEQUENCE
    source: ClassVar[str] = "arXiv 2507.18071"
    compared_with: ClassVar[str] = "TRL 1.16"

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    @property
    def bounds(self) -> tuple[float, float]:
        return self.clip_low, self.clip_high

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return self.clipped(batch, level="sequence")
