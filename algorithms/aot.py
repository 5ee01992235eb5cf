"""AOT: alignment by optimal transport, the logistic loss of sorted values in place of those of one pair.

For the P pairs of an optimizer step, the k-th smallest of one kind of value is compared with the k-th smallest of
another: u_(k) - v_(k), k = 1 … P. The loss of each, averaged over k, is that of conservative DPO,

    -(1-ε) log σ(z) - ε log σ(-z),    z = β (u_(k) - v_(k)),

With ``paired``, u = log π_θ(y⁺) - log π_θ(y⁻), and v is the same under π_ref: the coefficient of a token is
±β [(1-ε) σ(-z) - ε σ(z)], with + for y⁺, k being the rank of its pair in u. With ``unpaired``, u is
Σ_t log(π_θ/π_ref)(y⁺), and v the same of y⁻: k is the rank of y⁺ in u, and of y⁻ in v.

Source: arXiv 2406.05882; formulas read in TRL 1.16, which sorts each micro-batch, whereas here all pairs of an
optimizer step are sorted.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rlzoo.bases import PairLoss, ReferencePairObjective, Rows, check_smoothing, logistic, total
from rlzoo.objective import register
from rlzoo.types import Coefficients, Coupling, TokenBatch


@register
@dataclass(frozen=True)
class AOT(ReferencePairObjective):
    """Alignment by optimal transport: c_t = ±β σ(-β (u_(k) - v_(k))), of sorted values."""

    name: ClassVar[str] = "aot"
    couples: ClassVar[Coupling] = Coupling.BATCH
    source: ClassVar[str] = "arXiv 2406.05882"
    compared_with: ClassVar[str] = "TRL 1.16"

    variant: Literal["paired", "unpaired"] = "paired"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self, self.label_smoothing)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        reference, chosen = self.needed(batch, "reference_logp", "chosen")
        score = self.log_ratio(batch)
        if self.variant == "paired":
            of_policy, of_reference = (self.sides(batch, total(batch, x)) for x in (batch.logp, reference))
            left, right = of_policy[0] - of_policy[1], of_reference[0] - of_reference[1]
        else:
            left, right = self.sides(batch, score)
        (left, left_at), (right, right_at) = (
            torch.where(chosen, x, torch.inf).sort(stable=True) for x in (left, right)
        )
        z = torch.where(left.isinf(), 0, self.beta * (left - right))  # the other half of the rows comes last
        loss, pull = logistic(z, 1 - self.label_smoothing, self.label_smoothing)
        loss, up, down = (at_rows(x, at) for x, at in ((loss, left_at), (pull, left_at), (pull, right_at)))
        if self.variant == "paired":
            down = up
        found = PairLoss(loss, *(self.beta * self.sides(batch, x)[0] * sign for x, sign in ((up, 1), (down, -1))))
        return self.of_pairs(batch, score, found)


def at_rows(values: Rows, order: Rows) -> Rows:
    """Sorted values [B] at the rows that they come from."""
    return torch.empty_like(values).scatter_(0, order, values)
