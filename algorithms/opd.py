"""OPD: on-policy distillation, which learns from a teacher's log-probs of the policy's own samples.

For samples of the policy, the loss is the reverse KL along them, Σ_t [log π_θ(y_t) - log π_teacher(y_t)], as a policy
gradient with the per-token reward log π_teacher - log π_θ and no return beyond the token itself:

    c_t = min(ρ_t, ``ratio_max``) [log π_teacher(y_t) - log π_θ(y_t)],

averaged over tokens. For one token its expectation over y ~ π_θ is exactly -∇ KL(π_θ ‖ π_teacher); for longer
completions it omits what a token does to later contexts. ρ = π_θ/μ corrects for older samples and is 1 on fresh ones;
with ``ratio_max: null`` it is left out. Log-probs of both models are at the sampling temperature. Rewards are not used.

The ``teacher`` is a folder or a Hub id, of a model with the same tokenizer. Source: none as a paper; Thinking Machines'
post on on-policy distillation, and code that follows it, in Trinity-RFT and TRL 1.16 (``iw_opd`` with γ = 0, which has
no ρ). The cap on ρ is that of TRL's self-distillation. Distillation of whole distributions (GKD, arXiv 2306.13649) is
another objective.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.bases.ratios import token_ratio
from rlzoo.inputs import Behaviour, Input, Reference
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, Selection, TokenBatch


@register
@dataclass(frozen=True)
class OPD(Objective):
    """On-policy distillation: c_t = min(ρ, 2) (log π_teacher - log π_θ)."""

    name: ClassVar[str] = "opd"
    compared_with: ClassVar[str] = "TRL 1.16"
    learns_from: ClassVar[Selection] = Selection.GROUPS

    teacher: str
    ratio_max: float | None = 2.0

    @property
    def requires(self) -> tuple[Input, ...]:
        teacher = Reference(self.teacher, as_key="teacher_logp")
        return (teacher,) if self.ratio_max is None else (teacher, Behaviour())

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        (teacher,) = self.needed(batch, "teacher_logp")
        gap = torch.where(batch.mask, teacher - batch.logp, 0)
        if self.ratio_max is None:
            return Coefficients(gap, metrics={"reverse_kl": -gap})
        (behaviour,) = self.needed(batch, "behaviour_logp")
        ratio = token_ratio(batch.logp, behaviour, batch.mask)
        return Coefficients(ratio.clamp(max=self.ratio_max) * gap, metrics={"reverse_kl": -gap, "ratio": ratio})
