"""Chat templates: rendering conversations, and the text with which a template opens and ends an assistant's turn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

from rlzoo.errors import UserError, kind_of

Message = dict[str, Any]
"""``role`` and ``content``, both text, and further keys that templates read (``tool_calls``, ``reasoning_content``)."""

Options = Mapping[str, Any]
"""Arguments of a template besides messages: ``tools``, ``enable_thinking``."""

ROLES = ("system", "user", "assistant", "tool")
"""Roles accepted for any template; others are accepted if the template names them."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold the reasoning before its content."""
_NONE: Options = {}
_PROBE = "PROBE"
"""An answer that no template changes, to find the text around it."""


@dataclass(frozen=True)
class Turn:
    """How a chat template renders an assistant's turn."""

    opening: str = ""
    """The text before the answer in a template without a generation prompt; else empty."""
    ending: tuple[int, ...] = ()
    """The tokens after the answer."""
    stop: int | None = None
    """The special token among them at which sampling stops."""
    controls: frozenset[str] = frozenset()
    """Special tokens that structure a conversation; a message whose text spells one would break it."""
    parts: bool = False
    """Whether the template accepts only contents that are lists of parts, as those of some vision models do."""

    @property
    def after_stop(self) -> int:
        """Tokens of the ending that sampling never reaches: Qwen's newline after ``<|im_end|>``."""
        return 0 if self.stop is None else len(self.ending) - 1 - self.ending.index(self.stop)


def messages(value: Any, what: str = "the prompt") -> list[Message]:
    """A conversation with text in every message. Lists of text parts are joined; keys without a value are dropped.

    Raises UserError naming the message (from 1) that has no role or no text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise UserError(f"{what} holds {kind_of(value)}: give text or a list of messages")
    if not value:
        raise UserError(f"{what} is a conversation without messages: give it at least one turn")
    return [_message(message, number, what) for number, message in enumerate(value, 1)]


def _message(message: Any, number: int, what: str) -> Message:
    if not isinstance(message, Mapping):
        raise UserError(
            f"{what} is not a conversation (its entry {number} is {kind_of(message)}): give {{role, content}}"
        )
    role, content = message.get("role"), message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""  # a tool call needs no text
    if isinstance(content, list) and content:
        content = "".join(_part(part, number, what) for part in content)
    for name, text in (("role", role), ("content", content)):
        if not isinstance(text, str):
            raise UserError(
                f"{what} has a message without text in 'role' and 'content' "
                f"({name} of message {number} is {kind_of(text)}): give both as text"
            )
    known = {key: value for key, value in message.items() if value is not None}
    return {**known, "content": content}


def _part(part: Any, number: int, what: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise UserError(
            f"{what} has a part of type {kind!r} in message {number}: rlzoo trains on text alone, so drop the row"
        )
    return text


def options_of(row: Mapping[str, Any]) -> Options:
    """A row's arguments for the chat template besides messages, as in TRL: ``tools``, ``chat_template_kwargs``.

    Raises UserError for a column of another type.
    """
    tools, options = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise UserError("column 'tools' is text that is not JSON: give a list of function schemas") from None
    if not isinstance(tools, list | None) or not isinstance(options, Mapping | None):
        name, kind = ("chat_template_kwargs", "a mapping") if isinstance(tools, list | None) else ("tools", "a list")
        raise UserError(f"column {name!r} holds {kind_of(row[name])}: give {kind}, or rename the column")
    known = {key: value for key, value in (options or {}).items() if value is not None}
    return {"tools": tools, **known} if tools else known


def render(
    tokenizer: Any, conversation: Sequence[Message], generation_prompt: bool = False, options: Options = _NONE
) -> str:
    """The conversation rendered by the chat template. Raises UserError if there is no template or it fails."""
    return _render(tokenizer, conversation, generation_prompt, options, turn_of(tokenizer).parts)


def _render(
    tokenizer: Any, conversation: Sequence[Message], generation_prompt: bool, options: Options, parts: bool
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the tokenizer has no chat template for a conversation: "
            "use a chat model, give a template (training.chat_template; in Python, the tokenizer's), or plain text"
        )
    how = {**options, "add_generation_prompt": generation_prompt, "tokenize": False}
    text: str = _applied(tokenizer, conversation, parts, how)
    return text


def marked(tokenizer: Any, conversation: Sequence[Message], options: Options = _NONE) -> tuple[list[int], list[int]]:
    """The tokens of a rendered conversation, and 1 for those in ``{% generation %}`` blocks of the template, else 0.

    Raises UserError as `render` does.
    """
    how = {**options, "tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = _applied(tokenizer, conversation, turn_of(tokenizer).parts, how)
    return list(found["input_ids"]), list(found["assistant_masks"])


def _applied(tokenizer: Any, conversation: Sequence[Message], parts: bool, how: Options) -> Any:
    given = [{**m, "content": [{"type": "text", "text": m["content"]}]} if parts else m for m in conversation]
    try:
        return tokenizer.apply_chat_template(given, **how)
    except Exception as error:  # a template is a program, and can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        roles = ", ".join(message["role"] for message in conversation)
        raise UserError(
            f"the chat template refuses a conversation of the roles {roles:.80} ({reason:.160}): "
            "change its turns, or tokenizer.chat_template"
        ) from None


def opened(tokenizer: Any, conversation: Sequence[Message], options: Options = _NONE) -> str:
    """A prompt as the model sees it before its answer: the conversation and the opening of the assistant's turn.

    If the template has no generation prompt, the turn is opened as it is within a conversation. Raises UserError if the
    template rejects the conversation, does not know a role, or omits a turn.
    """
    turns = [message for message in conversation if message["role"] != "system"] or conversation
    if not any(message["content"].strip() or message.get("tool_calls") for message in turns):
        raise UserError("the prompt's turns are empty or blank: give the user's turn some text, or drop the row")
    text = render(tokenizer, conversation, True, options)
    for number, message in enumerate(conversation, 1):
        role = message["role"]
        if role not in ROLES and role not in str(tokenizer.chat_template):
            raise UserError(
                f"message {number} has the role {role!r}, which the chat template does not name: "
                f"use one of {', '.join(ROLES)}"
            )
        _require_calls(tokenizer, message)
        said = message["content"].strip() and not message.get("tool_calls")
        if not _holds(text, message) or (said and number in _unwritten(tokenizer, conversation)):
            raise UserError(
                f"the chat template leaves out message {number} (role {role}): "
                "move its text to another turn, or change tokenizer.chat_template"
            )
    return text + turn_of(tokenizer).opening


def _require_calls(tokenizer: Any, message: Message) -> None:
    """Raise UserError for tool calls that the chat template would omit."""
    if message.get("tool_calls") and "tool_calls" not in str(tokenizer.chat_template):
        raise UserError(
            "the chat template does not render 'tool_calls': write the call in the turn's content, "
            "or use a chat template with tools"
        )


def _require_thoughts(tokenizer: Any, answer: Message) -> None:
    """Raise UserError for an answer's separate reasoning that the chat template would omit."""
    for key in _THOUGHTS:
        if answer.get(key) and key not in str(tokenizer.chat_template):
            raise UserError(
                f"the chat template does not render {key!r} of the assistant's turn: write it in the content, as "
                "<think>...</think>, or remove it"
            )


