"""Data sets in the formats that people train on, made buffers.

TRL's formats are prompt-completion, preference (with an explicit or an implicit prompt), unpaired preference,
and language modelling (``messages`` or ``text``), each plain or conversational; beside them are graded samples
(prompt, completion, reward), ShareGPT and Alpaca. They are told apart by their columns. A row's further columns
go along in `Trajectory.columns`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from rlzoo.bad_rows import BadRows, told_of
from rlzoo.buffers.buffer import OfflineBuffer
from rlzoo.buffers.encoding import CUT, Encoded, Prompt, Special, encode
from rlzoo.buffers.files import BATCH, Item, batch_rows
from rlzoo.buffers.layouts import as_trl
from rlzoo.buffers.schema import to_dataset, to_row, to_table
from rlzoo.buffers.tables import good_rows, read_rows
from rlzoo.buffers.values import Columns, Row, find, number, own_id, plain_row, renamed, usable
from rlzoo.chat import Message, messages, options_of
from rlzoo.errors import UserError, kind_of
from rlzoo.types import Trajectory

Fits = Callable[[Sequence[int], Sequence[int]], None]
"""Raises UserError for the tokens of a prompt and a completion that a model cannot take."""
COMPLETIONS = ("completion", "chosen", "rejected", "messages", "text")
"""Columns that hold what is learned."""


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
    max_completion_tokens: int | None = None,
    columns: Columns | None = None,
    bad: BadRows | None = None,
    special_tokens: Special = "reject",
) -> OfflineBuffer:
    """A buffer of the rows of a TRL data set.

    Prompt-completion and language-modelling rows are demonstrations (of ``messages``, the last turn is the
    completion); preference rows give two rows of reward 1 and 0, unpaired ones a row of reward 1 or 0, and graded ones
    samples with their reward. ``prompt_id`` or ``id`` names the prompt, else its text does. ``max_length`` cuts
    prompt + completion, in tokens, and ``max_completion_tokens`` the completion. ``columns`` gives columns other names
    first. Text that spells a special token makes a row bad, or with ``special_tokens="allow"`` is counted. ``bad``
    takes the counts, which else become warnings.
    Raises UserError naming the row (from 1) and the column, unless ``bad`` rows are dropped.
    """
    if isinstance(rows, datasets.Dataset):
        items: Iterator[Item] = batch_rows(rows.with_format("arrow").iter(BATCH), "")
        items = ((place.strip(), row) for place, row in items)
    else:
        items = ((f"row {number}", plain_row(row)) for number, row in enumerate(rows, 1))
    encoding = _Encoding(tokenizer, max_length, max_completion_tokens, special_tokens)
    with told_of(bad) as bad:
        return OfflineBuffer(to_dataset(to_table(_rows(items, encoding, columns or {}, bad))))


def read_buffer(
    where: str,
    tokenizer: Any,
    max_completion_tokens: int | None = None,
    split: str | None = None,
    columns: Columns | None = None,
    bad: BadRows | None = None,
    special_tokens: Special = "reject",
    fits: Fits | None = None,
) -> OfflineBuffer:
    """A saved buffer (folder, .parquet, .jsonl), or a table or Hub data set in a format that `from_trl` reads.

    ``split``, ``columns`` and ``special_tokens`` are for tables. Demonstrations of more than
    ``max_completion_tokens`` are cut, and so is any completion of a table. A row that does not fit (`Policy.row_check`)
    is a bad row. Raises UserError naming ``where``, and the row and column at fault.
    """
    with told_of(bad) as bad:
        return _read_buffer(where, bad, split, columns or {}, _Encoding(
            tokenizer, None, max_completion_tokens, special_tokens, fits
        ))  # fmt: skip


def _read_buffer(where: str, bad: BadRows, split: str | None, columns: Columns, encoding: _Encoding) -> OfflineBuffer:
    if (Path(where) / "buffer.json").is_file():
        return _saved(where, encoding, bad)
    items, seen = read_rows(where, split), list[Item]()
    for item in items:
        seen.append(item)
        if isinstance(item[1], dict):
            break
    if isinstance(seen[-1][1], dict) and {"prompt_ids", "completion_ids"} <= set(seen[-1][1]):
        if columns:
            raise UserError(f"{where} is a saved buffer: only a table's columns can be given other names")
        return _saved(where, encoding, bad)
    return OfflineBuffer(to_dataset(to_table(_rows(itertools.chain(seen, items), encoding, columns, bad))))


def _saved(where: str, encoding: _Encoding, bad: BadRows) -> OfflineBuffer:
    """A saved buffer with its demonstrations cut. Samples stay whole: their rewards are of the whole."""
    buffer, limit = OfflineBuffer.load(where, bad), encoding.max_completion_tokens
    if limit is not None and (buffer.tokens("completion_ids") > limit).any():
        cut = (_cut(number, row, encoding.tokenizer, limit, bad) for number, row in enumerate(buffer, 1))
        buffer = OfflineBuffer.from_trajectories(cut)
    if encoding.fits is None or bad.mode == "reject":  # who takes the buffer checks it, all rows at a time
        return buffer
    return _fitting(buffer, encoding.fits, bad)


def _cut(number: int, row: Trajectory, tokenizer: Any, limit: int, bad: BadRows) -> Trajectory:
    if row.source != "demonstration" or len(row.completion_ids) <= limit:
        return row
    bad.note(f"row {number} of the buffer", {CUT: f"{limit} of {len(row.completion_ids)} tokens are left"})
    kept = row.completion_ids[:limit]
    values = {name: value and value[:limit] for name, value in vars(row).items() if name.endswith("_logp")}
    return replace(row, completion=tokenizer.decode(kept), completion_ids=kept, truncated=True, **values)


def _fitting(buffer: OfflineBuffer, fits: Fits, bad: BadRows) -> OfflineBuffer:
    """The rows of a saved buffer that the model can take."""
    kept, bad.rows = [], max(bad.rows, len(buffer))
    for index, ids in enumerate(itertools.chain.from_iterable(buffer.ids())):
        with bad.at(f"row {index + 1} of the buffer"):
            fits(*ids)
            kept.append(index)
    bad.require_some(len(kept))
    return buffer if len(kept) == len(buffer) else OfflineBuffer(buffer.rows.select(kept))


class _Encoding(NamedTuple):
    """How the texts of a table become tokens."""

    tokenizer: Any
    max_length: int | None
    max_completion_tokens: int | None
    special_tokens: Special
    fits: Fits | None = None

    def __call__(self, example: Example, row: Row) -> Encoded:
        options = {} if isinstance(example.prompt, str) else options_of(row)
        made = encode(
            self.tokenizer, example.prompt, example.completion, self.max_length, self.max_completion_tokens,
            self.special_tokens, options,
        )  # fmt: skip
        if self.fits is not None:
            self.fits(made.prompt_ids, made.completion_ids)
        return made


def _rows(items: Iterable[Item], encoding: _Encoding, columns: Columns, bad: BadRows) -> Iterator[dict[str, Any]]:
    chat = bool(getattr(encoding.tokenizer, "chat_template", None))
    first, made = None, 0
    for place, item in good_rows(items, bad):
        rows: list[dict[str, Any]] = []
        with bad.at(place):
            row = as_trl(renamed(item, columns) if columns else item, chat)
            found = _recognise(row)
            if first is not None:
                _require_same(first, found)
            read = list(_read_row(row, found[0], encoding))
            rows = [to_row(trajectory) for _, trajectory in read]
            for number, (encoded, _) in enumerate(read, 1):
                bad.note(place if len(read) == 1 else f"{place}, completion {number}", encoded.notes)
            first = first or found
        made += len(rows)
        yield from rows
    bad.require_some(made)
    if not made:
        raise UserError("the data set has no rows: it is empty")


def _read_row(row: Row, form: Format, encoding: _Encoding) -> Iterator[tuple[Encoded, Trajectory]]:
    for name in form.columns:
        find(row, name)  # raises for one that is no plain data
    known = usable(row)
    names = ("prompt_id",) if form is GRADED else ("prompt_id", "id")  # a graded sample's id may be its own
    name = next((name for name in names if own_id(known.get(name)) is not None), "prompt_id")
    columns = {key: value for key, value in known.items() if key not in (*form.columns, name)}
    examples = form.read(row)
    filled = [column for column in COMPLETIONS if column in form.columns]
    for place, example in enumerate(examples):
        _require_text(example, filled[place % len(filled)])
    for example in examples:
        encoded = encoding(example, known)
        yield (
            encoded,
            Trajectory(
                prompt=encoded.prompt,
                completion=encoded.completion,
                prompt_ids=encoded.prompt_ids,
                completion_ids=encoded.completion_ids,
                truncated=encoded.truncated,
                prompt_id=own_id(known.get(name)) or encoded.key,
                source=example.source,
                reward=example.reward,
                messages=None if isinstance(example.prompt, str) else example.prompt,
                columns=columns,
            ),
        )


def _require_text(example: Example, column: str) -> None:
    said = example.completion
    if not isinstance(said, str):
        (turn,) = messages([said], "the completion")
        said = turn["content"] or str(turn.get("tool_calls") or "")
    if not said.strip():
        what = "has an answer that is" if column == "messages" else "is"
        raise UserError(f"column {column!r} {what} empty or blank: fill it in, or drop the row")


def _recognise(row: Row) -> tuple[Format, bool]:
    """The row's format, and whether it is conversational."""
    given = {name for name, value in row.items() if value is not None}
    for form in FORMATS:
        if given.issuperset(form.columns):
            _require_no_gap(row, given, form)
            value = find(row, form.columns[0])
            if not isinstance(value, (str, list)):
                raise UserError(f"column {form.columns[0]!r} holds {kind_of(value)}: give text or a list of messages")
            return form, isinstance(value, list)
    if given & {"prompt", "chosen", "rejected", "completion", "messages", "text"}:
        near = min(FORMATS, key=lambda form: len(set(form.columns) - given) - len(set(form.columns) & given))
        missing = next(name for name in near.columns if name not in given)
        if missing in row:
            raise UserError(f"no value in column {missing!r}, which {near.name} data need: fill it in, or drop the row")
        raise UserError(
            f"no column {missing!r}, which {near.name} data need; the row has {', '.join(map(repr, row))}: "
            f"{_rename(missing)}"
        )
    if not row:
        raise UserError("has no columns: fill the row in, or drop it")
    raise UserError(
        f"the columns {', '.join(map(repr, row))} match no format that rlzoo reads "
        f"({'; '.join(' + '.join(form.columns) for form in FORMATS)}): {_rename('completion')}"
    )


