"""The interface of importers, and their registry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from rlzoo.buffers.files import Item
from rlzoo.buffers.values import Row, find, number, read_json, usable
from rlzoo.config.validation import Strict, validated
from rlzoo.errors import UserError, kind_of
from rlzoo.policy.chat import Message, Options, messages
from rlzoo.policy.encoding import Completion, Prompt
from rlzoo.registry import Registry

Turns = Literal["found", "single"]
"""The turns of a prompt without special tokens: found by the chat template, or known to be one turn of the user."""
TurnsSaid = Literal["single", "several"]
"""The turns of a completion without special tokens: one, whatever it spells, or those of the headers in it."""


@dataclass(frozen=True)
class LoggedSample:
    """One completion of a log, before tokenisation. What the log does not say is left at its default."""

    prompt: Prompt | None = None
    """Text as the model saw it, or a conversation; None if only the tokens were logged."""
    completion: Completion | None = None
    """Text, the assistant's turn, or several turns from its first to its last; None if only the tokens were logged."""
    prompt_ids: Sequence[int] | None = None
    """The tokens of the prompt."""
    completion_ids: Sequence[int] | None = None
    """The tokens of the completion, from the first sampled one to the last."""
    mask: Sequence[bool] | None = None
    """Which of ``completion_ids`` were sampled, and not a tool's or the user's; None: all."""
    logp: Sequence[float | None] | None = None
    """One log-prob per token of the completion, in nats; at tokens that were not sampled it is ignored."""
    tokens: Sequence[str] | None = None
    """The text of each token that ``logp`` is of, where the log has no token ids."""
    reward: float | None = None
    components: Mapping[str, float | None] = field(default_factory=dict)
    """The components of the reward, by name."""
    version: int = 0
    """The version of the policy that sampled, or the step of its training."""
    truncated: bool | None = None
    """Whether the completion was cut at the length limit; None if the log does not say."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Everything else that is worth keeping, for rewards and inputs."""
    options: Options = field(default_factory=dict)
    """Arguments of the chat template besides messages, such as ``tools``."""
    temperature: float | None = None
    """The sampling temperature, where the log states it; 0: greedy."""
    top_p: float | None = None
    """The top-p of nucleus sampling, where the log states it."""
    stripped: Turns | None = None
    """How the turns of a prompt are found whose text has lost its special tokens; None if it has not."""
    turns_said: TurnsSaid | None = None
    """How the completion of a ``stripped`` sample is read if headers of turns are in it; None: that is an error."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What a user should know about the sample → an example."""


class Importer(Strict):
    """Reads the logs of another stack. Its fields are the options of ``rlzoo import``.

    A subclass has a name and a method `samples`. Its docstring says which version of the stack its fields were checked
    against, and when.
    """

    name: ClassVar[str]
    """The name in the registry: the FORMAT of ``rlzoo import``."""
    files: ClassVar[tuple[str, ...]] = ("**/*",)
    """Patterns of the log's files in a folder; the first that matches any file is used."""
    other_rows: ClassVar[str] = "rows left out"
    """A description of the rows that `rows` leaves out."""
    raw_logp: ClassVar[bool] = False
    """Whether log-probs are of the model's own distribution, whatever the temperature and top-p. Otherwise they are of
    the distribution that was sampled from."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """The sampling temperature, where the log does not state it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The top-p of nucleus sampling, where the log does not state it."""

    def rows(self, items: Iterator[Item]) -> Iterator[Item]:
        """The rows of a log to read, from all of its rows; by default all."""
        return items

    def samples(self, row: Row) -> Iterable[LoggedSample]:
        """The samples in a row of the log. Raises UserError for a row without a sample that can be used."""
        raise NotImplementedError(f"{type(self).__name__} must define samples(row)")


def _check_class(spec: str, found: Any) -> None:
    if not (isinstance(found, type) and issubclass(found, Importer)):
        raise UserError(f"log format {spec!r} is not an importer: give a subclass of rlzoo.Importer")


_importers: Registry[type[Importer]] = Registry(
    "log format", "rlzoo.buffers.importers", "rlzoo.importers", _check_class
)
_Importer = TypeVar("_Importer", bound=type[Importer])


def register_importer(importer: _Importer) -> _Importer:
    """Class decorator: register an `Importer` under its ``name``. Raises UserError if another class has that name."""
    _importers.add(importer.name, importer)
    return importer


def list_importers() -> list[str]:
    """The names of all registered log formats: built-ins and those of installed packages' entry points."""
    return _importers.names()


