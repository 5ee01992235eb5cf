"""From the samples of a log to the rows of a buffer: tokens, log-probs that fit them, and groups by prompt."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rlzoo.buffers import cache
from rlzoo.buffers.bad_rows import BadRows, collecting
from rlzoo.buffers.buffer import OfflineBuffer
from rlzoo.buffers.files import BATCH, Item, file_rows
from rlzoo.buffers.importer import Importer, LoggedSample, Turns
from rlzoo.buffers.schema import to_row
from rlzoo.buffers.stripped import Restorer
from rlzoo.buffers.tables import SourceTable, chunks
from rlzoo.errors import UserError, kind_of
from rlzoo.jobs.sources import data_files, path_of
from rlzoo.policy.chat import Message, turn_of
from rlzoo.policy.encoding import (
    Completion,
    encode_batch,
    encode_steps,
    got,
    more_than_text,
    prompt_key,
    prompt_steps,
)
from rlzoo.policy.turns import Steps
from rlzoo.registry import one_line
from rlzoo.types import Trajectory

OTHER_TOKENS = "log-probs left out, because they are of other tokens than the tokenizer makes of the text"
MISSING = "log-probs left out, because tokens of the completion have none"
TEMPERED = "log-probs left out, because the log has them at temperature 1"
NUCLEUS = "log-probs left out, because they are relative to the nucleus of top_p"
_LARGEST = 2**31 - 1
OTHER_MODEL = "its tokens are not those of its text under this tokenizer: give the model that sampled (--model)"


def import_log(
    importer: Importer,
    source: str | Path,
    tokenizer: Any,
    max_completion_tokens: int | None = None,
    bad: BadRows | None = None,
) -> OfflineBuffer:
    """A buffer of the samples in a log: a file, a folder that contains the log's files, or a pattern.

    Tokens are those of the log, or else of the tokenizer. Log-probs are left out where they are not those of the
    tokens, and ``bad`` counts these samples. If the log does not say which completions were cut, those of at least
    ``max_completion_tokens`` tokens were. Samples of one prompt and one policy version are a group. Raises UserError
    naming the file and row, unless ``bad`` drops such rows.
    """
    with collecting(bad) as bad:
        items = _kept(importer, _items(importer, str(source)), bad)
        reader = _Reader(importer, tokenizer, max_completion_tokens)
        return OfflineBuffer.of_checked(cache.spooled(_rows(items, reader, bad)))


def _items(importer: Importer, source: str) -> Iterator[Item]:
    """The rows of the log's files."""
    if not path_of(source).is_dir():
        return SourceTable.find(source).rows()
    found = (data_files(path_of(source) / pattern) for pattern in importer.files)
    files = next(filter(None, found), None)
    if files is None:
        names = " or ".join(importer.files)
        raise UserError(f"{source} has no file {names} of {importer.name}: give the log's folder or file")
    return itertools.chain.from_iterable(map(file_rows, files))


def _kept(importer: Importer, items: Iterator[Item], bad: BadRows) -> Iterator[Item]:
    """The rows that the importer keeps; ``bad`` counts the others."""
    waiting = deque[str]()

    def watched() -> Iterator[Item]:
        for item in items:
            waiting.append(item[0])
            yield item

    def skip_to(place: str | None) -> None:
        while waiting and (before := waiting.popleft()) != place:
            bad.note(before, {importer.other_rows: "left out"})

    for place, row in importer.rows(watched()):
        skip_to(place)
        yield place, row
    skip_to(None)


def _rows(items: Iterator[Item], reader: _Reader, bad: BadRows) -> Iterator[dict[str, Any]]:
    made = 0
    for chunk in chunks(items, lambda: BATCH):
        read = encode_batch(reader.tokenizer, (reader.row_steps(row) for _, row in chunk))
        for (place, _), found in zip(chunk, read, strict=True):
            bad.rows += 1
            rows: list[dict[str, Any]] = []
            with bad.at(place):
                samples = got(found)
                rows = [to_row(sample.row) for sample in samples]
                for number, sample in enumerate(samples, 1):
                    bad.note(place if len(samples) == 1 else f"{place}, sample {number}", sample.notes)
            made += len(rows)
            yield from rows
    bad.require_some(made)
    if not made:
        raise UserError("the log has no samples: it is empty")


class _Read(NamedTuple):
    """The row of a sample, and what happened to it → an example."""

    row: Trajectory
    notes: dict[str, str]


class _Completion(NamedTuple):
    """A completion as tokens, and its text without its end."""

    ids: list[int]
    text: str
    truncated: bool
    mask: list[bool] | None
    messages: list[Message] | None


