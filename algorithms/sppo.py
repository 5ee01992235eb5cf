"""SPPO: self-play preference optimisation, with the label of a pair as a certain preference.

With r = Σ_t log(π_θ/π_ref)(y_t), the loss of a pair, averaged over pairs, is

    (r⁺ - 1/(2β))² + (r⁻ + 1/(2β))²,

so that the coefficient of a token of y⁺ is 2 (1/(2β) - r⁺), and of one of y⁻ -2 (1/(2β) + r⁻). Each depends on its own
completion alone. Source: arXiv 2405.00675, eq. 4.7, with η = 1/β, the probability of winning 1 for y⁺ and 0 for y⁻ in
place of estimates by a preference model, and the initial policy as the reference, as in TRL 1.16; the paper's is the
policy of the round before, which `stages` in an experiment give.
"""

from dataclasses import dataclass
from typing import ClassVar

from rlzoo.bases import PairLoss, ReferencePairObjective
from rlzoo.objective import register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class SPPO(ReferencePairObjective):
    """Self-play preference optimisation: c_t = 2 (1/(2β) - r⁺) in y⁺, -2 (1/(2β) + r⁻) in y⁻."""

    name: ClassVar[str] = "sppo"
    source: ClassVar[str] = "arXiv 2405.00675"
    compared_with: ClassVar[str] = "TRL 1.16"

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        score, goal = self.log_ratio(batch), 1 / (2 * self.beta)
        better, worse = self.sides(batch, score)
        loss = (better - goal).square() + (worse + goal).square()
        return self.of_pairs(batch, score, PairLoss(loss, 2 * (goal - better), -2 * (goal + worse)))
