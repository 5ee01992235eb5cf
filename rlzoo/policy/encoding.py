"""Text to tokens: the one place that handles special tokens, end of sequence and truncation.

All text is encoded here, so a prompt has the same tokens in a demonstration, in a rollout and in an evaluation. Chat
templates are handled in `rlzoo.policy.chat`.

Encoding is written as generators that yield a text and receive its tokens, so that many rows are encoded concurrently
and fast tokenizers are called on batches (`encode_batch`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Literal, TypeVar

from rlzoo.errors import UserError
from rlzoo.policy.chat import Message, Options, messages, opened, turn_of
from rlzoo.policy.turns import Asked, Steps, one_turn, several_turns, up_to_stop

T = TypeVar("T")
Prompt = str | list[Message]
Completion = str | Message | list[Message]
"""Text, a turn of the assistant, or several turns of which the first and the last are the assistant's."""
Special = Literal["reject", "allow"]
"""Text that spells a special token is an error, or is read as that token."""
SPELLED = "text that spells a special token is read as that token"
CUT = "completions cut at the length limit, without an end of sequence"
LEFT_OUT = "the chat template drops the end of the prompt, from which samples continue, once there is an answer"


@dataclass(frozen=True)
class Encoded:
    """A prompt and a completion as text and as tokens."""

    prompt: str
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]
    truncated: bool
    key: str = ""
    """The identity of the prompt, for data without prompt ids; independent of its completion."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What was changed in encoding → an example."""
    mask: list[bool] | None = None
    """Which tokens of the completion are learned from; None: all."""
    messages: list[Message] | None = None
    """The messages of the completion, as in `Trajectory.completion_messages`."""


@dataclass(frozen=True)
class RowCheck:
    """Checks that a row fits a model's positions and vocabulary."""

    positions: int | None
    vocabulary: int
    check_range: Callable[..., None] = field(repr=False, compare=False)

    def __call__(self, prompt: Sequence[int], completion: Sequence[int]) -> None:
        """Raise UserError if the prompt or completion is empty, or has too many tokens or ids without an embedding."""
        ids = (*prompt, *completion)
        if not prompt or not completion:
            raise UserError(f"has no tokens in its {'completion' if prompt else 'prompt'}: drop the row")
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            self.check_range(max(ids), min(ids))
        if self.positions is not None and len(ids) > self.positions:
            raise UserError(
                f"has {len(ids)} tokens, and the model has {self.positions} positions: "
                "drop the row, or cut it (max_completion_tokens, from_trl's max_length)"
            )


def encode_prompt(
    tokenizer: Any, prompt: Prompt, special: Special = "reject", options: Options | None = None
) -> tuple[str, list[int]]:
    """The text that the model sees, and its tokens.

    A conversation is rendered by the chat template with its ``options`` (``tools``, ``enable_thinking``) and the header
    of the assistant's turn, without further special tokens. Plain text gets the tokenizer's own special tokens, but no
    end of sequence. Raises UserError if a conversation has no template or is rejected by it, if a message spells a
    special token (with ``special="reject"``), and if the prompt has no tokens to predict the first token from.
    """
    return _alone(tokenizer, prompt_steps(tokenizer, prompt, special, options))


def prompt_steps(
    tokenizer: Any, prompt: Prompt, special: Special = "reject", options: Options | None = None
) -> Steps[tuple[str, list[int]]]:
    """`encode_prompt` as a generator for `encode_batch`."""
    if isinstance(prompt, str):
        text, ids = prompt, (yield prompt, True)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos] and (yield prompt, False)[:2] != [bos, bos]:
            ids = ids[1:]  # the text already contains it, as rendered text does
        if ids[-1:] == [eos]:
            own = yield prompt, False
            if own[-1:] != [eos] or ids[-len(own) - 1 : -1] == own:
                ids = ids[:-1]  # added by the tokenizer: the model would learn to continue after the end
    else:
        conversation = messages(prompt)
        if special == "reject":
            _reject(spelled(tokenizer, conversation))
        text = opened(tokenizer, conversation, options or {})
        ids = yield text, False
    if not ids:
        raise UserError("the prompt has no tokens: give it some text, or use a tokenizer that adds a BOS")
    return text, ids


def encode_completion(tokenizer: Any, text: str) -> list[int]:
    """The tokens of plain text, followed by an end of sequence. Raises UserError if the tokenizer has none."""
    return _alone(tokenizer, _completion_steps(tokenizer, text))


def _completion_steps(tokenizer: Any, text: str) -> Steps[list[int]]:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no end of sequence: set tokenizer.eos_token")
    ids = yield text, False
    return ids if ids[-1:] == [eos] else [*ids, eos]