class _Reader:
    """How samples become rows."""

    def __init__(self, importer: Importer, tokenizer: Any, max_completion_tokens: int | None) -> None:
        self.importer, self.tokenizer, self._limit = importer, tokenizer, max_completion_tokens
        self._restorer = Restorer(tokenizer)
        self._turn_stop = turn_of(tokenizer).stop
        self._stops = {tokenizer.eos_token_id, self._turn_stop} - {None}

    def row_steps(self, row: dict[str, Any] | UserError) -> Steps[list[_Read]]:
        """The samples of a row of the log."""
        if isinstance(row, UserError):
            raise row
        try:
            samples = list(self.importer.samples(row))
        except UserError:
            raise
        except Exception as error:  # whatever values of other types lead to
            raise UserError(
                f"is not as {self.importer.name} writes it ({one_line(error):.120}): give another format, or drop it"
            ) from None
        made: list[_Read] = []
        for sample in samples:
            made.append((yield from self._sample_steps(sample)))
        return made

    def _sample_steps(self, sample: LoggedSample) -> Steps[_Read]:
        if sample.stripped is not None and getattr(self.tokenizer, "chat_template", None):
            sample = self._restored(sample, sample.stripped)
        elif sample.turns_said == "several":
            raise UserError(
                "the turns of a completion are found by the chat template, but the tokenizer has none, or prompts are "
                "plain text: give the model that sampled (--model), and leave out turns=none"
            )
        prompt, prompt_ids, key, completion, notes = yield from self._tokens(sample)
        heat = self.importer.temperature if sample.temperature is None else sample.temperature
        top_p = self.importer.top_p if sample.top_p is None else sample.top_p
        if not (heat >= 0 and 0 < top_p <= 1):
            raise UserError(f"was drawn at temperature {heat:g} with top_p {top_p:g}, which cannot be: drop it")
        if not 0 <= sample.version <= _LARGEST:
            raise UserError(f"has the step {sample.version}: it must be from 0 to {_LARGEST}")
        logp, why = self._logp(sample, completion, heat, top_p)
        trajectory = Trajectory(
            prompt=prompt,
            completion=completion.text,
            prompt_ids=prompt_ids,
            completion_ids=completion.ids,
            completion_mask=completion.mask,
            completion_messages=completion.messages,
            prompt_id=key,
            source="policy",
            reward=sample.reward,
            reward_components=dict(sample.components),
            behaviour_logp=logp,
            policy_version=sample.version,
            truncated=completion.truncated,
            temperature=heat or 1.0,
            top_p=top_p,
            messages=sample.prompt if isinstance(sample.prompt, list) else None,
            columns=dict(sample.columns),
        )
        return _Read(trajectory, {**sample.notes, **notes, **why})

    def _restored(self, sample: LoggedSample, how: Turns) -> LoggedSample:
        """The sample with the turns of a prompt and a completion that are text without special tokens."""
        if not isinstance(sample.prompt, str):
            return sample
        prompt, said = self._restorer.conversation(sample.prompt, how), sample.completion
        if isinstance(said, str):
            said = self._restorer.completion(prompt, sample.prompt, said, sample.turns_said)
        return replace(sample, prompt=prompt, completion=said)

    def _tokens(self, sample: LoggedSample) -> Steps[tuple[str, list[int], str, _Completion, dict[str, str]]]:
        """The prompt as text and as tokens, its identity, the completion, and notes."""
        if sample.completion_ids is None:
            return (yield from self._of_text(sample))
        if sample.prompt_ids is not None:
            prompt_ids = self._known(sample.prompt_ids)
            prompt = self.tokenizer.decode(prompt_ids)
        elif sample.prompt is not None:
            prompt, prompt_ids = yield from prompt_steps(self.tokenizer, sample.prompt, "allow", sample.options)
        else:
            raise UserError("has neither the text nor the tokens of a prompt: log them too")
        ids = self._known(sample.completion_ids)
        if not ids or not prompt_ids:
            raise UserError(f"has no tokens in its {'completion' if prompt_ids else 'prompt'}: drop it")
        mask = None if sample.mask is None or all(sample.mask) else list(sample.mask)
        if mask is not None and (len(mask) != len(ids) or not any(mask)):
            raise UserError(
                f"has a mask of {len(mask)} values for {len(ids)} tokens, {sum(mask)} of them true: drop it"
            )
        ended = ids[-1] in self._stops
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=mask is None)
        turns = _turns(sample.completion)
        said = turns[-1].get("content") if turns else sample.completion
        if isinstance(said, str) and "".join(said.split()) not in "".join(self.tokenizer.decode(ids).split()):
            raise UserError(OTHER_MODEL)
        truncated = not ended if sample.truncated is None else sample.truncated
        more = more_than_text(turns) if turns else None
        return prompt, prompt_ids, prompt_key(prompt), _Completion(ids, text, truncated, mask, more), {}

    def _known(self, ids: Any) -> list[int]:
        """Token ids that the tokenizer has."""
        if not isinstance(ids, list) or not all(type(one) is int for one in ids):
            raise UserError(f"has {kind_of(ids)} for its tokens, which is no list of token ids: drop it")
        if not all(0 <= one < len(self.tokenizer) for one in ids):
            raise UserError(OTHER_MODEL)
        return ids

    def _of_text(self, sample: LoggedSample) -> Steps[tuple[str, list[int], str, _Completion, dict[str, str]]]:
        if sample.prompt is None or sample.completion is None:
            raise UserError(f"has no {'prompt' if sample.prompt is None else 'completion'}: log it too")
        made = yield from encode_steps(
            self.tokenizer, sample.prompt, sample.completion, special="allow", options=sample.options
        )
        ids = made.completion_ids
        end = max(place for place, token in enumerate(ids) if token in self._stops)
        truncated = sample.truncated
        if truncated is None:
            truncated = self._limit is not None and end >= self._limit
        if truncated and not end:
            raise UserError("has no text in its completion, which is cut: drop it")
        stop = self._stop_of_turns(sample.prompt)
        ids = ids[:end] if truncated else [*ids[:end], ids[end] if stop is None else stop]
        mask = None if made.mask is None or all(made.mask[: len(ids)]) else made.mask[: len(ids)]
        completion = _Completion(ids, made.completion, truncated, mask, made.messages)
        return made.prompt, made.prompt_ids, made.key, completion, dict(made.notes)

    def _stop_of_turns(self, prompt: Any) -> int | None:
        """The token that ends a turn, if a plain prompt is a rendered conversation, which its answer continues."""
        if self._turn_stop is None or not isinstance(prompt, str):
            return None
        return self._turn_stop if self.tokenizer.convert_ids_to_tokens(self._turn_stop) in prompt else None

    def _logp(
        self, sample: LoggedSample, completion: _Completion, temperature: float, top_p: float
    ) -> tuple[list[float] | None, dict[str, str]]:
        """The log-probs of the tokens, or why there are none."""
        ids, mask = completion.ids, completion.mask
        if sample.logp is None:
            return None, {}
        if self.importer.raw_logp and temperature != 1.0:
            return None, {TEMPERED: f"the sample was drawn at {temperature:g}"}
        if not self.importer.raw_logp and top_p != 1.0:
            return None, {NUCLEUS: f"top_p is {top_p:g}"}
        values = sample.logp
        if mask is not None and len(values) == len(ids):
            values = [value if sampled else 0.0 for value, sampled in zip(values, mask, strict=True)]
        logp = [value for value in values if isinstance(value, (int, float)) and value < math.inf]
        if len(logp) < len(values) or len(logp) == len(ids) - 1:
            return None, {MISSING: f"{len(logp)} log-probs for {len(ids)} tokens"}
        if len(logp) != len(ids) or not self._same(sample, ids):
            return None, {OTHER_TOKENS: f"{len(logp)} log-probs for {len(ids)} tokens"}
        return logp, {}

    def _same(self, sample: LoggedSample, ids: list[int]) -> bool:
        """Whether the tokens that log-probs are of, where they have no ids, are these."""
        if sample.completion_ids is not None:
            return True
        if sample.tokens is None or len(sample.tokens) != len(ids):
            return False
        own = [self.tokenizer.decode([one]) for one in ids]
        return all(map(_alike, own[:-1], sample.tokens)) and (
            _alike(own[-1], sample.tokens[-1]) or (ids[-1] in self._stops and not sample.tokens[-1])
        )


def _turns(completion: Completion | None) -> list[Message]:
    """The messages of a completion; none of a text."""
    if isinstance(completion, str | None):
        return []
    return completion if isinstance(completion, list) else [completion]


_SPACES = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})
"""How vocabularies write spaces and line breaks → the text."""


def _alike(one: str, other: str) -> bool:
    """Whether two texts of a token agree. Parts of a character, which no text can show, agree with anything."""
    if "\ufffd" in one or "\ufffd" in other or other.startswith("bytes:"):
        return True
    return one.translate(_SPACES).strip() == other.translate(_SPACES).strip()
