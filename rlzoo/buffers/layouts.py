"""Common layouts as rows of TRL's formats: ShareGPT, Alpaca, UltraFeedback.

A layout is recognised by its columns, as TRL's formats are; any other row is unchanged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rlzoo.buffers.values import Row, find, read_json
from rlzoo.errors import UserError, kind_of

_SPEAKERS = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model", "bot"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function", "tool_response", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    "system": "system",
}
"""ShareGPT's ``from`` → a message's role."""
_CALLS = ("function_call", "tool_call")
"""Speakers whose value is a tool call as JSON, as in LLaMA-Factory's data."""
_CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected")
_TURNS = ("messages", "conversations", "conversation")
"""Columns that are never plain text."""
_ALIASES = {"conversations": "messages", "conversation": "messages", "kto_tag": "label"}
"""A column of ShareGPT or LLaMA-Factory → TRL's, for rows that lack that."""
_PRINTED = re.compile(r"\s*\[\s*\{\s*'(role|from)':|\s*\[\s*\{\s*'(content|value)':.*'(role|from)':", re.DOTALL)
"""The beginning of a conversation that was written by Python's ``str`` instead of as JSON."""
_PAIR = ("chosen", "rejected")
_ALPACA = (
    "Below is an instruction that describes a task{extra}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
"""The prompt of Stanford Alpaca, for models without a chat template."""


def as_trl(row: Row, chat: bool, last: bool = True) -> dict[str, Any]:
    """The row in one of TRL's formats, if it has a known layout; else the row unchanged.

    An Alpaca row becomes a user turn if the model has a ``chat`` template, and Alpaca's own prompt otherwise. The
    completion of a rewarded conversation is its ``last`` turn, or else all from the assistant's first.
    Raises UserError for a conversation that cannot be read.
    """
    made = {name: _parsed(name, value) for name, value in row.items()}
    if any(name in row for name in _TURNS[1:]) or any(map(_is_sharegpt, made.values())):
        _tools(made)
    for alias, name in aliases(made).items():
        value = made.pop(alias)
        made[name] = _turns(value, alias) if isinstance(value, list) else value
    if made.get("messages") is not None and row.get("messages") is None:
        if all(made.get(side) is not None for side in _PAIR):
            made["prompt"] = made.pop("messages")
        _instruct(made, "prompt" if "messages" not in made else "messages")
    elif "instruction" in made and made.get("prompt") is None and made.get("messages") is None:
        if "output" in made and all(made.get(name) is None for name in ("completion", *_PAIR)):
            made["completion"] = _filled(made, "output")
        if any(made.get(name) is not None for name in ("completion", *_PAIR)):
            _alpaca(made, chat)
    for name in _CONVERSATIONS:
        value = made.get(name)
        if name in _PAIR and isinstance(value, Mapping):
            value = [value]  # a single message
        if isinstance(value, list):
            made[name] = _turns(value, name)
    if isinstance(made.get("messages"), list) and {"label", "reward"} & set(made) and made.get("prompt") is None:
        turns = made.pop("messages")
        own = [n for n, turn in enumerate(turns) if n and isinstance(turn, Mapping) and turn.get("role") == "assistant"]
        start = len(turns) - 1 if last or not own else own[0]
        made["prompt"], made["completion"] = turns[:start], turns[start:]
    _ask(made)
    return made


def aliases(row: Row) -> dict[str, str]:
    """The columns of this row that ShareGPT or LLaMA-Factory call otherwise → TRL's name."""
    found: dict[str, str] = {}
    for alias, name in _ALIASES.items():
        fits = name == "label" or row.get(alias) is None or isinstance(row[alias], list)
        if alias in row and row.get(name) is None and fits and (name not in found or row[alias] is not None):
            found[name] = alias
    return {alias: name for name, alias in found.items()}


def _parsed(name: str, value: Any) -> Any:
    """A conversation from JSON text, as in a CSV file; any other value unchanged."""
    return conversation_of(value, name) if name in (*_TURNS, *_CONVERSATIONS) else value


def conversation_of(value: Any, column: str) -> Any:
    """The value of a column, with a conversation in JSON text parsed. Raises UserError for one that Python printed."""
    if not isinstance(value, str):
        return value
    found = read_json(value)
    if isinstance(found, list) and found and (column in _TURNS or all(map(_is_message, found))):
        return found
    if _PRINTED.match(value):
        raise UserError(
            f"column {column!r} holds a conversation as printed by Python, {value[:24]!r}...: write it as JSON, "
            "or keep lists in a .jsonl or .parquet file"
        )
    return value


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and any(pair <= set(value) for pair in ({"role", "content"}, {"from", "value"}))


def _ask(row: dict[str, Any]) -> None:
    """Replace a plain prompt beside conversations by the beginning of these, as TRL reads UltraFeedback."""
    for names in (_PAIR, ("completion",)):
        turns = [list(row[name]) for name in names if _is_conversation(row.get(name))]
        if len(turns) < len(names):
            continue
        prompt = row.get("prompt")
        if isinstance(prompt, str) and all(
            len(value) > 1 for value in turns
        ):  # whole conversations: they share the prompt
            row["prompt"] = turns[0][:-1]
        elif isinstance(prompt, str) and prompt.strip():
            row["prompt"] = [{"role": "user", "content": prompt}]
        shared = row.get("prompt")
        if isinstance(shared, list) and all(value[: len(shared)] == shared and value[len(shared) :] for value in turns):
            row.update({name: value[len(shared) :] for name, value in zip(names, turns, strict=True)})


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _turns(messages: list[Any], column: str) -> list[Any]:
    """Messages with ``role`` and ``content``, from ShareGPT's ``from`` and ``value``."""
    return [
        _turn(message, number, column) if isinstance(message, Mapping) and {"from", "value"} & set(message) else message
        for number, message in enumerate(messages, 1)
    ]


def _turn(message: Mapping[str, Any], number: int, column: str) -> dict[str, Any]:
    speaker = message.get("role", message.get("from"))
    speaker = speaker.strip().lower().replace("-", "_") if isinstance(speaker, str) else speaker
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(
            f"column {column!r} has a turn from {speaker!r}, which has no role here: drop the row, "
            f"or write one of {', '.join(_SPEAKERS)}"
        )
    text = message.get("content", message.get("value"))
    if text is None:
        raise UserError(f"column {column!r} has no text in 'value' of turn {number}: fill it in, or drop the row")
    others = {key: value for key, value in message.items() if key not in ("from", "value")}  # such as a weight
    if speaker in _CALLS:
        return {**others, "role": role, **_called(text, number, column)}
    return {**others, "role": role, "content": text}


def _is_sharegpt(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and {"from", "value"} <= set(first)


def _tools(row: dict[str, Any]) -> None:
    """Tools as chat templates take them, of ShareGPT's bare functions in a list or in JSON; none of blank text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        if not tools.strip():
            del row["tools"]
        tools = read_json(tools)
    if isinstance(tools, list):
        known: list[Any] = [read_json(tool) if isinstance(tool, str) else tool for tool in tools]
        if not all(isinstance(tool, Mapping) and {"name", "function"} & set(tool) for tool in known):
            raise UserError("column 'tools' has an entry without a name: give a list of functions' schemas")
        row["tools"] = [tool if "function" in tool else {"type": "function", "function": tool} for tool in known]


def _called(text: Any, number: int, column: str) -> dict[str, Any]:
    """A tool call for chat templates, from ``{"name": ..., "arguments": {...}}`` or a list of these; reasoning before
    it stays text."""
    thought, closed, call = text.rpartition("</think>") if isinstance(text, str) else ("", "", text)
    try:
        calls = json.loads(call) if isinstance(call, str) else call
    except (ValueError, RecursionError):
        calls = None
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not calls or not all(isinstance(c, Mapping) and "name" in c for c in calls):
        raise UserError(
            f"column {column!r} has a tool call in turn {number} that is not JSON with a name and arguments: "
            'write {"name": ..., "arguments": {...}}, or drop the row'
        )
    made = [{"type": "function", "function": {"arguments": {}, **c}} for c in calls]
    return {"content": thought + closed, "tool_calls": made}


def _filled(row: dict[str, Any], column: str) -> Any:
    """Remove a column from the row. Raises UserError if it is null, blank or not text."""
    value = find(row, column)
    row.pop(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        told = "null" if value is None else "empty or blank"
        raise UserError(f"column {column!r} is {told}: fill it in, or drop the row")
    if not isinstance(value, str):
        raise UserError(f"column {column!r} is {kind_of(value)}: give text")
    return value


def _instruct(row: dict[str, Any], column: str) -> None:
    """Put the text of a column ``system`` before the conversation, unless that has a system turn."""
    system, turns = row.get("system"), row[column]
    if isinstance(system, str) and system.strip() and not (turns and turns[0].get("role") == "system"):
        row[column] = [{"role": "system", "content": system}, *turns]
    row.pop("system", None)


def _is_exchange(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _alpaca(row: dict[str, Any], chat: bool) -> None:
    given = find(row, "input") if "input" in row else None
    row.pop("input", None)
    if given is not None and not isinstance(given, str):
        raise UserError(f"column 'input' is {kind_of(given)}: give text")
    history, given = row.pop("history", None) or [], (given or "").strip()
    blank = isinstance(row["instruction"], str) and not row["instruction"].strip()
    instruction = row.pop("instruction").strip() if given and blank else _filled(row, "instruction")
    if not isinstance(history, list) or not all(_is_exchange(turn) for turn in history):
        raise UserError("column 'history' must hold pairs of texts, [question, answer]: write it so, or drop the row")
    if not chat:
        if history or row.get("system"):
            raise UserError("columns 'history' and 'system' need a chat template: train a model that has one")
        extra = ", paired with an input that provides further context" if given else ""
        text = f"### Input:\n{given}\n\n" if given else ""
        row["prompt"] = _ALPACA.format(extra=extra, instruction=instruction, input=text)
        return
    asked = "\n\n".join(part for part in (instruction, given) if part)
    past = [
        {"role": role, "content": text}
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    row["prompt"] = [*past, {"role": "user", "content": asked}]
    _instruct(row, "prompt")
    for name in ("completion", *_PAIR):
        if isinstance(row.get(name), str):
            row[name] = [{"role": "assistant", "content": row[name]}]