def _unwritten(tokenizer: Any, conversation: Sequence[Message]) -> frozenset[int]:
    """The numbers (from 1) of messages that the template omits, found by rendering markers in their place.

    Markers are needed because a short text such as "5" may appear in the rendered conversation by chance.
    """
    known = _UNWRITTEN.setdefault(tokenizer, {})
    key = tokenizer.chat_template, *((message["role"], bool(message.get("tool_calls"))) for message in conversation)
    if key not in known:
        marks = [f"{_PROBE}-{number}-" for number in range(len(conversation))]
        marked = [{**message, "content": mark} for message, mark in zip(conversation, marks, strict=True)]
        try:
            text = render(tokenizer, marked, True)
        except UserError:  # it inspects contents, or needs options
            text = "".join(marks)
        known[key] = frozenset(number for number, mark in enumerate(marks, 1) if mark not in text)
    return known[key]


def _holds(text: str, message: Message) -> bool:
    """Whether a rendered conversation contains the text of a message, up to spaces: verbatim, as JSON, or, for an
    earlier answer, without its reasoning."""
    content = message["content"].rpartition("</think>")[2] if message["role"] == "assistant" else message["content"]
    if content.strip() in text or message.get("tool_calls"):
        return True
    said = (content, json.dumps(content, ensure_ascii=False))
    return any(_squeezed(form) in _squeezed(text) for form in said)


