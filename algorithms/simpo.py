"""SimPO: preference optimisation with the length-normalised log-likelihood as the reward, and no reference.

With Δ = (1/|y⁺|) Σ_t log π_θ(y⁺_t) - (1/|y⁻|) Σ_t log π_θ(y⁻_t), the loss of a pair, averaged over pairs, is

    -log σ(βΔ - γ),

and the coefficient of a token of y is ±β σ(γ - βΔ) / |y|, with + for y⁺. Source: arXiv 2405.14734. The defaults are
its setting for Llama-3-Base, which the authors also recommend as a starting point: β = 2, γ/β = ½ (TRL's default is
γ = ½).
"""

from dataclasses import dataclass
from typing import ClassVar

from rlzoo.bases import PairObjective, length, logistic, of_margin, total
from rlzoo.bases.ratios import check_positive
from rlzoo.objective import register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class SimPO(PairObjective):
    """Simple preference optimisation: c_t = ±β σ(γ - βΔ) / |y|, with Δ the difference of per-token means."""

    name: ClassVar[str] = "simpo"
    source: ClassVar[str] = "arXiv 2405.14734"
    compared_with: ClassVar[str] = "TRL 1.16"

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.name, beta=self.beta)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        score = total(batch, batch.logp) / length(batch)
        better, worse = self.sides(batch, score)
        loss, pull = logistic(self.beta * (better - worse) - self.gamma)
        return self.of_pairs(batch, score, of_margin(loss, self.beta * pull / length(batch)))
