"""Base classes of objectives that learn from groups of samples, so that each states only its own part."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlzoo.advantages import group_normalised
from rlzoo.bases.ratios import (
    check_positive,
    check_upper_bound,
    clipped_gradient,
    ratio_metrics,
    sequence_log_ratio,
    sequence_ratio,
    token_ratio,
    upper_clip,
)
from rlzoo.inputs import Behaviour, Input, Reference
from rlzoo.objective import Normaliser, Objective
from rlzoo.types import Coefficients, Selection, TokenBatch


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """The policy gradient: c_t = A, with one advantage per completion.

    A subclass with another advantage than GRPO's defines `advantage`.
    """

    learns_from: ClassVar[Selection] = Selection.GROUPS

    def advantage(self, batch: TokenBatch) -> Float[Tensor, " B"]:
        """The advantage of each completion, by default (r - mean_G)/(std_G + 1e-4); 0 where rewards are equal."""
        reward, group = self.needed(batch, "reward", "group")
        return group_normalised(reward, group, dtype=batch.dtype)

    def advantages(self, batch: TokenBatch) -> Float[Tensor, "B T"]:
        return torch.where(batch.mask, self.advantage(batch)[:, None], 0)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        (advantage,) = self.needed(batch, "advantage")
        return Coefficients(advantage)


@dataclass(frozen=True)
class OffPolicyGradient(PolicyGradient):
    """A policy gradient with a ratio ρ = π_θ/μ to the policy that sampled. A subclass defines `coefficients`."""

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Behaviour(),)


@dataclass(frozen=True)
class ClippedPolicyGradient(OffPolicyGradient):
    """PPO's clipped loss with one advantage per completion: -min(ρA, clip(ρ, 1-ε_low, 1+ε_high) A).

    A subclass defines `bounds`. ``delta`` δ bounds ρA by δA where A < 0, with no gradient beyond (arXiv 2505.07291);
    it must lie above 1+ε_high (UserError).
    """

    delta: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_upper_bound(self.name, "delta", self.delta, self.bounds[1])

    @property
    def bounds(self) -> tuple[float, float]:
        """ε_low and ε_high."""
        raise NotImplementedError

    def clipped(
        self, batch: TokenBatch, level: Literal["token", "sequence"] = "token", length: int = 1
    ) -> Coefficients:
        """The clipped policy gradient with its loss, both over ``length``, for one ratio per token or per sequence."""
        advantage, behaviour = self.needed(batch, "advantage", "behaviour_logp")
        ratio = (token_ratio if level == "token" else sequence_ratio)(batch.logp, behaviour, batch.mask)
        values, loss, clipped = clipped_gradient(ratio, advantage, *self.bounds, self.delta)
        metrics = ratio_metrics(batch.logp, ratio, advantage, values, clipped)
        if level == "sequence":
            metrics["sequence_ratio"] = metrics.pop("ratio")  # a geometric mean, and no importance weight
        return Coefficients(values / length, loss=loss / length, metrics=metrics)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return self.clipped(batch)


@dataclass(frozen=True)
class EpsilonClipped(ClippedPolicyGradient):
    """PPO's clipped loss with the bounds 1 - ``clip`` and 1 + ``clip_high``, which by default is ``clip`` too."""

    clip: float = 0.2
    clip_high: float | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        return self.clip, upper_clip(self.clip, self.clip_high)


@dataclass(frozen=True)
class LogRatioRegression(PolicyGradient):
    """The squared error of β log(π_θ/π_0)(y) against a target per completion: c_t = 2β (target - β log(π_θ/π_0)(y)).

    A subclass defines the target as its `advantage`, and the log-probs of π_0 as its `anchor`. A token's log-ratio
    counts as at most 20 in size, so that stale rows do not give infinite coefficients.
    """

    normaliser: ClassVar[Normaliser] = Normaliser.SEQUENCE_SUM
    anchor: ClassVar[Input] = Reference()

    beta: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        check_positive(self.name, beta=self.beta)

    @property
    def requires(self) -> tuple[Input, ...]:
        return (self.anchor,)

    def advantages(self, batch: TokenBatch) -> Float[Tensor, "B T"]:
        return self.advantage(batch)[:, None].expand(batch.mask.shape)  # the target, at masked positions too

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        target, anchor = self.needed(batch, "advantage", self.anchor.key)
        log_ratio = sequence_log_ratio(batch.logp, anchor, batch.mask)
        error = target - self.beta * log_ratio
        length = batch.mask.sum(1, keepdim=True).clamp(min=1)
        metrics = {"error": error, "log_ratio": log_ratio.expand_as(error)}
        return Coefficients(2 * self.beta * error, loss=error.square() / length, metrics=metrics)
