"""DPPO: the policy gradient with a trust region in probabilities in place of PPO's in ratios.

With ρ = π_θ/μ and A = (r - mean_G)/(std_G + 1e-4), the loss of a token is

    -sg(min(ρ, ratio_max)) A log π_θ(y_t),

averaged over the completion tokens of the step, and 0 where the token has left the trust region in the direction of A:
where A > 0 and π_θ > μ, or A < 0 and π_θ < μ, and the divergence of μ from π_θ exceeds δ_high or δ_low. The divergence
is that of the two distributions over {y_t, any other token}, which bounds the full one from below:

- ``tv``: |π_θ(y_t) - μ(y_t)|, with the paper's δ of 0.2;
- ``kl``: μ log(μ/π_θ) + (1-μ) log((1-μ)/(1-π_θ)), for which 0.05 is recommended.

PPO's bounds on ρ stop unlikely tokens early and likely ones late; these do not. Source: arXiv 2602.04879, eq. 13 and 14
and, for the truncated ratio, section 5.4, as in verl and SkyRL, which were read, as the paper itself was not. Its top-k
divergences are not implemented. There is no KL term to a reference; μ as in `grpo`.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rlzoo.bases import OffPolicyGradient
from rlzoo.bases.ratios import ratio_metrics, token_ratio
from rlzoo.objective import register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class DPPO(OffPolicyGradient):
    """Divergence proximal policy optimisation: c_t = min(ρ_t, 20) A 1[within the trust region]."""

    name: ClassVar[str] = "dppo"
    source: ClassVar[str] = "arXiv 2602.04879"

    divergence: Literal["tv", "kl"] = "tv"
    delta_low: float = 0.2
    delta_high: float = 0.2
    ratio_max: float = 20.0

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        advantage, behaviour = self.needed(batch, "advantage", "behaviour_logp")
        ratio = token_ratio(batch.logp, behaviour, batch.mask)
        wide = torch.promote_types(batch.dtype, torch.float32)  # rounding must not decide what is clipped
        new, old = batch.logp.to(wide).exp(), behaviour.to(wide).exp().clamp(max=1)
        divergence = (new - old).abs()
        if self.divergence == "kl":
            rest = torch.log(((1 - old) + 1e-8) / ((1 - new) + 1e-8))  # as in verl; 1 - p may be 0
            divergence = torch.xlogy(old, old) - torch.xlogy(old, new) + (1 - old) * rest
        above = (advantage > 0) & (new > old) & (divergence > self.delta_high)
        below = (advantage < 0) & (new < old) & (divergence > self.delta_low)
        clipped = above | below
        values = torch.where(clipped, 0, ratio.clamp(max=self.ratio_max) * advantage)
        return Coefficients(values, metrics=ratio_metrics(batch.logp, ratio, advantage, values, clipped))
