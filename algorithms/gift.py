"""GIFT: Gibbs initialisation with finite temperature, SFT towards the initial policy tilted to the demonstration.

Loss: -Σ_v q_t(v) log π_θ(v), averaged over the completion tokens of the step, with the target

    q_t = softmax(log π_ref + β 1[v = y_t]).

SFT is the limit β → ∞, in which q_t is y_t alone; β = 0 has the initial policy as its target. In the logits the
gradient is π_θ - q_t. At the first step, where π_θ = π_ref, it is SFT's times p/(p + 1/(e^β - 1)), so only tokens less
likely than about e^-β count less than in SFT; later, a token is learned until its odds are e^β times those under π_ref.

The whole loss is a full-vocabulary term, so the coefficients are 0. The reference stays in memory and runs a forward
pass in every update. Source: arXiv 2601.09233, with β = 20 of the authors' script (zzy1127/GIFT); their code also adds
1e-10 to the probabilities of π_ref.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from rlzoo.errors import UserError
from rlzoo.inputs import Input, ReferenceLogits
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class GIFT(Objective):
    """Gibbs initialisation with finite temperature: c_t = 0, and the cross entropy to π_ref tilted to y_t."""

    name: ClassVar[str] = "gift"
    source: ClassVar[str] = "arXiv 2601.09233"
    shown_too: ClassVar[Sequence[Mapping[str, Any]]] = ({"beta": 3.0},)

    beta: float = 20.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise UserError(f"gift needs a finite beta of 0 or more, got {self.beta}")

    @property
    def requires(self) -> tuple[Input, ...]:
        return (ReferenceLogits(),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(torch.zeros_like(batch.logp))

    def logit_term(
        self,
        policy_logits: Float[Tensor, "N V"],
        reference_logits: Float[Tensor, "N V"] | None,
        target: Int[Tensor, " N"],
    ) -> Float[Tensor, " N"] | None:
        if reference_logits is None:
            return None
        with torch.no_grad():
            gain = torch.full_like(reference_logits[:, :1], self.beta)
            tilted = reference_logits.scatter_add(1, target[:, None], gain).softmax(1)
        return functional.cross_entropy(policy_logits, tilted, reduction="none")
