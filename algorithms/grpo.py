"""GRPO: group-relative policy optimisation, with advantages relative to the other samples of the prompt.

With ρ = π_θ/μ and A = (r - mean_G)/(std_G + 1e-4), the loss of a token is

    -min(ρA, clip(ρ, 1-ε, 1+ε) A) + β k3,    k3 = π_ref/π_θ - log(π_ref/π_θ) - 1,

averaged over each sequence, then over sequences. The gradient of k3 in the loss is -β(π_ref/π_θ - 1) ∇log π_θ, which is
not the gradient of the reverse KL. The mean of k3 is the KL only over samples of π_θ: on a fixed buffer, or in later
updates on a batch, it is biased. ``kl_correction`` uses ρ k3 instead, whose mean over μ is the KL and whose gradient,
-βρ log(π_ref/π_θ) ∇log π_θ, is that of the KL (DeepSeek-V3.2, arXiv 2512.02556; TRL's use_bias_correction_kl).

A group of one, or of equal rewards, has A = 0; its tokens still count and still have the KL term. Where A < 0 the clip
does not bound ρ from above, and one stale token may outweigh all others: ``delta`` δ bounds ρA by δA there, with no
gradient beyond (two-sided GRPO, arXiv 2505.07291). Without it ρ is at most e²⁰. Source: arXiv 2402.03300; μ is the
policy that filled the buffer: with a fixed buffer this is offline GRPO, with fresh samples online GRPO.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.advantages import group_normalised
from rlzoo.inputs import Behaviour, Input, Reference
from rlzoo.objective import Normaliser, Objective, register
from rlzoo.ratios import check_upper_bound, clipped_gradient, k3, ratio_metrics, token_ratio
from rlzoo.types import Coefficients, Selection, TokenBatch


@register
@dataclass(frozen=True)
class GRPO(Objective):
    """Group-relative policy optimisation: c_t = ρ_t A 1[not clipped] + β (π_ref/π_θ - 1)."""

    name: ClassVar[str] = "grpo"
    learns_from: ClassVar[Selection] = Selection.GROUPS
    normaliser: ClassVar[Normaliser] = Normaliser.PER_SEQUENCE
    source: ClassVar[str] = "arXiv 2402.03300"

    clip: float = 0.2
    kl_coefficient: float = 0.04
    kl_correction: bool = False
    delta: float | None = None

    def __post_init__(self) -> None:
        check_upper_bound("grpo", "delta", self.delta, self.clip)

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Behaviour(), Reference()) if self.kl_coefficient else (Behaviour(),)

    def advantages(self, batch: TokenBatch) -> torch.Tensor:
        reward, group = self.needed(batch, "reward", "group")
        advantage = group_normalised(reward, group, dtype=batch.dtype)
        return torch.where(batch.mask, advantage[:, None], 0)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        advantage, behaviour = self.needed(batch, "advantage", "behaviour_logp")
        ratio = token_ratio(batch.logp, behaviour, batch.mask)
        values, loss, clipped = clipped_gradient(ratio, advantage, self.clip, self.clip, self.delta)
        metrics = ratio_metrics(batch.logp, ratio, advantage, values, clipped)
        if self.kl_coefficient:
            (reference,) = self.needed(batch, "reference_logp")
            kl, pull = k3(batch.logp, reference, batch.mask)
            if self.kl_correction:
                kl, pull = ratio * kl, ratio * torch.where(batch.mask, reference - batch.logp, 0)
            metrics["kl"] = kl
            values = values + self.kl_coefficient * pull
            loss = loss + self.kl_coefficient * kl
        return Coefficients(values, loss=loss, metrics=metrics)
