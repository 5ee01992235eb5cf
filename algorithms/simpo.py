"""SimPO: preference optimisation with the length-normalised log-likelihood as the reward, and no reference.

With Δ = (1/|y⁺|) Σ_t log π_θ(y⁺_t) - (1/|y⁻|) Σ_t log π_θ(y⁻_t), the loss of a pair, averaged over pairs, is

    -log σ(βΔ - γ),

and the coefficient of a token of y is ±β σ(γ - βΔ) / |y|, with + for y⁺. Source: arXiv 2405.14734. The defaults are
its setting for Llama-3-Base, which the authors also recommend as a starting point: β = 2, γ/β = ½ (TRL's default is
γ = ½).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from rlzoo.objective import Normaliser, Objective, register
from rlzoo.types import Coefficients, Coupling, Selection, TokenBatch


@register
@dataclass(frozen=True)
class SimPO(Objective):
    """Simple preference optimisation: c_t = ±β σ(γ - βΔ) / |y|, with Δ the difference of per-token means."""

    name: ClassVar[str] = "simpo"
    learns_from: ClassVar[Selection] = Selection.PAIRS
    couples: ClassVar[Coupling] = Coupling.PAIR
    normaliser: ClassVar[Normaliser] = Normaliser.PER_PAIR
    source: ClassVar[str] = "arXiv 2405.14734"

    beta: float = 2.0
    gamma: float = 1.0

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        partner, chosen = self.needed(batch, "partner", "chosen")
        length = batch.mask.sum(1).clamp(min=1).to(batch.dtype)
        mean_logp = torch.where(batch.mask, batch.logp, 0).sum(1) / length
        sign = torch.where(chosen, 1.0, -1.0).to(mean_logp.dtype)
        margin = sign * (mean_logp - mean_logp[partner])
        excess = self.beta * margin - self.gamma
        pull = self.beta * torch.sigmoid(-excess) / length
        return Coefficients(
            (sign * pull)[:, None].expand_as(batch.logp),
            loss=torch.where(chosen, functional.softplus(-excess), 0),  # one per pair, carried by its better half
            metrics={"margin": margin, "accuracy": (margin > 0).to(mean_logp.dtype)},
        )
