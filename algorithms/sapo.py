"""SAPO: GRPO with a smooth gate in place of the clip.

With ρ = π_θ/μ and A = (r - mean_G)/(std_G + 1e-4), the loss of a token is

    -(4/τ) σ(τ(ρ - 1)) A,    τ = tau_positive where A > 0, else tau_negative,

averaged over each sequence, then over sequences. A token therefore has the coefficient g ρA with the gate
g = 4 σ(τ(ρ - 1)) (1 - σ(τ(ρ - 1))): 1 at ρ = 1, and falling on both sides, faster where A < 0. There is no KL term;
μ as in `grpo`. Source: arXiv 2511.20347, with its temperatures.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.bases import OffPolicyGradient
from rlzoo.bases.ratios import check_positive, ratio_metrics, token_ratio
from rlzoo.objective import Normaliser, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class SAPO(OffPolicyGradient):
    """Soft adaptive policy optimisation: c_t = 4 s (1 - s) ρ_t A, with s = σ(τ(ρ_t - 1))."""

    name: ClassVar[str] = "sapo"
    normaliser: ClassVar[Normaliser] = Normaliser.PER_SEQUENCE
    source: ClassVar[str] = "arXiv 2511.20347"
    compared_with: ClassVar[str] = "TRL 1.16"

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        check_positive(self.name, tau_positive=self.tau_positive, tau_negative=self.tau_negative)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        advantage, behaviour = self.needed(batch, "advantage", "behaviour_logp")
        ratio = token_ratio(batch.logp, behaviour, batch.mask)
        tau = torch.full_like(ratio, self.tau_negative).masked_fill(advantage > 0, self.tau_positive)
        gate = torch.sigmoid(tau * (ratio - 1))
        slope = 4 * gate * torch.sigmoid(tau * (1 - ratio))
        values = slope * ratio * advantage
        metrics = {**ratio_metrics(batch.logp, ratio, advantage, values), "gate": slope}
        return Coefficients(values, loss=-4 / tau * gate * advantage, metrics=metrics)