def answered(
    tokenizer: Any, conversation: Sequence[Message], answer: Message, options: Options = _NONE
) -> tuple[str, str]:
    """The opened prompt, and the rendered conversation with the answer. Raises UserError as `opened` does.

    The conversation is the template's own rendering if that preserves the prompt and the answer. If not (R1's template
    drops the reasoning of every answer, some of Mistral's drop the system turn once there is an answer), it is the
    prompt as the model sees it, the answer verbatim, and the template's ending. If both the generation prompt and the
    answer open ``<think>``, it is opened once.
    """
    _require_calls(tokenizer, answer)
    _require_thoughts(tokenizer, answer)
    prompt, content = opened(tokenizer, conversation, options), answer["content"]
    whole = render(tokenizer, [*conversation, answer], options=options)
    if whole.startswith(prompt) and content.strip() in whole[len(prompt) :]:
        return prompt, prompt + _opened_once(prompt, whole[len(prompt) :])
    boundary = common_prefix(prompt, render(tokenizer, conversation, options=options))
    if common_prefix(prompt, whole) >= boundary and _squeezed(content) in _squeezed(whole[boundary:]):
        return prompt, whole
    probed = [*conversation, {**answer, "content": _PROBE}]
    before, after = _around(tokenizer, probed, options, turn_of(tokenizer).parts)
    space = before[len(before.rstrip()) :] if prompt == prompt.rstrip() else ""
    return prompt, prompt + _opened_once(prompt, space + content + after)


def turn_of(tokenizer: Any) -> Turn:
    """How the tokenizer's chat template renders an assistant's turn, found by rendering a conversation."""
    names = ("chat_template", "bos_token", "eos_token", "pad_token")
    template, *own = key = tuple(getattr(tokenizer, name, None) for name in names)
    if not template:
        return Turn(controls=_long(own))
    known = _TURNS.get(tokenizer)
    if known is None or known[0] != key:
        known = _TURNS[tokenizer] = (key, _turn(tokenizer, _long(own)))
    return known[1]


_TURNS: WeakKeyDictionary[Any, tuple[Any, Turn]] = WeakKeyDictionary()
_UNWRITTEN: WeakKeyDictionary[Any, dict[Any, frozenset[int]]] = WeakKeyDictionary()


def _long(tokens: Iterable[str | None]) -> frozenset[str]:
    """The tokens of more than one character: single characters, which some tokenizers use as padding, are text."""
    return frozenset(token for token in tokens if token and len(token.strip()) > 1)


def _turn(tokenizer: Any, own: frozenset[str]) -> Turn:
    question, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": _PROBE}
    for parts, start in product((False, True), ([], [{"role": "system", "content": "S"}])):
        try:
            closed, prompt = (_render(tokenizer, [*start, question], opens, _NONE, parts) for opens in (False, True))
            before, after = _around(tokenizer, [*start, question, answer], _NONE, parts)
        except UserError:
            continue
        header = before[len(closed) :] if prompt == closed and before.startswith(closed) else ""
        ending = tuple(tokenizer(after, add_special_tokens=False)["input_ids"])
        single = {*tokenizer.all_special_ids, *(n for token, n in tokenizer.get_added_vocab().items() if token.strip())}
        stop = next((token for token in ending if token in single), None)
        controls = own | _marks(tokenizer, [*start, question, answer], question, parts)
        return Turn(header.rstrip(" ") if header.strip() else "", ending, stop, controls, parts)
    return Turn(controls=own)


def _around(tokenizer: Any, conversation: Sequence[Message], options: Options, parts: bool) -> tuple[str, str]:
    """The rendered text before and after the last message's, which is the probe."""
    before, probe, after = _render(tokenizer, conversation, False, options, parts).rpartition(_PROBE)
    if not probe:
        raise UserError("the chat template leaves out the assistant's turn: change tokenizer.chat_template")
    return before, after


def _marks(tokenizer: Any, conversation: list[Message], further: Message, parts: bool) -> frozenset[str]:
    """The special tokens that mark turns, from a conversation whose answer is no longer the last message."""
    try:
        text = _render(tokenizer, [*conversation, further], False, _NONE, parts)
    except UserError:  # it accepts a single question only
        text = _render(tokenizer, conversation, False, _NONE, parts)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    # a tag with a closing one marks a part of a text, as <think> does
    tags = {tag for token in special if f"</{token[1:]}" in special for tag in (token, f"</{token[1:]}")}
    return _long(token for token in special - tags if token in text)


def _opened_once(prompt: str, rest: str) -> str:
    """The text after the prompt, without a tag such as ``<think>`` that the prompt already opens."""
    found = re.search(r"(<[^<>\s]+>)(\s*)$", prompt)
    if found is None or not rest.lstrip().startswith(found[1]):
        return rest
    return rest.lstrip().removeprefix(found[1]).removeprefix(found[2])


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the common prefix of two sequences."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _squeezed(text: str) -> str:
    return "".join(text.split())
