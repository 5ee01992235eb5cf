"""Prompts and completions as model input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlzoo.jobs.memory import on_device


class Tokens(Protocol):
    """A prompt and a completion as token ids, and the temperature of log-probs; a `Trajectory` is one."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def completion_ids(self) -> Sequence[int]: ...
    @property
    def temperature(self) -> float: ...


class Row(NamedTuple):
    """`Tokens` and nothing else."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    temperature: float = 1.0


def length(row: Tokens) -> int:
    """Prompt and completion tokens."""
    return len(row.prompt_ids) + len(row.completion_ids)


@dataclass(frozen=True)
class Sequences:
    """Prompts and completions as model input, padded on the right, so that causal attention needs no mask.

    Where completion tokens stand is known from the rows' lengths, so that no GPU is asked for it: reading out a boolean
    mask would wait for all that the device has to do.
    """

    ids: Int[Tensor, "B L"]
    mask: Bool[Tensor, "B T"]
    """True at completion tokens, in positions without the prompt."""
    before: Int[Tensor, " N"]
    """The positions that predict completion tokens, row by row, in the flattened ``ids``."""
    places: Int[Tensor, " N"]
    """The completion tokens in the flattened ``mask``, row by row."""
    tokens: int
    """The number of prompt and completion tokens, without padding."""
    temperature: Float[Tensor, " B"] | None = None
    """The temperature of each row; None: 1."""

    @classmethod
    def of(cls, rows: Sequence[Tokens], device: torch.device) -> Sequences:
        """Collate rows of a buffer, or others, each at its temperature."""
        prompts, completions = [row.prompt_ids for row in rows], [row.completion_ids for row in rows]
        return cls.collate(prompts, completions, device, [row.temperature for row in rows])

    @classmethod
    def collate(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        device: torch.device,
        temperature: Sequence[float] | None = None,
    ) -> Sequences:
        """Join each prompt with its completion. A prompt must have at least one token."""
        rows, longest = len(prompts), max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        width = max(map(len, completions))
        ids, mask = np.zeros((rows, longest), np.int64), np.zeros((rows, width), np.bool_)
        before, places = [], []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            first, end = row * longest + len(prompt) - 1, len(completion)
            ids[row, : len(prompt)], ids[row, len(prompt) : len(prompt) + end] = prompt, completion
            mask[row, :end] = True
            before.append(np.arange(first, first + end))
            places.append(np.arange(row * width, row * width + end))
        tokens = sum(map(len, prompts)) + sum(map(len, completions))
        heat = None
        if temperature is not None and any(t != 1.0 for t in temperature):
            heat = on_device(torch.tensor(temperature, dtype=torch.float64), device)
        ids_, mask_, before_, places_ = (
            on_device(torch.as_tensor(x), device) for x in (ids, mask, np.concatenate(before), np.concatenate(places))
        )
        return cls(ids_, mask_, before_, places_, tokens, heat)

    def at(self, temperature: float) -> Sequences:
        """The same rows, all at one temperature."""
        heat = torch.full(self.mask.shape[:1], temperature, dtype=torch.float64, device=self.ids.device)
        return replace(self, temperature=None if temperature == 1.0 else heat)

    @property
    def targets(self) -> Int[Tensor, " N"]:
        """The completion tokens of all rows, one after the other."""
        return self.ids.flatten().index_select(0, self.before + 1)

    @property
    def predicts(self) -> Bool[Tensor, "B L"]:
        """True where the next token is a completion token."""
        flat = self.ids.new_zeros(self.ids.numel(), dtype=torch.bool)
        return flat.index_fill(0, self.before, True).view(self.ids.shape)

    @property
    def rows(self) -> Int[Tensor, " N"]:
        """The row of each completion token."""
        return self.places // self.mask.shape[1]

    @property
    def temperatures(self) -> Float[Tensor, " N"] | None:
        """The temperature of each completion token."""
        return None if self.temperature is None else self.temperature.index_select(0, self.rows)

    def predicting(self, states: Float[Tensor, "B L H"]) -> Float[Tensor, "N H"]:
        """What a trunk gives at the positions that predict completion tokens."""
        return states.flatten(0, 1).index_select(0, self.before)

    def flat(self, values: Float[Tensor, "B T"]) -> Float[Tensor, " N"]:
        """The completion tokens' values, one after the other."""
        return values.flatten().index_select(0, self.places)

    def spread(self, flat: Float[Tensor, " N"]) -> Float[Tensor, "B T"]:
        """Values per completion token, in rows; 0 at padding."""
        whole = flat.new_zeros(self.mask.numel()).index_copy(0, self.places, flat)
        return whole.view(self.mask.shape)
