"""Training formats: how a row's columns identify its format, and the prompts and completions that it contains.

TRL's formats are prompt-completion, preference (with an explicit or an implicit prompt), unpaired preference,
and language modelling (``messages`` or ``text``), each plain or conversational. Graded samples (prompt, completion,
reward) are read as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rlzoo.buffers.values import Row, find, number
from rlzoo.errors import UserError, kind_of
from rlzoo.policy.chat import Message, messages
from rlzoo.policy.encoding import Completion, Prompt

_QUESTIONS = ("question", "query", "instruction", "input", "problem")
"""Columns that probably hold the prompt if no column has that name."""
COMPLETIONS = ("completion", "chosen", "rejected", "messages", "text")
"""Columns that hold completions."""
LAST, ALL = "last", "all"
"""Which turns of the assistant are learned from; anything else is the key of a message that says so, as ``weight``."""
UNMARKED = "conversations in which no turn has the key of training.turns, so that all the assistant's are learned from"


class TokenisedRow(NamedTuple):
    """A row that is tokenised already."""

    prompt: list[int]
    completion: list[int]
    mask: list[bool]
    """Which tokens of the completion are learned from."""


@dataclass(frozen=True)
class Example:
    """A prompt with one completion, before tokenisation."""

    prompt: Prompt
    completion: Completion
    source: str = "demonstration"
    reward: float | None = None
    learned: tuple[int, ...] | None = None
    """Which messages of a completion of several turns are learned from."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What was assumed in reading → an example."""
    tokens: TokenisedRow | None = None
    """Its tokens, in place of prompt and completion."""


@dataclass(frozen=True)
class ExampleFormat:
    """A format: its name, the columns that identify it, and how a row is read."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row, str], list[Example]]
    """The examples of a row, given which turns of the assistant are learned from."""


def require_text(example: Example, column: str) -> None:
    """Raise UserError for a completion, or a turn learned from, without text or tool calls."""
    said = example.completion
    if isinstance(said, str):
        texts = [said]
    else:
        turns = messages(said if isinstance(said, list) else [said], "the completion")
        learned = range(len(turns)) if example.learned is None else example.learned
        texts = [turns[place]["content"] or str(turns[place].get("tool_calls") or "") for place in learned]
    if not all(text.strip() for text in texts):
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
        f"({'; '.join(' + '.join(form.columns) for form in FORMATS)}): {_rename('prompt', 'completion')}"
    )


def _distance(columns: set[str], row: set[str], given: set[str]) -> tuple[int, int, int]:
    """How far a row is from a format with these columns: how many it lacks, how many it has, and how many are null."""
    return len(columns - row), -len(columns & row), len(columns - given)


def _rename(*columns: str) -> str:
    options = " ".join(f"--column {column}=NAME" for column in columns)
    return f"name yours with {options}, or columns: {{{', '.join(f'{column}: NAME' for column in columns)}}}"


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


def _preference(row: Row, turns: str) -> list[Example]:
    prompt = _prompt(row, "prompt")
    return _ranked(*(_completed(row, name, prompt, turns) for name in ("chosen", "rejected")))


def _implicit_preference(row: Row, turns: str) -> list[Example]:
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
    return _ranked(Example(prompt, better), Example(prompt, worse))


def _implicit_text_preference(chosen: str, rejected: str) -> list[Example]:
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    same = min(len(chosen), len(rejected)) if same is None else same
    if chosen[:same].endswith(" "):
        same -= 1  # as TRL does: the space belongs to the completion's first word
    if not chosen[:same]:
        raise UserError("columns 'chosen' and 'rejected' share no beginning: give the prompt in 'prompt'")
    return _ranked(Example(chosen[:same], chosen[same:]), Example(chosen[:same], rejected[same:]))


def _ranked(better: Example, worse: Example) -> list[Example]:
    if better.completion == worse.completion:
        raise UserError("columns 'chosen' and 'rejected' are the same: drop the row")
    return [replace(better, source="preference", reward=1.0), replace(worse, source="preference", reward=0.0)]


def _unpaired_preference(row: Row, turns: str) -> list[Example]:
    label = row["label"]
    if isinstance(label, str):  # as a CSV file has it
        label = {"true": 1, "false": 0, "1": 1, "0": 0}.get(label.strip().lower(), label)
    if label not in (0, 1):
        raise UserError(f"column 'label' holds {row['label']!r:.60}: give true or false")
    (example,) = _prompt_completion(row, turns)
    return [replace(example, source="preference", reward=float(label))]


def _graded(row: Row, turns: str) -> list[Example]:
    """Samples of other policies: one completion with its reward, or lists of both."""
    prompt, completions, rewards = _prompt(row, "prompt"), row["completion"], row["reward"]
    if not (isinstance(completions, list) and isinstance(rewards, list)):
        one = _completed(row, "completion", prompt, turns)
        return [replace(one, source="policy", reward=_reward(rewards))]
    if len(completions) != len(rewards) or not completions:
        raise UserError(
            f"columns 'completion' and 'reward' hold lists of {len(completions)} and {len(rewards)}: "
            "give each completion its reward"
        )
    made = [_completed({"completion": each}, "completion", prompt, turns) for each in completions]
    pairs = zip(made, rewards, strict=True)
    return [replace(one, source="policy", reward=_reward(reward)) for one, reward in pairs]


def _reward(value: Any) -> float:
    try:
        return number(value)
    except ValueError:
        told = "null" if value is None else f"{value!r:.60}"
        raise UserError(f"column 'reward' holds {told}: give a finite number") from None


def _prompt_completion(row: Row, turns: str) -> list[Example]:
    return [_completed(row, "completion", _prompt(row, "prompt"), turns)]


def _messages(row: Row, turns: str) -> list[Example]:
    conversation = _text(row, "messages")
    if isinstance(conversation, str):
        raise UserError("column 'messages' is plain text: give a list of {role, content}, or call it 'text'")
    if turns == LAST:
        return [Example(*_last_turn(conversation, "messages"))]
    learned, notes = _learned(conversation, turns, "messages")
    first, last = learned[0], learned[-1]
    if not first:
        raise UserError(
            "column 'messages' begins with a turn of the assistant that is learned from, which no prompt comes before: "
            "drop that turn, or the row"
        )
    own = tuple(place - first for place in learned)
    return [Example(conversation[:first], conversation[first : last + 1], learned=own, notes=notes)]


def _learned(conversation: list[Message], turns: str, column: str) -> tuple[list[int], dict[str, str]]:
    """The places of the assistant's turns that are learned from, and what was assumed in finding them."""
    own = [place for place, message in enumerate(conversation) if message["role"] == "assistant"]
    notes: dict[str, str] = {}
    if turns == LAST:
        own = own[-1:]
    elif turns != ALL and not any(turns in message for message in conversation):
        notes = {UNMARKED: f"no {turns!r} in column {column!r}"}
    elif turns != ALL:
        own = [place for place in own if _is_marked(conversation[place].get(turns, 1), turns, place, column)]
    if not own:
        roles = ", ".join(message["role"] for message in conversation)
        raise UserError(
            f"column {column!r} has no turn of the assistant that is learned from (turns: {turns}), and its roles are "
            f"{roles:.80}: drop the row"
        )
    return own, notes


