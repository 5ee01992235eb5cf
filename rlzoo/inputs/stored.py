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

    Raises UserError for rows without them.
    """

    stage: ClassVar[Stage] = Stage.STORED
    key: ClassVar[str] = "behaviour_logp"
    at_sampling_temperature: ClassVar[bool] = True

    def stored(self, row: Trajectory) -> Sequence[float]:
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
class Column(Input):
    """A column of the data under its own name: one number per completion token [B, T], or per row [B].

    Raises UserError naming a row that lacks it, or whose list has another length than the completion in tokens,
    including its end of sequence.
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
