"""Exporting buffers in TRL's data set formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import datasets

from rlzoo.buffers.buffer import Buffer
from rlzoo.buffers.examples import IGNORED
from rlzoo.buffers.selectors import THRESHOLD
from rlzoo.buffers.tables import table_of
from rlzoo.errors import UserError, unknown
from rlzoo.policy.chat import Message
from rlzoo.policy.encoding import Prompt
from rlzoo.types import Selection, Trajectory

Kind = Literal["prompt_completion", "preference", "unpaired_preference", "prompt_only", "tokenised"]
Exported = Iterator[tuple[Trajectory, dict[str, Any]]]


def to_trl(buffer: Buffer, kind: Kind, conversational: bool | None = None) -> datasets.Dataset:
    """The buffer's rows in one of TRL's formats, with ``prompt_id`` and the problems' own columns.

    ``prompt_completion`` takes demonstrations; ``preference`` pairs of a better and a worse completion;
    ``unpaired_preference`` every sampled row with a reward; ``prompt_only`` each prompt once. ``tokenised`` has the
    demonstrations' tokens: ``input_ids``, ``labels``, which are -100 for tokens that are not learned from, and
    ``completion_mask``, 0 for the prompt. In the other forms truncated completions are left out, because TRL would
    append an end of sequence. If ``conversational``, a plain prompt becomes a user turn; None gives conversations if
    all rows are conversations, with the tool calls and whatever else their messages have. Raises UserError for an
    unknown kind, if no rows are left, and for a completion with tokens that are not learned from, or with more than its
    text, in a form that cannot say so.
    """
    if conversational is None:
        conversational = len(buffer) > 0 and buffer.is_complete("messages")
    if kind not in _EXPORTS:
        raise unknown("kind of TRL data set", kind, _EXPORTS)
    rows = [{**row.columns, "prompt_id": row.prompt_id, **out} for row, out in _EXPORTS[kind](buffer, conversational)]
    if not rows:
        raise UserError(f"the buffer has no rows to write as {kind}: choose another kind")
    return table_of(rows, [f"exported row {number}" for number in range(1, len(rows) + 1)])


def _export_prompt_completion(buffer: Buffer, conversational: bool) -> Exported:
    for (index,) in _units(buffer, Selection.DEMONSTRATIONS):
        row = buffer[index]
        yield row, {**_out_prompt(row, conversational), "completion": _out_completion(row, conversational)}


def _export_preference(buffer: Buffer, conversational: bool) -> Exported:
    for better, worse in _units(buffer, Selection.PAIRS, per_prompt=max(len(buffer), 1)):
        row = buffer[better]
        completions = {
            "chosen": _out_completion(row, conversational),
            "rejected": _out_completion(buffer[worse], conversational),
        }
        yield row, {**_out_prompt(row, conversational), **completions}


def _export_unpaired_preference(buffer: Buffer, conversational: bool) -> Exported:
    for row in buffer:
        if row.source != "demonstration" and row.reward is not None and not row.truncated:
            completion = {
                "completion": _out_completion(row, conversational),
                "label": row.reward >= THRESHOLD,
            }
            yield row, {**_out_prompt(row, conversational), **completion}


def _export_prompt_only(buffer: Buffer, conversational: bool) -> Exported:
    seen = set()
    for row in buffer:
        if row.prompt_id not in seen:
            seen.add(row.prompt_id)
            yield row, _out_prompt(row, conversational)


def _export_tokenised(buffer: Buffer, _: bool) -> Exported:
    for (index,) in buffer.view(Selection.DEMONSTRATIONS).units:
        row = buffer[index]
        mask = row.completion_mask or [True] * len(row.completion_ids)
        labels = [token if kept else IGNORED for token, kept in zip(row.completion_ids, mask, strict=True)]
        before = len(row.prompt_ids)
        yield (
            row,
            {
                "input_ids": [*row.prompt_ids, *row.completion_ids],
                "labels": [*[IGNORED] * before, *labels],
                "completion_mask": [*[0] * before, *[1] * len(mask)],
            },
        )


_EXPORTS: Mapping[Kind, Callable[[Buffer, bool], Exported]] = {
    "prompt_completion": _export_prompt_completion,
    "preference": _export_preference,
    "unpaired_preference": _export_unpaired_preference,
    "prompt_only": _export_prompt_only,
    "tokenised": _export_tokenised,
}


def _units(buffer: Buffer, selection: Selection, **options: int) -> list[tuple[int, ...]]:
    truncated = buffer.column("truncated")
    units = buffer.view(selection, **options).units
    return [unit for unit in units if not any(truncated[index] for index in unit)]


def _out_prompt(row: Trajectory, conversational: bool) -> dict[str, Prompt]:
    if not conversational:
        return {"prompt": row.prompt}
    return {"prompt": row.messages or [{"role": "user", "content": row.prompt}]}


def _out_completion(row: Trajectory, conversational: bool) -> str | list[Message]:
    if row.completion_mask is not None:
        raise UserError(
            f"a completion of prompt {row.prompt_id!r} has tokens that are not learned from, which text cannot say: "
            "write demonstrations as tokenised"
        )
    if conversational:
        return row.completion_messages or [{"role": "assistant", "content": row.completion}]
    if row.completion_messages is not None:
        raise UserError(
            f"a completion of prompt {row.prompt_id!r} is a message with more than its text, such as tool calls: write "
            "conversations (conversational=True)"
        )
    return row.completion