def _is_marked(value: Any, key: str, place: int, column: str) -> bool:
    if value not in (0, 1):
        raise UserError(f"column {column!r} has {key!r} = {value!r:.40} in message {place + 1}: give 0 or 1")
    return bool(value)


IGNORED = -100
"""The label of tokens that are not learned from, in data tokenised for transformers' Trainer."""


def _tokenised(row: Row, turns: str) -> list[Example]:
    """Tokens with the marks that trainers read: those that any of them leaves out are not learned from."""
    ids = _integers(row, "input_ids")
    marks = [_integers(row, name) for name in ("completion_mask", "assistant_masks") if row.get(name) is not None]
    labels = _integers(row, "labels") if row.get("labels") is not None else ids
    if odd := [place for place, (a, b) in enumerate(zip(ids, labels, strict=False)) if b not in (a, IGNORED)]:
        raise UserError(
            f"column 'labels' has {labels[odd[0]]} for token {ids[odd[0]]} at place {odd[0]}: give the token itself, "
            f"or {IGNORED} where it is not learned from"
        )
    if short := [len(own) for own in (*marks, labels) if len(own) != len(ids)]:
        raise UserError(
            f"column 'input_ids' has {len(ids)} tokens and a mask or label of {short[0]}: give one per token"
        )
    learned = [label != IGNORED and all(own) for label, *own in zip(labels, *marks, strict=True)]
    if not any(learned[1:]):
        raise UserError("column 'input_ids' has no token that is learned from, after the first: drop the row")
    begins = _integers(row, "completion_mask") if row.get("completion_mask") is not None else learned
    start, end = max(1, next(place for place, one in enumerate(begins) if one)), len(ids) - learned[::-1].index(True)
    return [Example("", "", tokens=TokenisedRow(ids[:start], ids[start:end], learned[start:end]))]


def _integers(row: Row, column: str) -> list[int]:
    value = find(row, column)
    if not isinstance(value, list) or not all(isinstance(x, int) for x in value):
        raise UserError(f"column {column!r} holds {kind_of(value)}: give a list of whole numbers")
    return value


def _plain_text(row: Row, turns: str) -> list[Example]:
    text = _text(row, "text")
    if not isinstance(text, str):
        raise UserError("column 'text' is a conversation: call it 'messages'")
    return [Example("", text)]


GRADED = ExampleFormat("graded", ("prompt", "completion", "reward"), _graded)
FORMATS = (
    *(
        ExampleFormat("tokenised", ("input_ids", marks), _tokenised)
        for marks in ("labels", "assistant_masks", "completion_mask")
    ),
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


def _completed(row: Row, column: str, prompt: Prompt, turns: str) -> Example:
    """The prompt with the completion in a column: text, or turns, of which ``turns`` says what is learned from."""
    value = _text(row, column)
    if isinstance(value, str) != isinstance(prompt, str):
        raise UserError(f"columns {column!r} and 'prompt' mix a conversation and plain text: use one form for both")
    if isinstance(value, str):
        return Example(prompt, value)
    if {value[0]["role"], value[-1]["role"]} != {"assistant"}:
        raise UserError(
            f"column {column!r} must begin and end with a turn of the assistant: move what is before to 'prompt'"
        )
    if len(value) == 1 and turns in (LAST, ALL):
        return Example(prompt, value[0])
    learned, notes = _learned(value, turns, column)
    return Example(prompt, value[: learned[-1] + 1], learned=tuple(learned), notes=notes)


def _last_turn(conversation: list[Message], column: str) -> tuple[list[Message], Message]:
    *prompt, last = conversation
    if last["role"] != "assistant" or not prompt:
        roles = ", ".join(message["role"] for message in conversation)
        raise UserError(
            f"column {column!r} must hold a prompt and end with the assistant's turn, and its roles are {roles:.80}: "
            "add what is missing, or call them user and assistant"
        )
    return prompt, last
