"""Responses in the format of OpenAI's API, as vLLM, SGLang and others give them too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from rlzoo.buffers.files import Item
from rlzoo.buffers.importer import Importer, LoggedSample, conversation_of, number_in, others, register_importer
from rlzoo.buffers.tables import SourceTable
from rlzoo.buffers.values import Row, find
from rlzoo.errors import UserError, kind_of

_TOKEN = "token_id:"
"""The beginning of a token's text if vLLM was asked for ``return_tokens_as_token_ids``."""
_UNKNOWN = -9999.0
"""What vLLM writes for a log-prob that it does not have."""
_BODY = ("choices", "request", "response", "messages", "prompt")


@register_importer
class OpenAIResponses(Importer):
    """Responses of ``chat.completions`` and ``completions``, one per line, with their ``logprobs``.

    A line is a response with its ``messages`` or ``prompt`` beside its ``choices``; ``{"request": ..., "response":
    ...}``; a line of a batch's output, with the batch's input file as the option ``requests``; or ``messages``
    alone, which end with the response. Earlier turns of the assistant are part of the prompt, unless the option
    ``turns`` says that they were sampled too. Log-probs are the model's own, at temperature 1; those of an API that
    leaves out the end of the completion cannot be used. Checked
    against the types of openai 3.57.0 and vLLM at commit 006c49d on 28 November 2026.
    """

    name: ClassVar[str] = "openai"
    files: ClassVar[tuple[str, ...]] = ("**/*.jsonl",)
    raw_logp: ClassVar[bool] = True

    requests: str | None = None
    """The input file of a batch, whose ``custom_id`` identifies the request of each line of its output."""
    reward: str = "reward"
    """The column, or a field such as ``metadata.score``, with a reward of the line's completions."""
    turns: Literal["last", "all"] = "last"
    """Which turns of the assistant were sampled: the response, or ``all`` of its conversation."""

    def rows(self, items: Iterator[Item]) -> Iterator[Item]:
        if self.requests is None:
            yield from items
            return
        asked = dict(_requests(self.requests))
        for place, row in items:
            if isinstance(row, dict):
                known = row.get("custom_id")
                wrong = UserError(f"custom_id {known!r} is not among the requests in {self.requests}: give their file")
                row = {**row, "request": asked[known]} if isinstance(known, str) and known in asked else wrong
            yield place, row

    def samples(self, row: Row) -> Iterable[LoggedSample]:
        body, request = _body(row), _request(row)
        choices = body.get("choices")
        asked = request.get("messages")
        if choices is None and isinstance(asked, list) and asked and _is_assistants(asked[-1]):
            *asked, last = asked
            request, choices = {**request, "messages": asked}, [{"message": last}]
        if not isinstance(choices, list) or not choices:
            raise UserError("has no 'choices': every line must hold a response")
        if request.get("echo"):
            raise UserError("repeats its prompt (echo): sample without echo")
        reward = find(row, self.reward) if "." in self.reward else row.get(self.reward)
        columns = others(row, *_BODY, self.reward)
        for choice in choices:
            sample = _sample(choice, body, request, len(choices))
            sample = _from_first_turn(sample) if self.turns == "all" else sample
            yield replace(sample, reward=number_in({"reward": reward}, "reward"), columns=columns)


