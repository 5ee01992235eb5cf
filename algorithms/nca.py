"""NCA: noise contrastive alignment, which keeps the likelihood of the better completion of a pair from falling.

With r = β Σ_t log(π_θ/π_ref)(y_t), the loss of a pair, averaged over pairs, is

    -log σ(r⁺) - ½ log σ(-r⁺) - ½ log σ(-r⁻),

so that the coefficient of a token of y⁺ is β [σ(-r⁺) - ½ σ(r⁺)], and of one of y⁻ -½ β σ(r⁻). Each depends on its own
completion alone: r⁺ is drawn to log 2. Source: arXiv 2402.05369, for pairs with a certain label; formula read in TRL
1.16.
"""

from dataclasses import dataclass
from typing import ClassVar

from rlzoo.bases import PairLoss, ReferencePairObjective, logistic
from rlzoo.objective import register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class NCA(ReferencePairObjective):
    """Noise contrastive alignment: c_t = β [σ(-r⁺) - ½ σ(r⁺)] in y⁺, -½ β σ(r⁻) in y⁻."""

    name: ClassVar[str] = "nca"
    source: ClassVar[str] = "arXiv 2402.05369"
    compared_with: ClassVar[str] = "TRL 1.16"

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        score = self.log_ratio(batch)
        better, worse = self.sides(batch, self.beta * score)
        (gain, up), (harm, down) = logistic(better, 1.0, 0.5), logistic(worse, 0.0, 0.5)
        return self.of_pairs(batch, score, PairLoss(gain + harm, self.beta * up, self.beta * down))
