"""KTO: Kahneman-Tversky optimisation, from single completions that are each good or bad.

With r = Σ_t log(π_θ/π_ref)(y_t), the loss of a completion, averaged over completions, is λ_y - v with

- v = λ_D σ(β(r - z0)) for a desirable completion, and thus c_t = λ_D β σ(β(r - z0)) σ(β(z0 - r));
- v = λ_U σ(β(z0 - r)) for an undesirable one, and thus c_t = -λ_U β σ(β(r - z0)) σ(β(z0 - r)).

z0, which has no gradient, is the batch mean of r over completions paired with the prompts of other rows, but at least
0: a cheap, biased estimate of KL(π_θ ‖ π_ref). A completion is desirable if its reward reaches ``threshold``. The
weights should balance the two kinds: λ_D n_D between 1 and 4/3 times λ_U n_U (eq. 8). Source: arXiv 2402.01306, with
TRL's defaults. Here z0 is computed over the whole optimizer step; TRL computes it per micro-batch, whose size then
matters.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.bases.ratios import check_positive
from rlzoo.inputs import Input, Mismatched, Reference
from rlzoo.objective import Normaliser, Objective, register
from rlzoo.types import Coefficients, Selection, TokenBatch


@register
@dataclass(frozen=True)
class KTO(Objective):
    """Kahneman-Tversky optimisation: c_t = ±λ β σ(β(r - z0)) σ(β(z0 - r))."""

    name: ClassVar[str] = "kto"
    learns_from: ClassVar[Selection] = Selection.UNPAIRED
    normaliser: ClassVar[Normaliser] = Normaliser.SEQUENCE_SUM
    source: ClassVar[str] = "arXiv 2402.01306"
    compared_with: ClassVar[str] = "TRL 1.16"

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_positive(self.name, beta=self.beta)

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Reference(), Mismatched())

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        reference, reward, mismatched = self.needed(batch, "reference_logp", "reward", "mismatched")
        log_ratio = torch.where(batch.mask, batch.logp - reference, 0).sum(1)
        baseline = mismatched.clamp(min=0)
        desirable = reward >= self.threshold
        sign = torch.where(desirable, 1.0, -1.0).to(log_ratio.dtype)
        good, bad = (torch.full_like(log_ratio, w) for w in (self.desirable_weight, self.undesirable_weight))
        weights = torch.where(desirable, good, bad)
        value = torch.sigmoid(self.beta * sign * (log_ratio - baseline))
        return Coefficients(
            (sign * weights * self.beta * value * (1 - value))[:, None].expand_as(batch.logp),
            loss=weights * (1 - value),
            metrics={
                "kl": baseline,
                "desirable_log_ratio": torch.where(desirable, log_ratio, torch.nan),
                "undesirable_log_ratio": torch.where(desirable, torch.nan, log_ratio),
            },
        )
