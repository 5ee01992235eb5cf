"""PSFT: proximal supervised fine-tuning, SFT with PPO's trust region.

With ρ_t = π_θ/π_old, the loss of a token is -min(ρ_t, 1+ε), averaged over the completion tokens of the step: PPO's
clipped loss with an advantage of 1 for every token of a demonstration, so that only the upper clip applies. A token
whose probability has grown by more than a factor of 1+ε since the start of the batch gets no gradient.

π_old is the policy at the start of the batch, so at the first update ρ = 1 and the gradient is SFT's. PSFT differs from
SFT only from the second update on a batch: set training.mini_batches, to 8 as in the paper, or updates_per_batch, for
updates on all of it (with 1 of both it is SFT). Source: arXiv 2508.17784.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.bases.ratios import ratio_metrics, token_ratio
from rlzoo.inputs import Input, Snapshot
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class PSFT(Objective):
    """Proximal supervised fine-tuning: c_t = ρ_t 1[ρ_t ≤ 1+ε]."""

    name: ClassVar[str] = "psft"
    source: ClassVar[str] = "arXiv 2508.17784"

    clip: float = 0.28

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Snapshot(),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        (snapshot,) = self.needed(batch, "snapshot_logp")
        ratio = token_ratio(batch.logp, snapshot, batch.mask)
        clipped = ratio > 1 + self.clip
        values = torch.where(clipped, 0, ratio)
        return Coefficients(
            values,
            loss=-ratio.clamp(max=1 + self.clip),
            metrics=ratio_metrics(batch.logp, ratio, torch.ones_like(ratio), values, clipped),
        )
