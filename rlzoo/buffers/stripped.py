"""Conversations from rendered text without its special tokens, as some logs keep it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from rlzoo.buffers.importer import Turns, TurnsSaid
from rlzoo.errors import UserError
from rlzoo.policy.chat import Message, opened

Frame = tuple[Sequence[str], re.Pattern[str]]
"""The roles of a prompt's turns, and a pattern whose groups are their texts."""
_SINGLE = ("user",)
_TURNS = (
    ("system", "user", "assistant", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user"),
    ("system", "user"),
    _SINGLE,
)
"""The prompts that are recognised, by their roles. The first that fits is taken: a text with the headers of several
turns has these turns, and is not one message that spells headers."""
_MARK = "PROBE{}"
_FIX = "give the model that sampled (--model), or say what prompts are: --option turns=single, or turns=none"
_FIX_SAID = "give the model that sampled (--model), or say --option completions=single"


def _squeezed(text: str | None) -> str:
    return "".join((text or "").split())


class Restorer:
    """Finds the conversation that a chat template renders to a text, once special tokens are removed from it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._last: tuple[str, list[Message]] | None = None

    def conversation(self, text: str, turns: Turns = "found") -> list[Message]:
        """The conversation. Raises UserError if there is none, or if a template does not tell turns apart."""
        if self._last is None or self._last[0] != text:  # the samples of a prompt follow each other
            self._last = text, self._read(text, self._single if turns == "single" else self._several)
        return self._last[1]

    def completion(self, prompt: list[Message], given: str, said: str, turns: TurnsSaid | None) -> str | list[Message]:
        """The completion ``said`` of a prompt that was found in the text ``given``: its text, or several messages.

        Raises UserError for headers of other turns if it is not known whether they are such, and for turns of which the
        template makes another text.
        """
        if turns == "single":
            return said
        if turns == "several" and self._others is None:
            raise UserError(f"the completion's turns cannot be told apart without their special tokens: {_FIX_SAID}")
        found = list(self._others.finditer(said)) if self._others is not None else []
        if not found:
            return said
        if turns is None:
            raise UserError(
                f"its completion has the header of another turn ({found[0].group()!r:.40}...), and the log does not "
                "say whether the policy wrote what follows: say --option completions=several if a tool or the user "
                "did, or completions=single if the policy did"
            )
        made, begins = list[Message](), 0
        for match in found:
            role = str(match.lastgroup)
            made.append({"role": "assistant", "content": said[begins : match.start()]})
            made.append({"role": role, "content": match[role]})
            begins = match.end()
        if _squeezed(self._stripped([*prompt, *made])) != _squeezed(given + said[:begins]):
            raise UserError(
                "the completion was logged without its special tokens, and the chat template makes no such text of "
                f"turns of the assistant and of tools: {_FIX_SAID}"
            )
        if not said[begins:].strip():  # sampling ended before the policy could answer
            return made[:-1]
        return [*made, {"role": "assistant", "content": said[begins:]}]

    @cached_property
    def _others(self) -> re.Pattern[str] | None:
        """The text from the end of a turn of the assistant to its next: another turn, in a group of its role.

        The space before its header may be missing: it is where sampling stops before it. None if the template marks
        turns by special tokens alone.
        """
        kinds = []
        for role in ("tool", "user"):
            for _, _, before, after in self._parts(("user", "assistant", role)):
                header = before.lstrip()
                if header.strip() and after.strip():
                    space = re.escape(before[: len(before) - len(header)])
                    kinds.append(f"(?:{space})?{re.escape(header)}(?P<{role}>.*?){re.escape(after)}")
        return re.compile("|".join(kinds), re.DOTALL) if kinds else None

    def _read(self, text: str, frames: Sequence[Frame]) -> list[Message]:
        if not frames:
            raise UserError(f"the prompt's turns cannot be told apart without their special tokens: {_FIX}")
        for roles, frame in frames:
            found = frame.fullmatch(text)
            if found is not None:
                turns = [{"role": role, "content": part} for role, part in zip(roles, found.groups(), strict=True)]
                if self._stripped(turns) == text:
                    return turns
        raise UserError(
            "the prompt was logged without its special tokens, and the chat template makes no such text of turns of "
            f"system, user and assistant: {_FIX}"
        )

    @cached_property
    def _single(self) -> list[Frame]:
        return [(_SINGLE, re.compile("(.*)".join(map(re.escape, parts)), re.DOTALL)) for parts in self._parts(_SINGLE)]

    @cached_property
    def _several(self) -> list[Frame]:
        """The frames in which every turn has a header of text."""
        return [
            (roles, re.compile("(.*?)".join(map(re.escape, parts)), re.DOTALL))
            for roles in _TURNS
            for parts in self._parts(roles)
            if all(header.strip() for header in parts[:-1])
        ]

    def _parts(self, roles: Sequence[str]) -> list[list[str]]:
        """The text around the turns of these roles, if the template takes them."""
        marks = [_MARK.format(number) for number in range(len(roles))]
        text = self._stripped([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)])
        whole = text is not None and all(text.count(mark) == 1 for mark in marks)
        return [re.split("|".join(marks), text)] if text is not None and whole else []

    def _stripped(self, turns: list[Message]) -> str | None:
        """The text that a log has of a prompt; None if the template refuses the conversation."""
        try:
            text = opened(self._tokenizer, turns)
        except UserError:
            return None
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        stripped: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return stripped
