"""DEFT: dynamic entropy fine-tuning, the power family with an exponent per position.

Loss: (1 - p_t^a_t)/a_t with a_t = Σ_v π_θ(v)², averaged over the completion tokens of the step, without a gradient
through a_t. The gradient weights ∇ log p_t by p_t^a_t: close to SFT where the policy is uncertain (a → 0), close to DFT
where it is certain (a → 1). -log a_t is the Rényi entropy of order 2. Source: arXiv 2602.11424.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.inputs import Input, Statistic
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class DEFT(Objective):
    """Dynamic entropy fine-tuning: c_t = p_t^a_t, with a_t = Σ_v π_v²."""

    name: ClassVar[str] = "deft"
    source: ClassVar[str] = "arXiv 2602.11424"

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Statistic("square_mass"),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        exponent = batch["square_mass"]
        power = exponent * batch.logp
        return Coefficients(power.exp(), loss=-torch.expm1(power) / exponent, metrics={"exponent": exponent})
