"""The base class of objectives over pairs of a better and a worse completion.

A score s(y) is a function of the log-probs of one completion, for instance Σ_t log(π_θ/π_ref)(y_t). For a loss
L(s⁺, s⁻) of a pair, averaged over pairs, the coefficient of a token of y is -∂L/∂s(y) · ∂s(y)/∂log π_θ(y_t).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from rlzoo.bases.ratios import check_positive
from rlzoo.errors import UserError
from rlzoo.inputs import Input, Reference
from rlzoo.objective import Normaliser, Objective
from rlzoo.types import Coefficients, Coupling, Selection, TokenBatch

Rows = Float[Tensor, " B"]


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


@dataclass(frozen=True)
class ReferencePairObjective(PairObjective):
    """The base of pair objectives whose score is Σ_t log(π_θ/π_ref)(y_t), with a factor ``beta`` in the loss.

    Raises UserError unless ``beta`` is above 0.
    """

    beta: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        check_positive(self.name, beta=self.beta)

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Reference(),)

    def log_ratio(self, batch: TokenBatch) -> Rows:
        """Σ_t log(π_θ/π_ref)(y_t) of each row [B]."""
        (reference,) = self.needed(batch, "reference_logp")
        return total(batch, batch.logp - reference)


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
