"""SFT: supervised fine-tuning, the log-likelihood of demonstrations.

Loss: -log π_θ(y_t | x, y_<t), averaged over the completion tokens of the step; with ``aggregation: sequence``, over the
tokens of each completion and then over completions, so that a long one counts no more than a short one.
``label_smoothing`` ε takes -(1 - ε) log π_θ(y_t) - ε mean_v log π_θ(v), the cross entropy to a target that gives a
share ε to all V tokens alike, as transformers and TRL have it. A truncated demonstration has no end of sequence;
``truncated: drop`` leaves it out. Source: none, it is maximum likelihood.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlzoo.errors import UserError
from rlzoo.objective import Normaliser, Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class SFT(Objective):
    """Supervised fine-tuning: c_t = 1."""

    name: ClassVar[str] = "sft"
    compared_with: ClassVar[str] = "TRL 1.16"

    aggregation: Literal["token", "sequence"] = "token"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"sft needs label_smoothing of at least 0 and below 1, got {self.label_smoothing}")

    @property
    def normaliser(self) -> Normaliser:
        return Normaliser(f"per_{self.aggregation}")

    @property
    def has_logit_term(self) -> bool:
        return self.label_smoothing > 0

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(torch.full_like(batch.logp, 1 - self.label_smoothing))

    def logit_term(
        self,
        policy_logits: Float[Tensor, "N V"],
        reference_logits: Float[Tensor, "N V"] | None,
        target: Int[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        return self.label_smoothing * (policy_logits.logsumexp(1) - policy_logits.mean(1))