def _is_assistants(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "assistant"


def _requests(source: str) -> Iterator[tuple[str, Any]]:
    for place, row in SourceTable.find(source).rows():
        if isinstance(row, UserError):
            raise UserError(f"{place} {row}")
        body = row.get("body")
        if not isinstance(row.get("custom_id"), str) or not isinstance(body, Mapping):
            raise UserError(f"{place} has no 'custom_id' and 'body': requests must be the input file of a batch")
        yield row["custom_id"], body


def _body(row: Row) -> Row:
    """The response in a line."""
    response = row.get("response", row)
    if isinstance(response, Mapping) and "body" in response:  # a line of a batch's output
        response = response["body"]
    if not isinstance(response, Mapping):
        reason = row.get("error")
        told = f" ({reason!r:.80})" if reason else ""
        raise UserError(f"has no response{told}: drop it")
    if response.get("error"):
        raise UserError(f"has an error for a response ({response['error']!r:.80}): drop it")
    return response


def _request(row: Row) -> Row:
    """The request in a line: its own, or its columns ``messages`` and ``prompt``."""
    found = row.get("request")
    if found is None:
        return {name: row[name] for name in ("messages", "prompt", "tools") if row.get(name) is not None}
    if not isinstance(found, Mapping):
        raise UserError(f"column 'request' holds {kind_of(found)}: give the body of the request")
    body = found.get("body", found)
    return body if isinstance(body, Mapping) else found


def _sample(choice: Any, body: Row, request: Row, number: int) -> LoggedSample:
    if not isinstance(choice, Mapping):
        raise UserError(f"has {kind_of(choice)} among its 'choices': every choice must be an object")
    reason = choice.get("finish_reason")
    if reason == "content_filter":
        raise UserError("has a completion of which a content filter left out a part: drop it")
    sample = LoggedSample(
        completion_ids=choice.get("token_ids"),
        prompt_ids=choice.get("prompt_token_ids") or body.get("prompt_token_ids"),
        truncated=None if reason is None else reason == "length",
        temperature=number_in(request, "temperature"),
        top_p=number_in(request, "top_p"),
    )
    message, logprobs = choice.get("message"), choice.get("logprobs") or {}
    if message is None:
        text = choice.get("text")
        if not isinstance(text, str):
            raise UserError("has a choice with neither 'message' nor 'text': every choice must have one of them")
        sample = replace(sample, completion=text, **_plain_prompt(request, choice, number))
        return _with_logp(sample, logprobs.get("tokens"), logprobs.get("token_logprobs"))
    if "messages" not in request and sample.prompt_ids is None:
        raise UserError(_NO_PROMPT)
    (turn,) = conversation_of([{"role": "assistant", **message}], "the response")
    if not turn["content"] and not turn.get("tool_calls"):
        raise UserError("has an empty message for a response: drop it")
    asked = conversation_of(request["messages"], "the request") if "messages" in request else None
    tools = {"tools": request["tools"]} if request.get("tools") else {}
    sample = replace(sample, prompt=asked, completion=_plain(turn), options=tools)
    entries = logprobs.get("content") or []
    tokens = [entry.get("token") for entry in entries]
    return _with_logp(sample, tokens or None, [entry.get("logprob") for entry in entries])


def _from_first_turn(sample: LoggedSample) -> LoggedSample:
    """The sample with a completion from the first turn of the assistant on; the tokens logged are the response's."""
    asked, said = sample.prompt, sample.completion
    if isinstance(asked, str | None) or not isinstance(said, dict):
        return sample
    first = next((place for place, turn in enumerate(asked) if turn["role"] == "assistant"), None)
    if first is None:
        return sample
    turns = [*asked[first:], said]
    return replace(sample, prompt=asked[:first], completion=turns, prompt_ids=None, completion_ids=None)


_NO_PROMPT = (
    "has no prompt: keep the request beside the response ({request, response}, or a column 'messages'), or give a "
    "batch's input file (--option requests=FILE)"
)


def _plain(turn: dict[str, Any]) -> dict[str, Any]:
    """An answer without the fields of the API that no template knows."""
    known = ("role", "content", "tool_calls", "reasoning_content", "reasoning")
    return {name: turn[name] for name in known if turn.get(name) or name in ("role", "content")}


def _plain_prompt(request: Row, choice: Row, number: int) -> dict[str, Any]:
    """The prompt of a choice of ``completions``: one text, or one of several, or tokens."""
    prompt = request.get("prompt")
    if prompt is None:
        if choice.get("prompt_token_ids"):
            return {}
        raise UserError(_NO_PROMPT)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        place = choice.get("index")
        if type(place) is not int or number % len(prompt) or not 0 <= place < number:
            raise UserError(f"has {number} choices for {len(prompt)} prompts: give each prompt a line")
        prompt = prompt[place * len(prompt) // number]
    return {"prompt": prompt} if isinstance(prompt, str) else {"prompt_ids": prompt}


def _with_logp(sample: LoggedSample, tokens: Sequence[Any] | None, logp: Sequence[Any] | None) -> LoggedSample:
    """The sample with its log-probs, and with the token ids in the texts of its tokens, if those are there."""
    if not tokens or not logp:
        return sample
    logp = [None if value == _UNKNOWN else value for value in logp]
    texts = [str(token) for token in tokens]
    if sample.completion_ids is None and all(text.startswith(_TOKEN) for text in texts):
        ids = [int(text.removeprefix(_TOKEN)) for text in texts]
        return replace(sample, completion_ids=ids, logp=logp)
    return replace(sample, tokens=texts, logp=logp)
