"""Base classes of objectives that learn from groups of samples and from pairs, so that each states only its own part.

For pairs, a score s(y) is a function of the log-probs of one completion, for instance Σ_t log(π_θ/π_ref)(y_t). For a
loss L(s⁺, s⁻) of a pair, averaged over pairs, the coefficient of a token of y is -∂L/∂s(y) · ∂s(y)/∂log π_θ(y_t).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from rlzoo.advantages import group_normalised
from rlzoo.errors import UserError
from rlzoo.inputs import Behaviour, Input, Reference
from rlzoo.objective import Normaliser, Objective
from rlzoo.ratios import (
    check_positive,
    check_upper_bound,
    clipped_gradient,
    ratio_metrics,
    sequence_log_ratio,
    sequence_ratio,
    token_ratio,
    upper_clip,
)
from rlzoo.types import Coefficients, Coupling, Selection, TokenBatch

Rows = Float[Tensor, " B"]


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


class PairLoss(NamedTuple):
    """The loss of each row's pair, and the coefficient of the row's tokens if it is the better or the worse one."""

    loss: Rows
    better: Rows
    worse: Rows


@dataclass(frozen=True)
class PairObjective(Objective):
    """The base of objectives over pairs of a better and a worse completion of one prompt."""

    learns_from: ClassVar[Selection] = Selection.PAIRS
    couples: ClassVar[Coupling] = Coupling.PAIR
    normaliser: ClassVar[Normaliser] = Normaliser.PER_PAIR

    pairing: Literal["threshold", "best_worst"] = field(default="threshold", kw_only=True)
    """How samples of a prompt are paired: see the view ``pairs``."""
    pairs_per_prompt: int = field(default=4, kw_only=True)
    """At most so many pairs per prompt."""

    @property
    def view_options(self) -> Mapping[str, Any]:
        return {"pairing": self.pairing, "per_prompt": self.pairs_per_prompt}

    def sides(self, batch: TokenBatch, score: Rows) -> tuple[Rows, Rows]:
        """The scores of the better and of the worse completion of each row's pair, each [B]."""
        partner, chosen = self.needed(batch, "partner", "chosen")
        other = score[partner]
        return torch.where(chosen, score, other), torch.where(chosen, other, score)

    def of_pairs(self, batch: TokenBatch, score: Rows, found: PairLoss, named: str = "margin") -> Coefficients:
        """The coefficients of all tokens; metrics are the margin of the scores [B], under the name ``named``, and
        their accuracy."""
        (chosen,) = self.needed(batch, "chosen")
        better, worse = self.sides(batch, score)
        margin = better - worse
        values = torch.where(chosen, found.better, found.worse).to(batch.dtype)
        return Coefficients(
            values[:, None].expand_as(batch.logp),
            loss=torch.where(chosen, found.loss, 0).to(batch.dtype),  # one loss per pair, carried by its better half
            metrics={named: margin, "accuracy": (margin > 0).to(margin.dtype)},
        )


def total(batch: TokenBatch, per_token: Float[Tensor, "B T"]) -> Rows:
    """The sum over each row's completion tokens [B], in float32 at least: exp and squares of it follow."""
    wide = torch.promote_types(per_token.dtype, torch.float32)
    return torch.where(batch.mask, per_token, 0).sum(1, dtype=wide)


def length(batch: TokenBatch) -> Rows:
    """The number of completion tokens of each row [B], at least 1, in the dtype of `total`."""
    return batch.mask.sum(1).clamp(min=1).to(torch.promote_types(batch.dtype, torch.float32))


def logistic(z: Tensor, right: float = 1.0, wrong: float = 0.0) -> tuple[Tensor, Tensor]:
    """The loss -w₊ log σ(z) - w₋ log σ(-z), and its negative derivative w₊ σ(-z) - w₋ σ(z).

    ``right`` and ``wrong`` are w₊ and w₋. For w₋ = 0 they are softplus(-z) and σ(-z), times w₊.
    """
    loss, pull = functional.softplus(-z), torch.sigmoid(-z)
    if (right, wrong) == (1.0, 0.0):
        return loss, pull
    return right * loss + wrong * functional.softplus(z), right * pull - wrong * torch.sigmoid(z)


def of_margin(loss: Rows, pull: Rows) -> PairLoss:
    """A loss of the margin s⁺ - s⁻; ``pull`` is the coefficient of the better completion, -``pull`` of the worse."""
    return PairLoss(loss, pull, -pull)


def check_smoothing(objective: Objective, label_smoothing: float, most: float = 0.5) -> None:
    """Raise UserError for a share of wrong labels that is not in [0, ``most``)."""
    if not 0 <= label_smoothing < most:
        raise UserError(
            f"objective {objective.name!r} needs label_smoothing of at least 0 and below {most:g}, the share of pairs "
            f"with the wrong order, got {label_smoothing}"
        )
