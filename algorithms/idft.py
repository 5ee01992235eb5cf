"""IDFT: in-distribution fine-tuning, DFT with an exponent per token.

Loss: -sg(p_t^γ_t) log p_t, averaged over the completion tokens of the step, with

    γ = 1 + λ (clip(exp(-(log p + H)/β), γ_min, γ_max) - 1),

where H is the entropy of the policy at the position, in nats. log p + H is 0 in the mean over the policy's own tokens.
A token that is less likely than that is off the policy's distribution: γ > 1, and it counts less than in DFT; one that
is more likely has γ < 1, and counts more. λ = 0 is DFT.

Source: arXiv 2602.12222. The defaults are those of the authors' script (zhangmiaosen2000/Towards-On-Policy-SFT). Their
trainer can raise λ from 0 to 1 in the course of training, which the script turns off; here it is constant.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.errors import UserError
from rlzoo.inputs import Input, Statistic
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class IDFT(Objective):
    """In-distribution fine-tuning: c_t = p_t^γ_t, with γ_t from log p_t + H_t."""

    name: ClassVar[str] = "idft"
    source: ClassVar[str] = "arXiv 2602.12222"

    strength: float = 1.0
    """λ"""
    beta: float = 1.0
    gamma_min: float = 0.1
    gamma_max: float = 2.0

    def __post_init__(self) -> None:
        if not (self.beta > 0 and 0 <= self.gamma_min <= self.gamma_max):
            raise UserError(
                "idft needs beta > 0 and 0 ≤ gamma_min ≤ gamma_max, "
                f"got {self.beta}, {self.gamma_min} and {self.gamma_max}"
            )

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Statistic("entropy"),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        surprise = -(batch.logp + batch["entropy"])
        raw = torch.exp(surprise / self.beta).clamp(self.gamma_min, self.gamma_max)
        exponent = 1 + self.strength * (raw - 1)
        return Coefficients((exponent * batch.logp).exp(), metrics={"exponent": exponent})
