"""Training formats: how a row's columns identify its format, and the prompts and completions that it contains.

TRL's formats are prompt-completion, preference (with an explicit or an implicit prompt), unpaired preference,
and language modelling (``messages`` or ``text``), each plain or conversational. Graded samples (prompt, completion,
reward) are read as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlzoo.buffers.values import Row, find, number
from rlzoo.errors import UserError, kind_of
from rlzoo.policy.chat import Message, messages
from rlzoo.policy.encoding import Prompt

_QUESTIONS = ("question", "query", "instruction", "input", "problem")
"""Columns that probably hold the prompt if no column has that name."""
COMPLETIONS = ("completion", "chosen", "rejected", "messages", "text")
"""Columns that hold completions."""


@dataclass(frozen=True)
class Example:
    """A prompt with one completion, before tokenisation."""

    prompt: Prompt
    completion: str | Message
    source: str = "demonstration"
    reward: float | None = None


@dataclass(frozen=True)
class ExampleFormat:
    """A format: its name, the columns that identify it, and how a row is read."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], list[Example]]


def require_text(example: Example, column: str) -> None:
    """Raise UserError for a completion without text or tool calls."""
    said = example.completion
    if not isinstance(said, str):
        (turn,) = messages([said], "the completion")
        said = turn["content"] or str(turn.get("tool_calls") or "")
    if not said.strip():
        what = "has an answer that is" if column == "messages" else "is"
        raise UserError(f"column {column!r} {what} empty or blank: fill it in, or drop the row")


def recognise(row: Row) -> tuple[ExampleFormat, bool]:
    """The row's format, and whether it is conversational. Raises UserError if it matches none, naming the nearest."""
    given = {name for name, value in row.items() if value is not None}
    for form in FORMATS:
        if given.issuperset(form.columns):
            _require_no_gap(row, given, form)
            value = find(row, form.columns[0])
            if not isinstance(value, (str, list)):
                raise UserError(f"column {form.columns[0]!r} holds {kind_of(value)}: give text or a list of messages")
            return form, isinstance(value, list)
    if set(row) & {"prompt", *COMPLETIONS}:
        near = min(FORMATS, key=lambda form: _distance(set(form.columns), set(row), given))
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


def _distance(columns: set[str], row: set[str], given: set[str]) -> tuple[int, int, int]:
    """How far a row is from a format with these columns: how many it lacks, how many it has, and how many are null."""
    return len(columns - row), -len(columns & row), len(columns - given)


def _rename(column: str) -> str:
    return f"say which column stands for it with --column {column}=NAME, or columns: {{{column}: NAME}}"


def _require_no_gap(row: Row, given: set[str], form: ExampleFormat) -> None:
    """Raise UserError for a row that would have a richer format if one of its columns were not null."""
    for richer in FORMATS:
        missing = [name for name in richer.columns if name not in given]
        if set(form.columns) < set(richer.columns) <= set(row) and missing:
            raise UserError(
                f"no value in column {missing[0]!r}, which {richer.name} data need: fill it in, or drop the column"
            )


def require_same(first: tuple[ExampleFormat, bool], found: tuple[ExampleFormat, bool]) -> None:
    """Raise UserError for a row whose format is not that of the first row, or if only one of them is conversational."""
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
    if asked := [name for name in _QUESTIONS if isinstance(row.get(name), str)]:
        raise UserError(
            f"no column 'prompt', but {asked[0]!r}: say whether it is the prompt, with --column prompt={asked[0]}, or "
            f"what 'chosen' and 'rejected' share is, with --column {asked[0]}=null (or columns: in an experiment)"
        )
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _implicit_text_preference(chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UserError("columns 'chosen' and 'rejected' mix a conversation and plain text: use one form for both")
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


GRADED = ExampleFormat("graded", ("prompt", "completion", "reward"), _graded)
FORMATS = (
    ExampleFormat("preference", ("prompt", "chosen", "rejected"), _preference),
    ExampleFormat("implicit-prompt preference", ("chosen", "rejected"), _implicit_preference),
    ExampleFormat("unpaired preference", ("prompt", "completion", "label"), _unpaired_preference),
    GRADED,
    ExampleFormat("prompt-completion", ("prompt", "completion"), _prompt_completion),
    ExampleFormat("conversational language-modelling", ("messages",), _messages),
    ExampleFormat("plain language-modelling", ("text",), _plain_text),
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
        raise UserError(f"columns {column!r} and 'prompt' mix a conversation and plain text: use one form for both")
    if isinstance(value, str):
        return value
    if len(value) != 1 or value[0]["role"] != "assistant":
        raise UserError(
            f"column {column!r} must be one turn of the assistant, after the prompt's alone: move others to 'prompt'"
        )
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
