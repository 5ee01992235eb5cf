"""iw-SFT: importance-weighted SFT, with demonstrations weighted by how far the policy has moved towards them.

Loss: -w log π_θ(y_t), averaged over the completion tokens of the step, without a gradient through w:

- ``per_sequence``: w = clip(exp(κ · mean_t log(π_θ/π_ref)), 0, weight_max), one weight per sequence;
- ``per_step``: w_t = clip(π_θ/π_ref, step_min, step_max), one weight per token;
- ``ema``: one weight per sequence, relative to an exponential average of θ instead of the initial policy.

At the first step π_θ = π_ref, so w = 1 and iw-SFT equals SFT. The weight of a sequence is a geometric mean, because
the product of ratios underflows. Source: arXiv 2507.12856, whose auxiliary policy q is here the policy in training.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rlzoo.bases.ratios import ratio_of
from rlzoo.inputs import Input, MovingReference, Reference
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class ImportanceWeightedSFT(Objective):
    """Importance-weighted SFT: c_t = w, from the ratio π_θ/π_ref of the sequence or of the token."""

    name: ClassVar[str] = "iw-sft"
    source: ClassVar[str] = "arXiv 2507.12856"

    variant: Literal["per_sequence", "per_step", "ema"] = "per_sequence"
    kappa: float = 1.0
    weight_max: float = 16.0
    step_min: float = 0.2
    step_max: float = 1.8
    ema_decay: float = 0.99

    @property
    def requires(self) -> tuple[Input, ...]:
        return (MovingReference(self.ema_decay) if self.variant == "ema" else Reference(),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        (reference,) = self.needed(batch, "reference_logp")
        log_ratio = torch.where(batch.mask, batch.logp - reference, 0)
        if self.variant == "per_step":
            weight = ratio_of(log_ratio).clamp(self.step_min, self.step_max)
        else:
            mean = log_ratio.sum(1, keepdim=True) / batch.mask.sum(1, keepdim=True).clamp(min=1)
            weight = ratio_of(self.kappa * mean).clamp(0, self.weight_max).expand_as(log_ratio)
        return Coefficients(weight, metrics={"weight": weight})