def encode(
    tokenizer: Any,
    prompt: Prompt,
    completion: Completion,
    max_length: int | None = None,
    max_completion_tokens: int | None = None,
    special: Special = "reject",
    options: Options | None = None,
    learned: Sequence[int] | None = None,
) -> Encoded:
    """Encode both, cut on the right to ``max_length`` tokens in total and ``max_completion_tokens`` of completion.

    The completion of a conversation is an assistant's turn, as text or as a message. Its tokens are those of the
    rendered conversation from where it differs from the rendered prompt to the end of the turn (as in TRL), plus an end
    of sequence if the template ends turns without a token at which sampling stops. It may also be a list of turns, of
    which the assistant's, or those with the indices ``learned``, are learned from (`rlzoo.policy.turns`).

    A completion that is cut is marked as truncated, and its text is decoded from the remaining tokens, as is that of
    several turns; it has no messages, as those of the remaining tokens are not known. The end of sequence is among the
    tokens but not in the text. Raises UserError as `encode_prompt` and `several_turns` do, if the prompt leaves no room
    for a completion, if nothing to learn from is left of it, and with ``special="reject"`` for text that spells a
    special token (see `spelled`).
    """
    steps = encode_steps(tokenizer, prompt, completion, max_length, max_completion_tokens, special, options, learned)
    return _alone(tokenizer, steps)


def encode_steps(
    tokenizer: Any,
    prompt: Prompt,
    completion: Completion,
    max_length: int | None = None,
    max_completion_tokens: int | None = None,
    special: Special = "reject",
    options: Options | None = None,
    learned: Sequence[int] | None = None,
) -> Steps[Encoded]:
    """`encode` as a generator for `encode_batch`."""
    mask: list[bool] | None = None
    more: list[Message] | None = None
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise UserError("the prompt is plain text and the completion a conversation: use the same form for both")
        found, left_out = spelled(tokenizer, prompt, completion), ""
        ids, said = (yield from _completion_steps(tokenizer, completion)), completion
        if prompt or (yield prompt, True):
            text, prompt_ids = yield from prompt_steps(tokenizer, prompt)
            if not prompt and ids[: len(prompt_ids)] == prompt_ids:  # the text has its own BOS
                ids, said = ids[len(prompt_ids) :], said.removeprefix(tokenizer.decode(prompt_ids))
        else:  # a text without prompt or BOS: its first token becomes the prompt
            text, prompt_ids, ids = tokenizer.decode(ids[:1]), ids[:1], ids[1:]
            said = said.removeprefix(text)
        if not ids:
            raise UserError("the text is a single token, with no prompt to predict it from: drop the row")
        key = prompt_key(text)
        said, end = said.removesuffix(tokenizer.eos_token), len(ids)
    else:
        turn = {"role": "assistant", "content": completion} if isinstance(completion, str) else completion
        turns = messages(turn if isinstance(turn, list) else [turn], "the completion")
        conversation, answer = messages(prompt), turns[-1]
        found = spelled(tokenizer, [*conversation, *turns[:-1]], answer)
        if isinstance(turn, list):
            own = [place for place, one in enumerate(turns) if one["role"] == "assistant"]
            made = yield from several_turns(tokenizer, conversation, turns, learned or own, options or {})
            said = answer["content"] if len(turns) == 1 else _said(tokenizer, made.ids[: made.end])
            turns = turns[: (learned or own)[-1] + 1]
        else:
            made = yield from one_turn(tokenizer, conversation, answer, options or {})
            said = answer["content"]
        text, key, left_out, mask = made.prompt, prompt_key(made.prompt), made.left_out, made.mask
        prompt_ids, ids, end = made.prompt_ids, made.ids, made.end
        text = tokenizer.decode(prompt_ids) if left_out else text
        more = more_than_text(turns)
    if special == "reject":
        _reject(found)
    notes = {kind: told for kind, told in ((SPELLED, found), (LEFT_OUT, left_out and repr(left_out))) if told}
    whole = Encoded(text, said, prompt_ids, ids, False, key, notes, mask, more)
    return _fitted(tokenizer, whole, end, max_length, max_completion_tokens)


def encode_tokens(
    tokenizer: Any,
    prompt_ids: list[int],
    completion_ids: list[int],
    mask: list[bool],
    max_length: int | None = None,
    max_completion_tokens: int | None = None,
) -> Encoded:
    """A row that is tokenised already, with its tokens as text, cut as `encode` does it. Raises UserError likewise."""
    prompt, end = tokenizer.decode(prompt_ids), up_to_stop(tokenizer, completion_ids)
    completion = _said(tokenizer, completion_ids[:end])
    whole = Encoded(prompt, completion, prompt_ids, completion_ids, False, prompt_key(prompt), {}, mask)
    return _fitted(tokenizer, whole, end, max_length, max_completion_tokens)


def _fitted(
    tokenizer: Any, whole: Encoded, end: int, max_length: int | None, max_completion_tokens: int | None
) -> Encoded:
    """A row whose completion is cut to the limits; ``end`` is the number of its tokens up to the stop token."""
    prompt_ids, ids, mask, said = whole.prompt_ids, whole.completion_ids, whole.mask, whole.completion
    rooms = [len(ids), max_completion_tokens, None if max_length is None else max_length - len(prompt_ids)]
    room = min(room for room in rooms if room is not None)
    if room < 1:
        raise UserError(
            f"the prompt alone takes {len(prompt_ids)} of {max_length} tokens: raise max_length or drop the row"
        )
    if mask is not None and not any(mask[:room]):
        raise UserError(
            f"the turns learned from begin after the first {room} tokens of the completion, which are kept: raise "
            "max_completion_tokens or max_length, or drop the row"
        )
    if truncated := room < end:
        said = tokenizer.decode(ids[:room])
    cut = {CUT: f"{room} of {end} tokens are kept"} if truncated else {}
    kept = None if mask is None or all(mask[:room]) else mask[:room]
    notes = {**whole.notes, **cut}
    messages = None if truncated else whole.messages
    return replace(
        whole, completion=said, completion_ids=ids[:room], truncated=truncated, notes=notes, mask=kept,
        messages=messages,
    )  # fmt: skip