def _rename(column: str) -> str:
    return f"say which column stands for it with --column {column}=NAME, or columns: {{{column}: NAME}}"


def _require_no_gap(row: Row, given: set[str], form: Format) -> None:
    """Raise UserError for a row that would be of a richer format, if a column of it were not null."""
    for richer in FORMATS:
        missing = [name for name in richer.columns if name not in given]
        if set(form.columns) < set(richer.columns) <= set(row) and missing:
            raise UserError(
                f"no value in column {missing[0]!r}, which {richer.name} data need: fill it in, or drop the column"
            )


def _require_same(first: tuple[Format, bool], found: tuple[Format, bool]) -> None:
    if found[0] is not first[0]:
        names = dict.fromkeys((*first[0].columns, *found[0].columns))
        odd = next(name for name in names if (name in first[0].columns) != (name in found[0].columns))
        raise UserError(
            f"this is {found[0].name} data and the first row is {first[0].name}: fill in or drop column {odd!r}"
        )
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
    label = row["label"]
    if isinstance(label, str):  # as a CSV file has it
        label = {"true": 1, "false": 0, "1": 1, "0": 0}.get(label.strip().lower(), label)
    if label not in (0, 1):
        raise UserError(f"column 'label' holds {row['label']!r:.60}: give true or false")
    (example,) = _prompt_completion(row)
    return [Example(example.prompt, example.completion, "preference", float(label))]


