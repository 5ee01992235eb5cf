"""Inputs that are stored in the rows of a buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlzoo.errors import UserError
from rlzoo.inputs.base import Input, Stage, normal
from rlzoo.types import Trajectory


@dataclass(frozen=True)
class Behaviour(Input):
    """``behaviour_logp`` [B, T]: log-probs in nats under the policy that sampled the completion.

    Raises UserError for rows without them, except for demonstrations where ``demonstrations`` is a value for each of
    their tokens.
    """

    stage: ClassVar[Stage] = Stage.STORED
    key: ClassVar[str] = "behaviour_logp"
    at_sampling_temperature: ClassVar[bool] = True

    demonstrations: float | None = None

    def stored(self, row: Trajectory) -> Sequence[float]:
        if row.behaviour_logp is None and row.source == "demonstration":
            if self.demonstrations is None:
                raise UserError(
                    f"a demonstration of prompt {row.prompt_id!r} has no log-probs of its author: import it with them, "
                    "or name the model that wrote it, if the objective takes one"
                )
            return [self.demonstrations] * len(row.completion_ids)
        if row.behaviour_logp is None:
            raise UserError("the buffer has no behaviour log-probs: fill it with `rlzoo rollout`, which records them")
        return row.behaviour_logp


@dataclass(frozen=True)
class Truncated(Input):
    """``truncated`` [B]: True if the completion was cut at the length limit, so that it has no end of sequence."""

    stage: ClassVar[Stage] = Stage.STORED
    key: ClassVar[str] = "truncated"

    def example(self, logp: Float[Tensor, "B T"], draw: torch.Generator) -> Bool[Tensor, " B"]:
        return torch.rand(len(logp), generator=draw) < 0.4


@dataclass(frozen=True)
class FromDemonstration(Input):
    """``from_demonstration`` [B]: True if the completion is a demonstration rather than a sample."""

    stage: ClassVar[Stage] = Stage.STORED
    key: ClassVar[str] = "from_demonstration"

    def stored(self, row: Trajectory) -> bool:
        return row.source == "demonstration"

    def example(self, logp: Float[Tensor, "B T"], draw: torch.Generator) -> Bool[Tensor, " B"]:
        return torch.rand(len(logp), generator=draw) < 0.4


@dataclass(frozen=True)
class Outcome(Input):
    """``outcome`` [B]: the reward of the completion; ``demonstrations`` for demonstrations without a reward.

    In float64, as ``reward`` is, which a batch has only if all its rows have one. Raises UserError for samples without
    a reward.
    """

    stage: ClassVar[Stage] = Stage.STORED
    key: ClassVar[str] = "outcome"

    demonstrations: float = 1.0

    def stored(self, row: Trajectory) -> float:
        if row.reward is not None:
            return row.reward
        if row.source == "demonstration":
            return self.demonstrations
        raise UserError(f"a sample of prompt {row.prompt_id!r} has no reward: score it")

    def example(self, logp: Float[Tensor, "B T"], draw: torch.Generator) -> Float[Tensor, " B"]:
        return torch.rand(len(logp), dtype=torch.float64, generator=draw).round(decimals=1)


@dataclass(frozen=True)
class Column(Input):
    """A column of the data under its own name: one number per completion token [B, T], or per row [B], in float64.

    Raises UserError naming a row that lacks it, or whose list has another length than the completion in tokens,
    including its end of sequence and tokens that are not learned from.
    """

    stage: ClassVar[Stage] = Stage.STORED

    name: str

    @property
    def key(self) -> str:
        return self.name

    def example(self, logp: Float[Tensor, "B T"], draw: torch.Generator) -> Float[Tensor, "B T"]:
        return normal(logp.shape, draw)

    def stored(self, row: Trajectory) -> Sequence[float] | float:
        value = row.columns.get(self.name)
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, list) and all(isinstance(x, (int, float)) for x in value):
            return value
        there = ", ".join(row.columns) or "none"
        raise UserError(
            f"a row of prompt {row.prompt_id!r} has no numbers in the column {self.name!r}; its columns: {there}"
        )
