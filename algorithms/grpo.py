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

Options of later papers, each the paper's GRPO by default:

- ``clip_high``: another ε above 1 (DAPO, arXiv 2503.14476).
- ``scale_rewards``: ``group`` divides A by std_G, ``batch`` by the std of all rewards of the batch (arXiv 2508.08221),
  ``none`` by nothing (Dr. GRPO, arXiv 2503.20783).
- ``aggregation``: ``sequence`` as above; ``token``, the mean over all tokens of the step, those of groups with A = 0
  included (TRL's default, which it calls dapo; `dapo` leaves them out); ``constant``, the sum over each sequence over
  ``max_length``, then the mean over sequences (Dr. GRPO).
- ``level``: ``sequence`` has one ratio per sequence, as in `gspo`; with ``constant`` and a ``max_length`` of 1 it is
  LUSPO (arXiv 2602.05261). The KL stays per token.
- ``kl_estimator``: k1 = -log(π_ref/π_θ), whose gradient has the mean 0 over samples of π_θ, unless it is corrected; or
  k2 = ½ log²(π_ref/π_θ), whose gradient is that of the KL over samples of π_θ.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from rlzoo.advantages import batch_normalised, group_centred, group_normalised
from rlzoo.bases import EpsilonClipped
from rlzoo.bases.ratios import check_positive, kl_estimate, token_ratio
from rlzoo.inputs import Behaviour, Input, Reference
from rlzoo.objective import Normaliser, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class GRPO(EpsilonClipped):
    """Group-relative policy optimisation: c_t = ρ_t A 1[not clipped] + β (π_ref/π_θ - 1)."""

    name: ClassVar[str] = "grpo"
    source: ClassVar[str] = "arXiv 2402.03300"
    compared_with: ClassVar[str] = "TRL 1.16"

    scale_rewards: Literal["group", "batch", "none"] = "group"
    aggregation: Literal["sequence", "token", "constant"] = "sequence"
    max_length: int = 256
    level: Literal["token", "sequence"] = "token"
    kl_coefficient: float = 0.04
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_correction: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.name, max_length=self.max_length)

    @property
    def normaliser(self) -> Normaliser:
        own = {"sequence": Normaliser.PER_SEQUENCE, "token": Normaliser.PER_TOKEN}
        return own.get(self.aggregation, Normaliser.SEQUENCE_SUM)

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Behaviour(), Reference()) if self.kl_coefficient else (Behaviour(),)

    def advantage(self, batch: TokenBatch) -> Tensor:
        reward, group = self.needed(batch, "reward", "group")
        if self.scale_rewards == "none":
            return group_centred(reward, group, batch.dtype)
        normalised = group_normalised if self.scale_rewards == "group" else batch_normalised
        return normalised(reward, group, dtype=batch.dtype)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        length = self.max_length if self.aggregation == "constant" else 1
        found = self.clipped(batch, self.level, length)
        if not self.kl_coefficient or found.loss is None:
            return found
        reference, behaviour = self.needed(batch, "reference_logp", "behaviour_logp")
        ratio = token_ratio(batch.logp, behaviour, batch.mask) if self.kl_correction else None
        kl, pull = kl_estimate(self.kl_estimator, batch.logp, reference, batch.mask, ratio)
        weight = self.kl_coefficient / length
        return Coefficients(found.values + weight * pull, found.loss + weight * kl, {**found.metrics, "kl": kl})
