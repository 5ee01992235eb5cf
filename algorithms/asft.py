"""ASFT: anchored supervised fine-tuning, DFT kept near the initial policy.

Loss: -sg(p_t) log p_t + λ KL(π_ref ‖ π_θ), averaged over the completion tokens of the step; the KL of a token is
Σ_v π_ref(v) log(π_ref(v)/π_θ(v)) over the whole vocabulary at its position. The gradient of the KL in the logits is
λ (π_θ - π_ref): 0 at the first step, which thus equals DFT's. The reference stays in memory and runs a forward pass in
every update; with an adapter, the reference is the model without it.
Source: arXiv 2509.23753, whose code uses λ = 0.05 or 0.1.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from rlzoo.inputs import Input, ReferenceLogits
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class ASFT(Objective):
    """Anchored supervised fine-tuning: c_t = p_t, and λ KL(π_ref ‖ π_θ) over the vocabulary."""

    name: ClassVar[str] = "asft"
    source: ClassVar[str] = "arXiv 2509.23753"

    kl_coefficient: float = 0.05

    @property
    def requires(self) -> tuple[Input, ...]:
        return (ReferenceLogits(),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(batch.logp.exp())

    def logit_term(
        self,
        policy_logits: Float[Tensor, "N V"],
        reference_logits: Float[Tensor, "N V"] | None,
        target: Int[Tensor, " N"],
    ) -> Float[Tensor, " N"] | None:
        if reference_logits is None:
            return None
        reference = reference_logits.log_softmax(1)
        return self.kl_coefficient * (reference.exp() * (reference - policy_logits.log_softmax(1))).sum(1)
