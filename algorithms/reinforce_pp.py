"""REINFORCE++: PPO without a critic, with advantages that are whitened over the whole batch.

The reward of a completion arrives at its last token; every token has a penalty of kl_coefficient · log(π_old/π_ref)
(the k1 estimate, where π_old is the policy at the start of the batch). The advantage of a token is its return,
Σ_{s≥t} γ^{s-t} r_s, less the mean over the tokens of the batch and divided by their standard deviation. The loss of a
token is PPO's, with ρ = π_θ/μ,

    -min(ρA, clip(ρ, 1-ε, 1+ε) A),

averaged over the completion tokens of the step. ``baseline: group`` first subtracts the mean reward of the group, the
variant for several samples per prompt (REINFORCE++ with baseline). OpenRLHF and verl can put the KL into the loss, by
the k2 estimate; here it stays in the reward. μ, ``clip_high`` and ``delta`` as in `grpo`. Source: arXiv 2501.03262,
with the defaults of OpenRLHF.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rlzoo.advantages import generalised_advantage, group_centred, penalised_reward, whiten
from rlzoo.bases import EpsilonClipped
from rlzoo.inputs import Behaviour, Input, Reference, Snapshot
from rlzoo.objective import register
from rlzoo.types import TokenBatch


@register
@dataclass(frozen=True)
class ReinforcePlusPlus(EpsilonClipped):
    """REINFORCE++: c_t = ρ_t A_t 1[not clipped], with A the return, whitened over the batch."""

    name: ClassVar[str] = "reinforce-pp"
    source: ClassVar[str] = "arXiv 2501.03262"

    kl_coefficient: float = 0.01
    gamma: float = 1.0
    baseline: Literal["none", "group"] = "none"

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Behaviour(), *([Snapshot(), Reference()] if self.kl_coefficient else []))

    def advantages(self, batch: TokenBatch) -> torch.Tensor:
        (reward,) = self.needed(batch, "reward")
        if self.baseline == "group":
            (group,) = self.needed(batch, "group")
            reward = group_centred(reward, group)
        log_ratio = None
        if self.kl_coefficient:
            snapshot, reference = self.needed(batch, "snapshot_logp", "reference_logp")
            log_ratio = snapshot - reference
        per_token = penalised_reward(reward, batch.mask, self.kl_coefficient, log_ratio, batch.dtype)
        no_value = torch.zeros_like(per_token)
        returns, _ = generalised_advantage(per_token, no_value, batch.mask, self.gamma, lam=1.0)
        return whiten(returns, batch.mask)