def get_importer(name: str, /, **options: Any) -> Importer:
    """The importer of a name, ``package.module:Name`` or ``path/to/file.py:Name``, with its options checked.

    Raises UserError for an unknown name, and for an option that is unknown or of the wrong type.
    """
    found = _importers.get(name)
    return validated(found, options, f"rlzoo import {found.name}")


# Reading values of a row


def text_of(row: Row, name: str) -> str:
    """A column of text. Raises UserError for anything else."""
    value = find(row, name)
    if not isinstance(value, str):
        raise UserError(f"column {name!r} holds {kind_of(value)}: give text")
    return value


def prompt_of(row: Row, name: str) -> Prompt:
    """A column with a prompt: text or messages. Raises UserError for anything else."""
    value = find(row, name)
    return value if isinstance(value, str) else conversation_of(value, f"column {name!r}")


def conversation_of(turns: Any, what: str) -> list[Message]:
    """The messages of an API, with the arguments of tool calls as objects, which servers give to chat templates.

    Raises UserError for anything else.
    """
    return [
        {**turn, "tool_calls": [_call(one, what) for one in turn["tool_calls"]]} if turn.get("tool_calls") else turn
        for turn in messages(turns, what)
    ]


def _call(call: Any, what: str) -> dict[str, Any]:
    """A tool call in OpenAI's form; verifiers has the name and the arguments beside the call's id, or all as text."""
    given = read_json(call) if isinstance(call, str) else call
    function = given.get("function", given) if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{what} has {kind_of(call)} for a tool call: give its function, {{name, arguments}}")
    named = {name: function[name] for name in ("name", "arguments") if name in function}
    if isinstance(named.get("arguments"), str) and (found := read_json(named["arguments"])) is not None:
        named["arguments"] = found
    if function is not given:
        return {**given, "function": named}
    return {**{name: given[name] for name in ("id",) if name in given}, "type": "function", "function": named}


def completion_of(turns: Any, what: str) -> Message | list[Message]:
    """A completion's turns: the assistant's, or several of which the first and the last are. Raises UserError else."""
    found = conversation_of(turns, what)
    if not found[0]["role"] == found[-1]["role"] == "assistant":
        roles = ", ".join(turn["role"] for turn in found)
        raise UserError(f"{what} has the turns {roles:.80}: the first and the last must be the assistant's, so drop it")
    return found[0] if len(found) == 1 else found


def ids_of(row: Row, name: str) -> list[int]:
    """A column of token ids. Raises UserError for anything else."""
    value = find(row, name)
    if not isinstance(value, list) or not all(type(one) is int for one in value):
        raise UserError(f"column {name!r} holds {kind_of(value)}: give a list of token ids")
    return value


def number_in(row: Row, name: str) -> float | None:
    """A column with a number; None for null, NaN, and a column that is missing. Raises UserError for anything else."""
    value = row.get(name) if "." not in name else find(row, name)
    if value is None or value != value:
        return None
    try:
        return number(value)
    except (TypeError, ValueError):
        raise UserError(f"column {name!r} holds {value!r:.60}: give a finite number, or null for none") from None


def version_in(row: Row, name: str) -> int:
    """A column with the step of training; 0 without one. Raises UserError for anything but a whole number."""
    value = row.get(name)
    if value is None:
        return 0
    if not isinstance(value, (int, float)) or value != int(value):
        raise UserError(f"column {name!r} holds {value!r:.60}: give the step as a whole number")
    return int(value)


def others(row: Row, *names: str) -> dict[str, Any]:
    """The columns of a row that are plain data, without those named."""
    return {name: value for name, value in usable(row).items() if name not in names}
