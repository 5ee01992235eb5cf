"""TRL's data set formats, made buffers.

The formats are prompt-completion, preference (with an explicit or an implicit prompt), unpaired preference,
and language modelling (``messages`` or ``text``), each plain or conversational, told apart by their columns.
A row's further columns go along in `Trajectory.columns`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from rlzoo.buffers.buffer import OfflineBuffer
from rlzoo.buffers.encoding import Encoded, Notes, Prompt, Special, encode
from rlzoo.buffers.schema import to_dataset, to_row, to_table
from rlzoo.buffers.tables import load_table
from rlzoo.chat import Message, messages, options_of
from rlzoo.errors import UserError
from rlzoo.types import Trajectory

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """A prompt with one completion, before tokenisation."""

    prompt: Prompt
    completion: str | Message
    source: str = "demonstration"
    reward: float | None = None


@dataclass(frozen=True)
class Format:
    """A format: what it is called, the columns that tell it, and how a row is read."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], list[Example]]


def from_trl(
    rows: Iterable[Row] | datasets.Dataset,
    tokenizer: Any,
    max_length: int | None = None,
    special_tokens: Special = "reject",
) -> OfflineBuffer:
    """A buffer of the rows of a TRL data set.

    Prompt-completion and language-modelling rows are demonstrations (of ``messages``, the last turn is the
    completion); preference rows give two rows of reward 1 and 0, unpaired ones a row of reward 1 or 0.
    ``prompt_id`` or ``id`` names the prompt, else its text does. ``max_length`` cuts prompt + completion, in
    tokens. Text that spells a special token is an error, or with ``special_tokens="allow"`` counted in a warning.
    Raises UserError naming the row (from 1) and the column.
    """
    return OfflineBuffer(to_dataset(to_table(_rows(rows, tokenizer, max_length, special_tokens))))


def read_buffer(where: str, tokenizer: Any, special_tokens: Special = "reject") -> OfflineBuffer:
    """A saved buffer (folder, .parquet, .jsonl), or a table or Hub data set in one of TRL's formats.

    ``special_tokens`` is that of `from_trl`. Raises UserError naming ``where``, and the row and column at fault.
    """
    if Path(where).is_dir():
        return OfflineBuffer.load(where)
    rows = load_table(where)
    if {"prompt_ids", "completion_ids"} <= set(rows.column_names):
        return OfflineBuffer.load(where)
    try:
        return from_trl(rows, tokenizer, special_tokens=special_tokens)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _rows(
    rows: Iterable[Row], tokenizer: Any, max_length: int | None, special_tokens: Special
) -> Iterator[dict[str, Any]]:
    first, notes = None, Notes("row")
    for number, row in enumerate(rows, 1):
        try:
            found = _recognise(row)
            first = first or found
            _require_same(first, found)
            for encoded, made in _read_row(row, first[0], tokenizer, max_length, special_tokens):
                notes.add(number, encoded.notes)
                yield to_row(made)
        except UserError as error:
            raise UserError(f"row {number}: {error}") from None
    if first is None:
        raise UserError("the data set has no rows: it is empty")
    notes.tell()


def _read_row(
    row: Row, form: Format, tokenizer: Any, max_length: int | None, special_tokens: Special
) -> Iterator[tuple[Encoded, Trajectory]]:
    name = next((name for name in ("prompt_id", "id") if row.get(name) is not None), "prompt_id")
    columns = {key: value for key, value in row.items() if key not in (*form.columns, name)}
    for example in form.read(row):
        options = {} if isinstance(example.prompt, str) else options_of(row)
        encoded = encode(
            tokenizer, example.prompt, example.completion, max_length, special=special_tokens, options=options
        )
        yield (
            encoded,
            Trajectory(
                prompt=encoded.prompt,
                completion=encoded.completion,
                prompt_ids=encoded.prompt_ids,
                completion_ids=encoded.completion_ids,
                truncated=encoded.truncated,
                prompt_id=encoded.key if row.get(name) is None else str(row[name]),
                source=example.source,
                reward=example.reward,
                messages=None if isinstance(example.prompt, str) else example.prompt,
                columns=columns,
            ),
        )


def _recognise(row: Row) -> tuple[Format, bool]:
    """The row's format, and whether it is conversational."""
    given = {name for name, value in row.items() if value is not None}
    for form in FORMATS:
        if given.issuperset(form.columns):
            return form, not isinstance(row[form.columns[0]], str)
    if given & {"prompt", "chosen", "rejected", "completion", "messages", "text"}:
        near = min(FORMATS, key=lambda form: len(set(form.columns) - given) - len(set(form.columns) & given))
        missing = next(name for name in near.columns if name not in given)
        raise UserError(f"no value in column {missing!r}, which {near.name} data need: fill it in, or rename a column")
    raise UserError(
        f"the columns {', '.join(map(repr, row)) or 'none'} match no format of TRL's: name them "
        f"{'; '.join(' + '.join(form.columns) for form in FORMATS)}"
    )


