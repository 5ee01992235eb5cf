"""PEAR: SFT weighted by how likely the policy is to write the rest of the demonstration, relative to its author.

Loss: -sg(w_t) log π_θ(y_t), averaged over the completion tokens of the step. With δ_t = clip(log π_θ/π_β, -0.08, 0.3),
where π_β is the demonstrator, and n completion tokens:

- ``token``: log w_t = (n - t) log γ + Σ_{s>t} δ_s, the importance ratio of what follows the token, discounted;
- ``block``: for all tokens of a block of ``block_size``, the same with the block's last token as t;
- ``sequence``: log w_t = Σ_s δ_s, one weight per completion;

held within -10 and 5. Tokens that lead where the policy would not go itself, and where RL on its own samples will
therefore not come back to, count less. Where π_θ = π_β and γ = 1, PEAR is SFT.

π_β's log-probs are those that the rows record, or, with ``demonstrator``, those of that model (a folder or a Hub id),
computed once and kept in the buffer. Source: arXiv 2602.01058, known to us only through an independent implementation
that quotes its algorithm and settings (blocks of 4 tokens among them).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional

from rlzoo.advantages import last_token, running_sum
from rlzoo.bases.ratios import check_positive
from rlzoo.errors import UserError
from rlzoo.inputs import Behaviour, Input, Reference
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class PEAR(Objective):
    """Policy-evaluation reweighting: c_t = γ^(n-t) Π_{s>t} π_θ/π_β, each ratio and the weight clipped."""

    name: ClassVar[str] = "pear"
    source: ClassVar[str] = "arXiv 2602.01058"

    variant: Literal["token", "block", "sequence"] = "token"
    block_size: int = 4
    demonstrator: str | None = None
    gamma: float = 0.999
    log_ratio_min: float = -0.08
    log_ratio_max: float = 0.3
    log_weight_min: float = -10.0
    log_weight_max: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise UserError(f"pear needs gamma above 0 and at most 1, got {self.gamma}")
        if self.log_ratio_min > self.log_ratio_max or self.log_weight_min > self.log_weight_max:
            raise UserError("pear needs log_ratio_min ≤ log_ratio_max and log_weight_min ≤ log_weight_max")
        check_positive(self.name, block_size=self.block_size)

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Behaviour() if self.demonstrator is None else Reference(self.demonstrator, "behaviour_logp"),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        (demonstrator,) = self.needed(batch, "behaviour_logp")
        log_ratio = (batch.logp - demonstrator).clamp(self.log_ratio_min, self.log_ratio_max)
        log_ratio = torch.where(batch.mask, log_ratio, 0)
        if self.variant == "sequence":
            log_weight = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
        else:
            discounted = log_ratio + math.log(self.gamma) * batch.mask.to(log_ratio.dtype)
            following = functional.pad(discounted, (0, 1))[:, 1:]  # what comes after each token
            log_weight = running_sum(following.flip(1)).flip(1)
            if self.variant == "block":
                log_weight = log_weight.gather(1, last_of_block(batch.mask, self.block_size))
        weight = log_weight.clamp(self.log_weight_min, self.log_weight_max).exp()
        return Coefficients(weight, metrics={"weight": weight})


def last_of_block(mask: Bool[Tensor, "B T"], size: int) -> Int[Tensor, "B T"]:
    """The position of the last token of each token's block, where every ``size`` tokens of a row are a block."""
    after = mask.shape[1] - 1
    ends = mask & (last_token(mask) | (running_sum(mask.long()) % size == 0))
    place = torch.where(ends, torch.arange(mask.shape[1], device=mask.device), after)
    return place.flip(1).cummin(1).values.flip(1)
