"""Completions of conversations: the tokens of one or several turns, and which of them are learned from.

In a completion of several turns, each turn that is learned from has exactly the tokens and the context that it has in a
row of its own, where it is the last turn. A chat template that renders a turn otherwise once others follow, as Qwen3's
drops the reasoning of earlier answers, cannot have both in one sequence and is refused, unless it marks what the
assistant generates with ``{% generation %}``.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rlzoo.errors import UserError
from rlzoo.policy.chat import Message, Options, answered, common_prefix, marked, opened, turn_of

T = TypeVar("T")
Asked = tuple[str, bool]
"""A text to be tokenised, and whether the tokenizer adds its own special tokens."""
Steps = Generator[Asked, list[int], T]
"""A generator that yields texts, is sent the tokens of each, and returns what was encoded."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The statement with which a template marks what the assistant generates."""


@dataclass(frozen=True)
class Turns:
    """The tokens of a prompt and a completion."""

    prompt: str
    """The prompt as text, as sampling would continue it."""
    prompt_ids: list[int]
    """The tokens before the point where the rendered conversation differs from its prompt."""
    ids: list[int]
    """The tokens of the completion."""
    end: int
    """The number of these up to the token at which sampling stops."""
    left_out: str = ""
    """The end of the prompt that the template drops once there is an answer."""
    mask: list[bool] | None = None
    """Which tokens of the completion are learned from; None: all."""


def one_turn(tokenizer: Any, prompt: Sequence[Message], answer: Message, options: Options) -> Steps[Turns]:
    """A completion of one turn. Raises UserError as `answered` does, and for a prompt without tokens of its own."""
    text, whole = answered(tokenizer, prompt, answer, options)
    first = yield text, False
    both = yield whole, False
    start = common_prefix(first, both)
    if not start:
        raise UserError(
            "the rendered prompt has no tokens of its own: give plain text, or change tokenizer.chat_template"
        )
    ids = both[start:]
    if not {turn_of(tokenizer).stop, tokenizer.eos_token_id} & set(ids):
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end of sequence: set tokenizer.eos_token")
        ids = [*ids, tokenizer.eos_token_id]
    return Turns(text, both[:start], ids, up_to_stop(tokenizer, ids), tokenizer.decode(first[start:]))


def up_to_stop(tokenizer: Any, ids: Sequence[int]) -> int:
    """The number of tokens up to the one at which sampling stops, if they end with the ending of a turn; else all."""
    turn = turn_of(tokenizer)
    return len(ids) - (turn.after_stop if tuple(ids[-len(turn.ending) :]) == turn.ending else 0)


def several_turns(
    tokenizer: Any, prompt: Sequence[Message], turns: Sequence[Message], learned: Sequence[int], options: Options
) -> Steps[Turns]:
    """A completion of ``turns``, the first of them the assistant's; ``learned`` are the indices of those learned from.

    It ends with the last of these. Raises UserError as `one_turn` does, for turns of other roles, and for a template
    that renders a turn otherwise once others follow.
    """
    if not learned or any(turns[place]["role"] != "assistant" for place in (0, *learned)):
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(
            f"a completion must begin with the assistant's turn and only such turns are learned from, and its roles "
            f"are {roles:.80}: move what is before to the prompt"
        )
    last = learned[-1]
    if _MARKS.search(str(tokenizer.chat_template)) and getattr(tokenizer, "is_fast", False):
        return (yield from _by_marks(tokenizer, prompt, turns[: last + 1], learned, options))
    whole = yield from one_turn(tokenizer, [*prompt, *turns[:last]], turns[last], options)
    ids = whole.prompt_ids + whole.ids
    spans = {last: (len(whole.prompt_ids), len(ids))}
    first = whole
    for place in sorted({0, *learned} - {last}, reverse=True):
        first = yield from one_turn(tokenizer, [*prompt, *turns[:place]], turns[place], options)
        start, same = len(first.prompt_ids), common_prefix(first.prompt_ids + first.ids, ids)
        if same < start + first.end:
            raise UserError(
                f"the chat template renders turn {place + 1} of the completion otherwise once turns follow it: learn "
                "from the last turn (turns: last), give each turn a row, or mark what the assistant generates with "
                "{% generation %} in the template"
            )
        spans[place] = start, same
    return _cut(tokenizer, first, ids, spans[0][0], [spans[place] for place in learned])


def _by_marks(
    tokenizer: Any, prompt: Sequence[Message], turns: Sequence[Message], learned: Sequence[int], options: Options
) -> Steps[Turns]:
    """`several_turns` by the spans that the template marks, of which every turn of the assistant has one.

    What the generation prompt already says, as ``<think>``, is not learned from, although it may be marked.
    """
    ids, marks = marked(tokenizer, [*prompt, *turns], options)
    edges = [at for at, (a, b) in enumerate(zip([0, *marks], [*marks, 0], strict=True)) if a != b]
    found = list(zip(edges[::2], edges[1::2], strict=True))
    own = [number for number, turn in enumerate([*prompt, *turns]) if turn["role"] == "assistant"]
    if len(found) != len(own):
        raise UserError(
            f"the chat template's {{% generation %}} marks {len(found)} parts of a conversation with {len(own)} turns "
            "of the assistant: mark each of these once"
        )
    spans = {number - len(prompt): span for number, span in zip(own, found, strict=True)}
    texts = {}
    for place in sorted({0, *learned}):
        texts[place] = opened(tokenizer, [*prompt, *turns[:place]], options)
        before = yield texts[place], False
        same, (start, end) = common_prefix(before, ids), spans[place]
        spans[place] = start if same >= end else max(start, same), end
        if not place:
            left_out = tokenizer.decode(before[same:])
    first = Turns(texts[0], [], [], 0, left_out)
    return _cut(tokenizer, first, ids[: spans[learned[-1]][1]], spans[0][0], [spans[place] for place in learned])


def _cut(tokenizer: Any, first: Turns, ids: list[int], start: int, learned: Sequence[tuple[int, int]]) -> Turns:
    """The tokens of a whole conversation cut into prompt and completion, with the mask of the spans learned from.

    The prompt's text is that of the ``first`` turn.
    """
    mask = [False] * len(ids)
    for begin, after in learned:
        mask[begin:after] = [True] * (after - begin)
    own, rest = mask[start:], ids[start:]
    kept = None if all(own) else own
    return Turns(first.prompt, ids[:start], rest, up_to_stop(tokenizer, rest), first.left_out, kept)