def _require_same(first: tuple[Format, bool], found: tuple[Format, bool]) -> None:
    if found[0] is not first[0]:
        names = dict.fromkeys((*first[0].columns, *found[0].columns))
        odd = next(name for name in names if (name in first[0].columns) != (name in found[0].columns))
        raise UserError(f"this is {found[0].name} data and row 1 is {first[0].name}: fill in or drop column {odd!r}")
    if found[1] != first[1]:
        raise UserError(
            f"column {first[0].columns[0]!r} mixes conversations and plain text: give all rows as one of them"
        )


def _preference(row: Row) -> list[Example]:
    prompt = _prompt(row, "prompt")
    return _ranked(prompt, _completion(row, "chosen", prompt), _completion(row, "rejected", prompt))


def _implicit_preference(row: Row) -> list[Example]:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _implicit_text_preference(chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UserError("columns 'chosen' and 'rejected' mix a conversation and plain text: make both one of them")
    prompt, better = _last_turn(chosen, "chosen")
    other, worse = _last_turn(rejected, "rejected")
    if prompt != other:
        raise UserError("columns 'chosen' and 'rejected' differ before their last turn: give the prompt in 'prompt'")
    return _ranked(prompt, better, worse)


def _implicit_text_preference(chosen: str, rejected: str) -> list[Example]:
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    same = min(len(chosen), len(rejected)) if same is None else same
    if chosen[:same].endswith(" "):
        same -= 1  # as TRL does: the space belongs to the completion's first word
    if not chosen[:same]:
        raise UserError("columns 'chosen' and 'rejected' share no beginning: give the prompt in 'prompt'")
    return _ranked(chosen[:same], chosen[same:], rejected[same:])


def _ranked(prompt: Prompt, better: str | Message, worse: str | Message) -> list[Example]:
    if better == worse:
        raise UserError("columns 'chosen' and 'rejected' are the same: drop the row")
    return [Example(prompt, better, "preference", 1.0), Example(prompt, worse, "preference", 0.0)]


def _unpaired_preference(row: Row) -> list[Example]:
    if row["label"] not in (0, 1):
        raise UserError(f"column 'label' holds {row['label']!r}: give true or false")
    (example,) = _prompt_completion(row)
    return [Example(example.prompt, example.completion, "preference", float(row["label"]))]


def _prompt_completion(row: Row) -> list[Example]:
    prompt = _prompt(row, "prompt")
    return [Example(prompt, _completion(row, "completion", prompt))]


def _messages(row: Row) -> list[Example]:
    conversation = _text(row, "messages")
    if isinstance(conversation, str):
        raise UserError("column 'messages' is plain text: give a list of {role, content}, or call it 'text'")
    return [Example(*_last_turn(conversation, "messages"))]


def _plain_text(row: Row) -> list[Example]:
    text = _text(row, "text")
    if not isinstance(text, str):
        raise UserError("column 'text' is a conversation: call it 'messages'")
    return [Example("", text)]


FORMATS = (
    Format("preference", ("prompt", "chosen", "rejected"), _preference),
    Format("implicit-prompt preference", ("chosen", "rejected"), _implicit_preference),
    Format("unpaired preference", ("prompt", "completion", "label"), _unpaired_preference),
    Format("prompt-completion", ("prompt", "completion"), _prompt_completion),
    Format("conversational language-modelling", ("messages",), _messages),
    Format("plain language-modelling", ("text",), _plain_text),
)


def _text(row: Row, column: str) -> Prompt:
    """A column's text, or its conversation."""
    value = row[column]
    if isinstance(value, str):
        return value
    return messages(value, f"column {column!r}")


def _prompt(row: Row, column: str) -> Prompt:
    prompt = _text(row, column)
    if not prompt:
        raise UserError(f"column {column!r} is empty: give the prompt some text")
    return prompt


def _completion(row: Row, column: str, prompt: Prompt) -> str | Message:
    value = _text(row, column)
    if isinstance(value, str) != isinstance(prompt, str):
        raise UserError(f"column {column!r} and 'prompt' mix a conversation and plain text: make both one of them")
    if isinstance(value, str):
        return value
    if len(value) != 1 or value[0]["role"] != "assistant":
        raise UserError(f"column {column!r} must be one turn of the assistant: move earlier turns to 'prompt'")
    return value[0]


def _last_turn(conversation: list[Message], column: str) -> tuple[list[Message], Message]:
    *prompt, last = conversation
    if last["role"] != "assistant" or not prompt:
        raise UserError(f"column {column!r} must hold a prompt and end with the assistant's turn: add what is missing")
    return prompt, last
