"""MemFT: memorisation-oriented fine-tuning, SFT on the tokens that greedy decoding may still get wrong.

Loss: -log p_t where p_t < τ, averaged over those tokens of the step. A token with p > ½ is the most likely one whatever
the rest of the distribution, so greedy decoding recites a text whose tokens all are above τ = ½, and learning from them
changes nothing. It is the reverse of `profit`, which learns only from likely tokens; τ > 1 is SFT.

Source: arXiv 2605.30260, as its code (zjunlp/ParametricMemoryLaw) has the variant MemFT-OT; that code falls back to SFT
on a batch in which no token is below τ, which here has a gradient of 0. The paper's second variant, MemFT-SW, is left
out, because the code has two different methods under this name: a curriculum over samples, and weights that decay after
a sample's first error, within a window that widens while the sample makes no progress.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.advantages import masked_mean
from rlzoo.errors import UserError
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, Coupling, TokenBatch


@register
@dataclass(frozen=True)
class MemFT(Objective):
    """Memorisation-oriented fine-tuning: c_t = 1[p_t < τ] / (the share of tokens with p_t < τ)."""

    name: ClassVar[str] = "memft"
    source: ClassVar[str] = "arXiv 2605.30260"
    couples: ClassVar[Coupling] = Coupling.BATCH  # kept tokens are counted over the whole step

    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise UserError(f"memft needs a threshold above 0, got {self.threshold}")

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        kept = (batch.mask & (batch.logp < math.log(self.threshold))).to(batch.dtype)
        share = masked_mean(kept, batch.mask).clamp(min=torch.finfo(kept.dtype).tiny)
        return Coefficients(kept / share, metrics={"kept": kept})
