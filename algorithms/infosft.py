"""InfoSFT: information-aware SFT, which learns most from tokens of medium probability.

Loss: -sg(w_t) log p_t, averaged over the completion tokens of the step, with

    w = p · max(0, 1 - logit(p)/logit(P)),    logit(p) = log(p/(1 - p)).

The weight is p at p = ½, 0 from p = P on, where a token is known well enough, and falls like p log(1/p) for unlikely
tokens, slower than DFT's p. Source: arXiv 2605.14967, whose code (Helloworld10011/InfoSFT) has P = 0.93.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.errors import UserError
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class InfoSFT(Objective):
    """Information-aware SFT: c_t = p_t max(0, 1 - logit(p_t)/logit(P))."""

    name: ClassVar[str] = "infosft"
    source: ClassVar[str] = "arXiv 2605.14967"

    known: float = 0.93
    """P, the probability from which on nothing is learned from a token."""

    def __post_init__(self) -> None:
        if not 0.5 < self.known < 1:
            raise UserError(f"infosft needs known between 0.5 and 1, got {self.known}")

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        logit = batch.logp - torch.log(-torch.expm1(batch.logp))
        information = (1 - logit / math.log(self.known / (1 - self.known))).clamp(min=0)
        return Coefficients(batch.logp.exp() * information, metrics={"known": (information == 0).to(information.dtype)})
