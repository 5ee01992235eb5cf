"""OTB: the policy gradient with the baseline per token that minimises its variance.

With ρ = π_θ/μ, G the return (the reward of the completion, which arrives at its end) and i the samples of the prompt,

    loss = -ρ_t (G - B_t),   B_t = Σ_i G_i W_{i,t} / Σ_i W_{i,t},   W_{i,t} = Σ_{s≤t} S_{i,s},

averaged over the completion tokens of the step. S = 1 - 2 p + Σ_v π_v² is the squared norm of the gradient of log π in
the logits, the paper's proxy for the norm in the weights. B_t includes only samples with at least t tokens. W belongs
to the policy at the start of the batch, where advantages are fixed, so p, π and B are the same for all updates on the
batch; ρ belongs to the policy in training, and is not clipped.

Where only one sample is left, it is its own baseline: a group of one, and the tail of the longest sample, have no
gradient. The reference code (verl) uses B = 0 there, always for a group of one and by default for the tail, and thus
learns from G itself, even if the rewards are equal: ``zero_tail`` does both. verl can also weight S by the square of
a truncated π/μ, which is not implemented here. Source: arXiv 2602.07078.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.advantages import optimal_token_baseline
from rlzoo.bases.ratios import token_ratio
from rlzoo.inputs import Behaviour, Input, Snapshot, Statistic
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, Selection, TokenBatch


@register
@dataclass(frozen=True)
class OptimalTokenBaseline(Objective):
    """Optimal token baseline: c_t = ρ_t (G - B_t)."""

    name: ClassVar[str] = "otb"
    learns_from: ClassVar[Selection] = Selection.GROUPS
    source: ClassVar[str] = "arXiv 2602.07078"

    zero_tail: bool = False

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Behaviour(), Snapshot(), Statistic("square_mass"))

    def advantages(self, batch: TokenBatch) -> torch.Tensor:
        reward, group, snapshot = self.needed(batch, "reward", "group", "snapshot_logp")
        wide = torch.promote_types(snapshot.dtype, torch.float32)  # W is a long sum
        square_mass = batch["square_mass"].to(wide)
        score_norm = (1 - 2 * snapshot.to(wide).exp() + square_mass).clamp(min=0)  # rounding can take it below
        baseline = optimal_token_baseline(reward, group, score_norm, batch.mask, self.zero_tail)
        return torch.where(batch.mask, reward[:, None] - baseline, 0).to(snapshot.dtype)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        advantage, behaviour = self.needed(batch, "advantage", "behaviour_logp")
        ratio = token_ratio(batch.logp, behaviour, batch.mask)
        metrics = {"ratio": ratio, "advantage": advantage}
        return Coefficients(ratio * advantage, loss=-ratio * advantage, metrics=metrics)
