"""Prompts and completions as model input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlzoo.jobs.memory import on_device
from rlzoo.policy.packing import Pack


class Tokens(Protocol):
    """A prompt and a completion as token ids, and the temperature of log-probs; `Trajectory` implements it."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """The tokens of the prompt."""
        ...

    @property
    def completion_ids(self) -> Sequence[int]:
        """The tokens of the completion, including its end of sequence."""
        ...

    @property
    def temperature(self) -> float:
        """The temperature of log-probs."""
        ...

    @property
    def completion_mask(self) -> Sequence[bool] | None:
        """Which completion tokens are learned from; None: all."""
        ...


class Row(NamedTuple):
    """The smallest implementation of `Tokens`."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    temperature: float = 1.0
    completion_mask: Sequence[bool] | None = None


def length(row: Tokens) -> int:
    """The number of prompt and completion tokens of a row."""
    return len(row.prompt_ids) + len(row.completion_ids)


def learned(row: Tokens) -> Int[np.ndarray, " n"]:
    """The places in a row's completion of the n tokens that are learned from: its positions in a batch."""
    if row.completion_mask is None:
        return np.arange(len(row.completion_ids))
    return np.flatnonzero(row.completion_mask)


def learned_tokens(row: Tokens) -> int:
    """The number of completion tokens of a row that are learned from."""
    return len(row.completion_ids) if row.completion_mask is None else sum(row.completion_mask)


@dataclass(frozen=True)
class Sequences:
    """Prompts and completions as model input, padded on the right, so that causal attention needs no mask.

    B is the number of rows, L their padded length, T the padded number of completion tokens that are learned from, and
    N the number of these in all rows; only they are predicted, and other completion tokens are context. With a
    ``pack``, the rows are concatenated, and ``ids`` has the shape [1, total tokens]. Positions of learned tokens are
    computed from the rows, because reading a boolean mask on the device would wait for the GPU.
    """

    ids: Int[Tensor, "B L"]
    mask: Bool[Tensor, "B T"]
    """True at learned tokens; columns are their positions, one after the other."""
    before: Int[Tensor, " N"]
    """The indices in the flattened ``ids`` of the positions that predict learned tokens, row by row."""
    places: Int[Tensor, " N"]
    """The indices in the flattened ``mask`` of learned tokens, row by row."""
    lengths: tuple[int, ...]
    """The number of tokens of each row."""
    temperature: Float[Tensor, " B"] | None = None
    """The temperature of each row; None: 1."""
    pack: Pack | None = None

    @classmethod
    def of(cls, rows: Sequence[Tokens], device: torch.device) -> Sequences:
        """Collate rows, each at its own temperature."""
        prompts, completions = [row.prompt_ids for row in rows], [row.completion_ids for row in rows]
        heats = [row.temperature for row in rows]
        return cls.collate(prompts, completions, device, heats, [learned(row) for row in rows])

    @classmethod
    def collate(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        device: torch.device,
        temperature: Sequence[float] | None = None,
        own: Sequence[Int[np.ndarray, " n"]] | None = None,
    ) -> Sequences:
        """Join each prompt with its completion; ``temperature`` is one per row. Every prompt needs a token.

        ``own`` are the places of each row's learned tokens in its completion; None: all.
        """
        lengths = tuple(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        own = [np.arange(len(completion)) for completion in completions] if own is None else own
        rows, longest = len(prompts), max(lengths)
        width = max(map(len, own))
        ids, mask = np.zeros((rows, longest), np.int64), np.zeros((rows, width), np.bool_)
        before, places = [], []
        for row, (prompt, completion, some) in enumerate(zip(prompts, completions, own, strict=True)):
            ids[row, : len(prompt)], ids[row, len(prompt) : lengths[row]] = prompt, completion
            mask[row, : len(some)] = True
            before.append(row * longest + len(prompt) - 1 + some)
            places.append(np.arange(row * width, row * width + len(some)))
        heat = None
        if temperature is not None and any(t != 1.0 for t in temperature):
            heat = on_device(torch.tensor(temperature, dtype=torch.float64), device)
        ids_, mask_, before_, places_ = (
            on_device(torch.as_tensor(x), device) for x in (ids, mask, np.concatenate(before), np.concatenate(places))
        )
        return cls(ids_, mask_, before_, places_, lengths, heat)

    def at(self, temperature: float) -> Sequences:
        """The same rows, all at one temperature."""
        heat = torch.full(self.mask.shape[:1], temperature, dtype=torch.float64, device=self.ids.device)
        return replace(self, temperature=None if temperature == 1.0 else heat)

    def packed(self) -> Sequences:
        """The same rows, concatenated without padding; this does not wait for the device."""
        if self.pack is not None:
            return self
        ids = torch.cat([row[:length] for row, length in zip(self.ids, self.lengths, strict=True)])[None]
        return self._moved(ids, 1, Pack.of(self.lengths, self.ids.device))

    def padded(self) -> Sequences:
        """The same rows, padded on the right."""
        if self.pack is None:
            return self
        ids = pad_sequence(list(torch.split(self.ids[0], list(self.lengths))), batch_first=True)
        return self._moved(ids, -1, None)

    def _moved(self, ids: Int[Tensor, "B L"], sign: int, pack: Pack | None) -> Sequences:
        """The same rows with new ``ids``: from the padded to the packed layout (``sign`` 1), or back (-1)."""
        starts = torch.tensor([0, *self.lengths[:-1]]).cumsum(0)
        shift = sign * (starts - max(self.lengths) * torch.arange(len(self.lengths)))
        before = self.before + on_device(shift, ids.device).index_select(0, self.rows)
        return replace(self, ids=ids, before=before, pack=pack)

    @property
    def targets(self) -> Int[Tensor, " N"]:
        """The learned tokens of all rows, concatenated."""
        return self.ids.flatten().index_select(0, self.before + 1)

    @property
    def predicts(self) -> Bool[Tensor, "B L"]:
        """True where the next token is a learned one."""
        flat = self.ids.new_zeros(self.ids.numel(), dtype=torch.bool)
        return flat.index_fill(0, self.before, True).view(self.ids.shape)

    @property
    def rows(self) -> Int[Tensor, " N"]:
        """The row of each learned token."""
        return self.places // self.mask.shape[1]

    @property
    def temperatures(self) -> Float[Tensor, " N"] | None:
        """The temperature of each learned token."""
        return None if self.temperature is None else self.temperature.index_select(0, self.rows)

    def predicting(self, states: Float[Tensor, "B L H"]) -> Float[Tensor, "N H"]:
        """A trunk's hidden states at the positions that predict learned tokens."""
        return states.flatten(0, 1).index_select(0, self.before)

    def flat(self, values: Float[Tensor, "B T ..."]) -> Float[Tensor, "N ..."]:
        """The values at learned tokens, concatenated; the inverse of `spread`."""
        return values.flatten(0, 1).index_select(0, self.places)

    def spread(self, flat: Float[Tensor, "N ..."]) -> Float[Tensor, "B T ..."]:
        """Concatenated values of learned tokens as rows; 0 at padding."""
        axes = flat.shape[1:]
        whole = flat.new_zeros(self.mask.numel(), *axes).index_copy(0, self.places, flat)
        return whole.view(*self.mask.shape, *axes)
