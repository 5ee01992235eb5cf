"""OTR: one-token rollout, a policy gradient on tokens sampled at every position of a demonstration.

At each position, K tokens a_k are drawn from softmax(z/T), where z are the policy's logits. A drawn token that equals
the demonstration's y_t has the reward R = 1, any other R = β. Loss: -(1/K) Σ_k R_k log π_θ(a_k), averaged over the
completion tokens of the step, without a gradient through draws and rewards; π_θ is at temperature 1. In expectation,
∇J is

    (1-β) q(y_t) ∇ log π_θ(y_t) + β Σ_v q(v) ∇ log π_θ(v),    q = softmax(z/T).

The second sum is 0 at T = 1, where OTR is DFT times 1-β, plus the noise of the draws.

The whole loss is a full-vocabulary term, because most drawn tokens are not y_t; the coefficients are 0. Draws come
from torch's generator in the order in which positions are computed, so gradients agree across micro-batches and
processes only in expectation. Source: arXiv 2509.26313; the paper's K, T and β could not be checked, so the defaults
may not be its settings.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlzoo.errors import UserError
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class OTR(Objective):
    """One-token rollout: c_t = 0, and -(1/K) Σ_k R_k log π(a_k) over drawn tokens a_k."""

    name: ClassVar[str] = "otr"
    source: ClassVar[str] = "arXiv 2509.26313"

    samples: int = 256
    temperature: float = 1.3
    beta: float = -0.1

    def __post_init__(self) -> None:
        if self.samples < 1 or not self.temperature > 0:
            raise UserError(f"otr needs samples ≥ 1 and temperature > 0, got {self.samples} and {self.temperature}")

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(torch.zeros_like(batch.logp))

    def logit_term(
        self,
        policy_logits: Float[Tensor, "N V"],
        reference_logits: Float[Tensor, "N V"] | None,
        target: Int[Tensor, " N"],
    ) -> Float[Tensor, " N"] | None:
        with torch.no_grad():
            probability = (policy_logits / self.temperature).softmax(1).nan_to_num(1.0)  # the loss reports a NaN
            drawn = torch.multinomial(probability, self.samples, replacement=True)
            matched = (drawn == target[:, None]).to(policy_logits.dtype)
            reward = matched + self.beta * (1 - matched)
        logp = policy_logits.gather(1, drawn) - policy_logits.logsumexp(1, keepdim=True)
        return -(reward * logp).mean(1)
