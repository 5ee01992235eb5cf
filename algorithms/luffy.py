"""LUFFY: learning to reason under off-policy guidance, GRPO with demonstrations as members of the group.

With A = r - mean, over the samples and demonstrations of a prompt together, the gain of a token is

- of a sample: ρA, ρ = π_θ/μ, or with ``clip`` ε: min(ρA, clip(ρ, 1-ε, 1+ε) A);
- of a demonstration: A f(ρ), f(ρ) = ρ/(ρ + γ), whose gradient is A γρ/(ρ + γ)² ∇log π_θ: the shaping f raises the
  weight of unlikely tokens, which decide whether the policy takes up what is new in a demonstration.

Loss: minus the gain, averaged over the completion tokens of the step. Where all samples of a prompt are as good as its
demonstration, nothing is learned from it; where they fail, it is imitated. The demonstrator's log-probs are those that
the row records, else 0 (μ = 1), as in the paper; a demonstration without a reward has ``demonstration_reward``.

Source: arXiv 2504.14945. The defaults are those of the authors' script (ElliottYan/LUFFY): γ = 0.1, one demonstration
per group (next to 7 samples), no clip, and no division by the group's standard deviation, which is in the paper's
eq. 2 (``scale_rewards``). The script divides by a constant length, as `dr-grpo` does; the paper by tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rlzoo.advantages import group_centred, group_normalised
from rlzoo.bases import PolicyGradient
from rlzoo.bases.ratios import clipped_gradient, ratio_metrics, token_ratio
from rlzoo.errors import UserError
from rlzoo.inputs import Behaviour, FromDemonstration, Input, Outcome
from rlzoo.objective import register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class LUFFY(PolicyGradient):
    """Off-policy guidance: c_t = ρ_t A for samples, and A γρ_t/(ρ_t + γ)² for demonstrations in their groups."""

    name: ClassVar[str] = "luffy"
    source: ClassVar[str] = "arXiv 2504.14945"

    gamma: float = 0.1
    demonstrations: int = 1
    demonstration_reward: float = 1.0
    clip: float | None = None
    scale_rewards: bool = False

    def __post_init__(self) -> None:
        if not (self.gamma > 0 and self.demonstrations >= 1):
            raise UserError(
                f"luffy needs gamma > 0 and at least 1 demonstration, got {self.gamma} and {self.demonstrations}"
            )

    @property
    def requires(self) -> tuple[Input, ...]:
        return Behaviour(demonstrations=0.0), FromDemonstration(), Outcome(self.demonstration_reward)

    @property
    def view_options(self) -> Mapping[str, Any]:
        return {"demonstrations": self.demonstrations}

    def advantage(self, batch: TokenBatch) -> torch.Tensor:
        outcome, group = self.needed(batch, "outcome", "group")
        relative = group_normalised if self.scale_rewards else group_centred
        return relative(outcome, group, dtype=batch.dtype)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        advantage, behaviour, guided = self.needed(batch, "advantage", "behaviour_logp", "from_demonstration")
        ratio = token_ratio(batch.logp, behaviour, batch.mask)
        clip = math.inf if self.clip is None else self.clip
        values, loss, clipped = clipped_gradient(ratio, advantage, clip, clip)
        guided = guided.bool()[:, None].expand_as(ratio)
        metrics = ratio_metrics(batch.logp, ratio, advantage, torch.where(guided, ratio * advantage, values), clipped)
        return Coefficients(
            torch.where(guided, advantage * self.gamma * ratio / (ratio + self.gamma).square(), values),
            loss=torch.where(guided, -advantage * ratio / (ratio + self.gamma), loss),
            metrics={**metrics, "demonstrations": guided.to(ratio.dtype)},
        )