def more_than_text(turns: list[Message]) -> list[Message] | None:
    """The messages of a completion; None for a single turn of the assistant with its text alone."""
    return None if len(turns) == 1 and turns[0].keys() == {"role", "content"} else turns


def _said(tokenizer: Any, ids: list[int]) -> str:
    """The text of several turns, without the token at which sampling stops."""
    stops = {turn_of(tokenizer).stop, tokenizer.eos_token_id}
    text: str = tokenizer.decode(ids[:-1] if ids[-1] in stops else ids)
    return text


def spelled(tokenizer: Any, prompt: Prompt, completion: str | Message = "") -> str | None:
    """A description of the special token that a row's text must not spell but does, or None.

    In a conversation, no message may spell a token that structures it (turn markers, BOS, EOS, padding; not ``<think>``
    and the like). A plain prompt may spell any, because it may be rendered text. A plain completion may not continue
    after an end of sequence or turn, unless there is no prompt and it is a whole text.
    """
    turn = turn_of(tokenizer)
    if not isinstance(prompt, str):
        answer = completion if isinstance(completion, Mapping) else {"role": "assistant", "content": completion}
        for message in (*prompt, answer):
            if found := sorted(token for token in turn.controls if token in message["content"]):
                return f"the {message['role']}'s text spells {found[0]!r}, which structures conversations"
        return None
    stops = {tokenizer.eos_token, None if turn.stop is None else tokenizer.convert_ids_to_tokens(turn.stop)} - {None}
    if not prompt or not isinstance(completion, str) or not stops:
        return None
    said, *more = re.split("|".join(map(re.escape, sorted(stops))), completion)
    if any(part.strip() for part in more):
        return f"the completion continues after {' or '.join(sorted(map(repr, stops)))}, where sampling stops"
    found = sorted(token for token in turn.controls if token in said)
    return f"the completion's text spells {found[0]!r}" if found else None


def _reject(problem: str | None) -> None:
    if problem is not None:
        raise UserError(f"{problem}: remove it, drop the row, or read it as that token with special_tokens: allow")


def prompt_key(prompt: str) -> str:
    """The identity of a prompt, for data without prompt ids: 16 hexadecimal digits, the same in every process."""
    return blake2b(prompt.encode(), digest_size=8).hexdigest()


def encode_batch(tokenizer: Any, rows: Iterable[Steps[T]]) -> list[T | UserError]:
    """What each row's generator returns, or the UserError that it raises; the texts of all rows are tokenised together.

    The tokens are the same as for each row alone. A text that several rows yield at the same time is tokenised once.
    """
    steps = list(rows)
    found: dict[int, T | UserError] = {}
    asked: dict[int, Asked] = {}

    def advance(row: int, ids: list[int] | None) -> None:
        try:
            asked[row] = next(steps[row]) if ids is None else steps[row].send(ids)
        except StopIteration as over:
            found[row] = over.value
        except UserError as error:
            found[row] = error

    for row in range(len(steps)):
        advance(row, None)
    while asked:
        texts, waiting = list(dict.fromkeys(asked.values())), list(asked)
        tokens = dict(zip(texts, _tokens(tokenizer, texts), strict=True))
        answers = [tokens[asked.pop(row)] for row in waiting]
        for row, ids in zip(waiting, answers, strict=True):
            advance(row, list(ids))
    return [found[row] for row in range(len(steps))]


def got(found: T | UserError) -> T:
    """The result of a row in `encode_batch`. Raises its UserError if it is one."""
    if isinstance(found, UserError):
        raise found
    return found


def _alone(tokenizer: Any, steps: Steps[T]) -> T:
    """The result of a single row."""
    return got(encode_batch(tokenizer, [steps])[0])


def _tokens(tokenizer: Any, texts: Sequence[Asked]) -> list[Sequence[int]]:
    """The tokens of each text. A fast tokenizer is called once per kind of text, and uses threads of its own."""
    if len(texts) == 1 or not getattr(tokenizer, "is_fast", False):
        return [tokenizer(text, add_special_tokens=special)["input_ids"] for text, special in texts]
    found: dict[Asked, Sequence[int]] = {}
    for kind in (False, True):
        if some := [text for text, special in texts if special is kind]:
            made = tokenizer(some, add_special_tokens=kind, return_attention_mask=False)["input_ids"]
            found |= zip(((text, kind) for text in some), made, strict=True)
    return [found[asked] for asked in texts]
