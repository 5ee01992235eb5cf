"""Text to tokens: the one place that decides about templates, special tokens, end of sequence and truncation.

Everything that is trained on or sampled from goes through here, so a prompt has the same tokens in a
demonstration, in a rollout and in an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from rlzoo.errors import UserError

Message = dict[str, str]
Prompt = str | list[Message]


@dataclass(frozen=True)
class Encoded:
    """A prompt and a completion as text and as tokens."""

    prompt: str
    completion: str
    prompt_ids: list[int]
    completion_ids: list[int]
    truncated: bool


def encode_prompt(tokenizer: Any, prompt: Prompt) -> tuple[str, list[int]]:
    """The text that the model sees, and its tokens.

    A conversation goes through the chat template, with the header of the assistant's turn and no further
    special tokens. Plain text gets the tokenizer's own special tokens, but never an end of sequence. Raises
    UserError for a conversation without a template and for a prompt of no tokens, after which no first token
    can be predicted.
    """
    if isinstance(prompt, str):
        text, ids = prompt, _tokens(tokenizer, prompt, special=True)
        eos = tokenizer.eos_token_id
        if ids[-1:] == [eos] and _tokens(tokenizer, prompt, special=False)[-1:] != [eos]:
            ids = ids[:-1]  # the tokenizer's doing: the model would learn to go on after the end
    else:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "the tokenizer has no chat template for a conversation: "
                "use a chat model's tokenizer, set tokenizer.chat_template, or give plain text"
            )
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = _tokens(tokenizer, text, special=False)
    if not ids:
        raise UserError("the prompt has no tokens: give it some text, or use a tokenizer that begins with a BOS")
    return text, ids


def encode_completion(tokenizer: Any, text: str) -> list[int]:
    """The completion's tokens and one end of sequence. Raises UserError if the tokenizer has none."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UserError("the tokenizer has no end of sequence: set tokenizer.eos_token")
    ids = _tokens(tokenizer, text, special=False)
    return ids if ids[-1:] == [eos] else [*ids, eos]


def encode(
    tokenizer: Any,
    prompt: Prompt,
    completion: str,
    max_length: int | None = None,
    max_completion_tokens: int | None = None,
) -> Encoded:
    """Both, cut on the right to ``max_length`` tokens of prompt + completion, ``max_completion_tokens`` of completion.

    A cut completion has lost its end of sequence and is marked truncated; its text is what its tokens say. A
    completion's text never holds the end of sequence, its tokens do. Raises UserError if the prompt leaves no
    room.
    """
    text, prompt_ids = encode_prompt(tokenizer, prompt)
    ids = encode_completion(tokenizer, completion)
    completion = completion.removesuffix(tokenizer.eos_token)
    rooms = [len(ids), max_completion_tokens, None if max_length is None else max_length - len(prompt_ids)]
    room = min(room for room in rooms if room is not None)
    if room == len(ids):
        return Encoded(text, completion, prompt_ids, ids, truncated=False)
    if room < 1:
        raise UserError(
            f"the prompt alone has {len(prompt_ids)} tokens of {max_length}: raise max_length or drop the row"
        )
    kept = ids[:room]
    return Encoded(text, tokenizer.decode(kept), prompt_ids, kept, truncated=True)


def prompt_key(prompt: str) -> str:
    """A prompt's identity where the data give none: 16 hexadecimal digits, the same in every process."""
    return blake2b(prompt.encode(), digest_size=8).hexdigest()


def _tokens(tokenizer: Any, text: str, special: bool) -> list[int]:
    ids: Sequence[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return list(ids)
