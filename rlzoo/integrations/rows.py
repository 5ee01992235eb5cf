"""The rows of a batch of another library: which positions are learned from, and the sequences that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from rlzoo.errors import UserError
from rlzoo.policy import Sequences

IGNORED = -100
"""The label of tokens that are not learned from, in transformers and TRL."""


def rows_of_labels(
    labels: Int[Tensor, "B L"], position_ids: Int[Tensor, "B L"] | None = None, keep_empty: bool = False
) -> Sequences:
    """The learned tokens of a batch, each row of the result being one sequence of it.

    Labels are not shifted: position t predicts label t + 1. In a packed batch, which has ``position_ids``, a sequence
    begins where they are 0; otherwise each row is one. Sequences without a learned token are left out unless
    ``keep_empty``. Completion positions are the learned tokens of a sequence, one after another.
    """
    shape, device = labels.shape, labels.device
    learned = functional.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten()
    before = learned.nonzero()[:, 0]
    row = torch.arange(shape[0], device=device).repeat_interleave(shape[1])
    if position_ids is not None:
        begins = (position_ids.expand(shape) == 0).clone()
        begins[:, 0] = True
        row = begins.flatten().cumsum(0) - 1
    of_token = row.index_select(0, (before + 1).clamp(max=max(row.numel() - 1, 0)))
    if keep_empty:
        count, number = int(row[-1]) + 1, of_token
    else:
        kinds, number = torch.unique_consecutive(of_token, return_inverse=True)
        count = len(kinds)
    lengths = torch.bincount(number, minlength=count) if len(number) else torch.zeros(count, dtype=torch.long)
    width = max(int(lengths.max()) if count else 0, 1)
    first = lengths.cumsum(0) - lengths
    place = torch.arange(len(number), device=device) - first.to(device)[number]
    mask = torch.arange(width, device=device) < lengths.to(device)[:, None]
    return Sequences(labels, mask, before, number * width + place, tuple(lengths.tolist()))


def value_of_column(value: Tensor, labels: Int[Tensor, "B L"], rows: Sequences, name: str) -> Tensor:
    """A column of a batch as [R] or [R, T], for the R rows of `rows_of_labels`.

    The column has a number per sequence, or per token at the places of the labels. Raises UserError otherwise.
    """
    if value.numel() == labels.numel():
        # the value at the label that a position predicts
        shifted = functional.pad(value.reshape(labels.shape)[:, 1:], (0, 1)).flatten()
        return rows.spread(shifted.index_select(0, rows.before))
    if value.ndim <= 1 and value.numel() == len(rows.mask):
        return value.reshape(-1)
    raise UserError(
        f"column {name!r} has {value.numel()} values for {len(rows.mask)} sequences and {labels.numel()} tokens: give "
        "one per sequence or per token"
    )


class WithColumns:
    """A data collator that passes numbers on to the loss besides what another collator returns.

    A column has a number per row, a number per token of the row's ``input_ids``, or one per learned token: those whose
    label is not -100.
    """

    def __init__(self, collator: Any, names: Sequence[str]) -> None:
        self.collator, self.names = collator, tuple(names)

    def __getattr__(self, name: str) -> Any:
        if name == "collator" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The other collator's batch with the columns [B], or [B, L] like its labels. Raises UserError naming a row
        without a column that others have, or with another number of values."""
        present = [name for name in self.names if any(name in example for example in examples)]
        plain = [{key: value for key, value in example.items() if key not in present} for example in examples]
        batch: dict[str, Any] = dict(self.collator(plain))
        for name in present:
            values = [example.get(name) for example in examples]
            for number, (value, example) in enumerate(zip(values, examples, strict=True)):
                _check_value(value, example, name, number)
            if any(isinstance(value, Sequence) for value in values):
                tokens = [_per_token(value, example) for value, example in zip(values, examples, strict=True)]
                batch[name] = _like_labels(tokens, batch["labels"])
            else:
                batch[name] = torch.tensor(values, dtype=torch.float64 if name == "reward" else None)
        return batch


def _check_value(value: Any, example: Mapping[str, Any], name: str, number: int) -> None:
    if isinstance(value, (bool, int, float)):
        return
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(x, (int, float)) for x in value):
        raise UserError(f"column {name!r} has no numbers in row {number + 1} of a batch: {str(value)[:60]!r}")
    tokens, learned = len(example["input_ids"]), _learned(example)
    if len(value) not in (tokens, len(learned)):
        raise UserError(
            f"column {name!r} has {len(value)} values in row {number + 1} of a batch, whose input_ids are {tokens}, "
            f"{len(learned)} of them learned: give one per token or per learned token"
        )


def _learned(example: Mapping[str, Any]) -> list[int]:
    """The places of the learned tokens of a row."""
    labels = example.get("labels", example["input_ids"])
    return [place for place, label in enumerate(labels) if label != IGNORED]


def _per_token(value: Any, example: Mapping[str, Any]) -> list[float]:
    tokens = len(example["input_ids"])
    if not isinstance(value, Sequence):
        return [float(value)] * tokens
    if len(value) == tokens:
        return list(value)
    found = [0.0] * tokens
    for place, x in zip(_learned(example), value, strict=True):
        found[place] = x
    return found


def _like_labels(rows: Sequence[Sequence[float]], labels: Int[Tensor, "B L"]) -> Tensor:
    """Values of rows in the layout of the labels: padded on the right, or one after another."""
    found = torch.zeros(labels.shape)
    if len(labels) == len(rows):
        for place, row in enumerate(rows):
            found[place, : len(row)] = torch.tensor(row)
        return found
    flat = torch.tensor([x for row in rows for x in row])
    found.view(-1)[: len(flat)] = flat
    return found
