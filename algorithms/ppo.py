"""PPO: proximal policy optimisation with a critic, generalised advantages and a clipped ratio.

The reward of a completion arrives at its last token; every token has a penalty of kl_coefficient · log(π_old/π_ref)
(the k1 estimate, where π_old is the policy at the start of the batch). The advantages A and the returns R come from
GAE(γ, λ) on the critic's values; A is whitened over the batch after R has been computed. The loss of a token is

    -min(ρA, clip(ρ, 1-ε, 1+ε) A) + value_coefficient · ½ max((V-R)², (V_clip-R)²),

where V_clip is within value_clip of the value at the start of the batch, and ``clip_high`` is another ε above 1 (DAPO,
arXiv 2503.14476). With ``dual_clip`` c the first term is at most -cA where A < 0; without it ρ is at most e²⁰ there.
ρ = π_θ/μ, where μ is the policy that filled the buffer: with a fixed buffer this is offline PPO.

A truncated completion counts as ended: it gets no further reward, and the value after its last token is 0. With
``bootstrap_truncated`` that value is the critic's value at the last token, since no forward pass computes the next one.
Sources: arXiv 1707.06347; GAE, arXiv 1506.02438; dual clip, arXiv 1912.09729.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlzoo.advantages import generalised_advantage, last_token, penalised_reward, whiten
from rlzoo.bases.ratios import check_upper_bound, clipped_gradient, ratio_metrics, token_ratio, upper_clip
from rlzoo.inputs import Behaviour, Critic, Input, Reference, Snapshot, Truncated
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, Selection, TokenBatch


@register
@dataclass(frozen=True)
class PPO(Objective):
    """Proximal policy optimisation: c_t = ρ_t A_t 1[not clipped], and a value loss."""

    name: ClassVar[str] = "ppo"
    learns_from: ClassVar[Selection] = Selection.GROUPS
    source: ClassVar[str] = "arXiv 1707.06347"
    compared_with: ClassVar[str] = "TRL 1.16 without critic"

    clip: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    kl_coefficient: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    value_clip: float | None = 0.2
    value_coefficient: float = 0.1
    critic: Literal["separate", "shared"] = "separate"
    bootstrap_truncated: bool = False

    def __post_init__(self) -> None:
        check_upper_bound("ppo", "dual_clip", self.dual_clip, 0.0)

    @property
    def requires(self) -> tuple[Input, ...]:
        return (
            Behaviour(),
            Critic(shared=self.critic == "shared"),
            Snapshot("value"),
            *([Snapshot(), Reference()] if self.kl_coefficient else []),
            *([Truncated()] if self.bootstrap_truncated else []),
        )

    def prepare(self, batch: TokenBatch) -> TokenBatch:
        reward, value = self.needed(batch, "reward", "old_value")
        log_ratio = None
        if self.kl_coefficient:
            snapshot, reference = self.needed(batch, "snapshot_logp", "reference_logp")
            log_ratio = snapshot - reference
        per_token = penalised_reward(reward, batch.mask, self.kl_coefficient, log_ratio, batch.dtype)
        after = None
        if self.bootstrap_truncated:
            (truncated,) = self.needed(batch, "truncated")
            after = torch.where(truncated, torch.where(last_token(batch.mask), value, 0).sum(1), 0)
        advantage, returns = generalised_advantage(per_token, value, batch.mask, self.gamma, self.lam, after)
        if self.whiten:
            advantage = whiten(advantage, batch.mask)
        return batch.replace(advantage=advantage, returns=returns)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        advantage, behaviour = self.needed(batch, "advantage", "behaviour_logp")
        ratio = token_ratio(batch.logp, behaviour, batch.mask)
        above = upper_clip(self.clip, self.clip_high)
        values, loss, clipped = clipped_gradient(ratio, advantage, self.clip, above, self.dual_clip)
        return Coefficients(values, loss=loss, metrics=ratio_metrics(batch.logp, ratio, advantage, values, clipped))

    def auxiliary(self, batch: TokenBatch) -> Mapping[str, Tensor]:
        value = batch.get("value")
        if value is None:
            return {}
        (returns,) = self.needed(batch, "returns")
        error = (value - returns).square()
        if self.value_clip is not None:
            (old,) = self.needed(batch, "old_value")
            near = old + (value - old).clamp(-self.value_clip, self.value_clip)
            error = torch.maximum(error, (near - returns).square())
        return {"value_loss": 0.5 * self.value_coefficient * error}
