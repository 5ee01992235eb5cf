"""DPO: direct preference optimisation over pairs of a better and a worse completion of one prompt.

With Δ = Σ_t log(π_θ/π_ref)(y⁺) - Σ_t log(π_θ/π_ref)(y⁻), and h̄ the same with means over tokens in place of sums, the
loss of a pair, averaged over pairs, and the coefficient of a token of y⁺ (of y⁻ with the opposite sign) are

- ``sigmoid``: -log σ(βΔ), and β σ(-βΔ);
- ``hinge``: max(0, 1 - βΔ), and β 1[βΔ < 1];
- ``ipo``: (h̄ - 1/(2β))², and -2 (h̄ - 1/(2β)) / |y|.

Sums and means are over the completion only. Sources: arXiv 2305.18290; SLiC, arXiv 2305.10425 (hinge);
arXiv 2310.12036 (IPO), here with means over tokens, as in TRL.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn import functional

from rlzoo.inputs import Input, Reference
from rlzoo.objective import Normaliser, Objective, register
from rlzoo.types import Coefficients, Coupling, Selection, TokenBatch


@register
@dataclass(frozen=True)
class DPO(Objective):
    """Direct preference optimisation: c_t = ±β σ(-βΔ), and its hinge and IPO variants."""

    name: ClassVar[str] = "dpo"
    learns_from: ClassVar[Selection] = Selection.PAIRS
    couples: ClassVar[Coupling] = Coupling.PAIR
    normaliser: ClassVar[Normaliser] = Normaliser.PER_PAIR
    source: ClassVar[str] = "arXiv 2305.18290"

    beta: float = 0.1
    variant: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Reference(),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        reference, partner, chosen = self.needed(batch, "reference_logp", "partner", "chosen")
        log_ratio = torch.where(batch.mask, batch.logp - reference, 0).sum(1)
        length = batch.mask.sum(1).clamp(min=1).to(log_ratio.dtype)
        if self.variant == "ipo":
            log_ratio = log_ratio / length
        sign = torch.where(chosen, 1.0, -1.0).to(log_ratio.dtype)
        margin = sign * (log_ratio - log_ratio[partner])
        if self.variant == "sigmoid":
            pull, loss = (
                self.beta * torch.sigmoid(-self.beta * margin),
                functional.softplus(-self.beta * margin),
            )
        elif self.variant == "hinge":
            loss = (1 - self.beta * margin).clamp(min=0)
            pull = self.beta * (loss > 0).to(log_ratio.dtype)
        else:
            distance = margin - 1 / (2 * self.beta)
            pull, loss = -2 * distance / length, distance.square()
        return Coefficients(
            (sign * pull)[:, None].expand_as(batch.logp),
            loss=torch.where(chosen, loss, 0),  # one loss per pair, carried by its better half
            metrics={"margin": margin, "accuracy": (margin > 0).to(log_ratio.dtype)},
        )
