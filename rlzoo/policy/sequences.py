"""Prompts and completions as model input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlzoo.policy.packing import Pack


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

    With a ``pack``, ``ids`` and ``predicts`` are [1, N], all rows one after the other.
    """

    ids: Int[Tensor, "B L"]
    predicts: Bool[Tensor, "B L"]
    """True where the next token is a completion token."""
    mask: Bool[Tensor, "B T"]
    """True at completion tokens, in positions without the prompt."""
    lengths: tuple[int, ...]
    """The number of tokens of each row."""
    temperature: Float[Tensor, " B"] | None = None
    """The temperature of each row; None: 1."""
    pack: Pack | None = None

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
        lengths = tuple(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        rows, longest = len(prompts), max(lengths)
        ids = torch.zeros(rows, longest, dtype=torch.long)
        predicts = torch.zeros(rows, longest, dtype=torch.bool)
        mask = torch.zeros(rows, max(map(len, completions)), dtype=torch.bool)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids[row, : len(prompt) + len(completion)] = torch.as_tensor([*prompt, *completion])
            predicts[row, len(prompt) - 1 : len(prompt) + len(completion) - 1] = True
            mask[row, : len(completion)] = True
        heat = None
        if temperature is not None and any(t != 1.0 for t in temperature):
            heat = torch.tensor(temperature, dtype=torch.float64, device=device)
        return cls(ids.to(device), predicts.to(device), mask.to(device), lengths, heat)

    @property
    def tokens(self) -> int:
        """The number of prompt and completion tokens, without padding."""
        return sum(self.lengths)

    def at(self, temperature: float) -> Sequences:
        """The same rows, all at one temperature."""
        heat = torch.full(self.mask.shape[:1], temperature, dtype=torch.float64, device=self.ids.device)
        return replace(self, temperature=None if temperature == 1.0 else heat)

    def packed(self) -> Sequences:
        """The same rows without padding, one after the other; no device is waited for."""
        if self.pack is not None:
            return self
        ids, predicts = (
            torch.cat([row[:length] for row, length in zip(table, self.lengths, strict=True)])[None]
            for table in (self.ids, self.predicts)
        )
        return replace(self, ids=ids, predicts=predicts, pack=Pack.of(self.lengths, self.ids.device))

    def padded(self) -> Sequences:
        """The same rows, padded."""
        if self.pack is None:
            return self
        ids, predicts = (
            pad_sequence(list(torch.split(table[0], list(self.lengths))), batch_first=True)
            for table in (self.ids, self.predicts)
        )
        return replace(self, ids=ids, predicts=predicts, pack=None)

    @property
    def targets(self) -> Int[Tensor, " N"]:
        """The completion tokens of all rows, one after the other."""
        return self.ids.roll(-1, dims=1)[self.predicts]

    @property
    def temperatures(self) -> Float[Tensor, " N"] | None:
        """The temperature of each completion token."""
        if self.temperature is None:
            return None
        return self.temperature[:, None].expand(self.mask.shape)[self.mask]

    def spread(self, flat: Float[Tensor, " N"]) -> Float[Tensor, "B T"]:
        """Values per completion token, in rows; 0 at padding."""
        return flat.new_zeros(self.mask.shape).masked_scatter(self.mask, flat)