def _graded(row: Row) -> list[Example]:
    """Samples of other policies: one completion with its reward, or lists of both."""
    prompt, completions, rewards = _prompt(row, "prompt"), row["completion"], row["reward"]
    if not (isinstance(completions, list) and isinstance(rewards, list)):
        return [Example(prompt, _completion(row, "completion", prompt), "policy", _reward(rewards))]
    if len(completions) != len(rewards) or not completions:
        raise UserError(
            f"columns 'completion' and 'reward' hold lists of {len(completions)} and {len(rewards)}: "
            "give each completion its reward"
        )
    pairs = zip(completions, rewards, strict=True)
    made = [(_completion({"completion": each}, "completion", prompt), _reward(reward)) for each, reward in pairs]
    return [Example(prompt, completion, "policy", reward) for completion, reward in made]


def _reward(value: Any) -> float:
    try:
        return number(value)
    except ValueError:
        told = "null" if value is None else f"{value!r:.60}"
        raise UserError(f"column 'reward' holds {told}: give a finite number") from None


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


GRADED = Format("graded", ("prompt", "completion", "reward"), _graded)
FORMATS = (
    Format("preference", ("prompt", "chosen", "rejected"), _preference),
    Format("implicit-prompt preference", ("chosen", "rejected"), _implicit_preference),
    Format("unpaired preference", ("prompt", "completion", "label"), _unpaired_preference),
    GRADED,
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
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise UserError(f"column {column!r} is empty or blank: give the prompt some text")
    return prompt


def _completion(row: Row, column: str, prompt: Prompt) -> str | Message:
    value = _text(row, column)
    if isinstance(value, str) != isinstance(prompt, str):
        raise UserError(f"columns {column!r} and 'prompt' mix a conversation and plain text: make both one of them")
    if isinstance(value, str):
        return value
    if len(value) != 1 or value[0]["role"] != "assistant":
        raise UserError(f"column {column!r} must be one turn of the assistant: move earlier turns to 'prompt'")
    return value[0]


def _last_turn(conversation: list[Message], column: str) -> tuple[list[Message], Message]:
    *prompt, last = conversation
    if last["role"] != "assistant" or not prompt:
        roles = ", ".join(message["role"] for message in conversation)
        raise UserError(
            f"column {column!r} must hold a prompt and end with the assistant's turn, and its roles are {roles:.80}: "
            "add what is missing, or call them user and assistant"
        )
    return prompt, last
