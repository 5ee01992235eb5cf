"""Samples of EleutherAI's evaluation harness."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from rlzoo.buffers.files import Item
from rlzoo.buffers.importer import Importer, LoggedSample, register_importer, reward_in
from rlzoo.buffers.values import Row, find, read_json
from rlzoo.errors import UserError, kind_of, unknown
from rlzoo.policy.chat import messages
from rlzoo.policy.encoding import Prompt

KEYS = (
    "doc_id",
    "doc",
    "target",
    "arguments",
    "resps",
    "filtered_resps",
    "filter",
    "metrics",
    "doc_hash",
    "prompt_hash",
    "target_hash",
)
"""The keys of a line besides its metrics."""
_RESPONSES = ("doc_id", "doc_hash", "arguments", "resps")
"""The keys that lines of several filters share."""
UNSCORED = "responses without a reward of their own, because a metric is of all responses to a problem (repeats)"


@register_importer
class LMEvalSamples(Importer):
    """``samples_TASK_DATE.jsonl``, which lm-eval writes with ``--log_samples``; tasks that generate text only.

    The reward is a metric of the line, and the columns are those of its ``doc``. A problem that was sampled several
    times (``repeats``) has one metric for all of its responses, so they have no rewards, unless the metric is a list
    with one number per response, as in rlzoo's own export (``rewards``, and ``truncated`` beside it). Checked
    against lm-eval 0.4.13 and its main branch at commit 4e7e0d4 of 21 August 2026.
    """

    name: ClassVar[str] = "lm-eval"
    files: ClassVar[tuple[str, ...]] = ("**/samples_*.jsonl",)
    other_rows: ClassVar[str] = "rows that are of other filters of the same responses"

    metric: str | None = None
    """The metric that is the reward; None: the list ``rewards``, else the first of the line's metrics."""
    filter: str | None = None
    """The filter whose lines are read; None: the first that the log has of the same responses."""

    def rows(self, items: Iterator[Item]) -> Iterator[Item]:
        seen = set[int]()
        for place, row in items:
            if isinstance(row, dict):
                own = hash(json.dumps([row.get(name) for name in _RESPONSES], default=str))
                if (own in seen) if self.filter is None else (row.get("filter") != self.filter):
                    continue
                seen.add(own)
            yield place, row

    def samples(self, row: Row) -> Iterable[LoggedSample]:
        prompt, how = _request(row)
        responses = find(row, "resps")
        texts = responses[0] if isinstance(responses, list) and len(responses) == 1 else None
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError("column 'resps' holds no generated text: only tasks that generate text can be imported")
        rewards, cut = self._rewards(row, len(texts)), row.get("truncated")
        if not isinstance(cut, list) or len(cut) != len(texts):
            cut = [None] * len(texts)
        doc = row.get("doc")
        columns = {**(doc if isinstance(doc, Mapping) else {"doc": doc}), "target": row.get("target")}
        known = {name: row[name] for name in _metrics(row) if isinstance(row.get(name), (int, float, bool))}
        heat = how.get("temperature") if how.get("do_sample", True) else None
        for text, reward, truncated in zip(texts, rewards or [None] * len(texts), cut, strict=True):
            yield LoggedSample(
                prompt=prompt,
                completion=text if isinstance(prompt, str) else {"role": "assistant", "content": text},
                reward=reward,
                components={name: float(value) for name, value in known.items()} if len(texts) == 1 else {},
                truncated=None if truncated is None else bool(truncated),
                temperature=float(heat) if isinstance(heat, (int, float)) and heat > 0 else None,
                columns={"doc_id": row.get("doc_id"), **columns},
                notes={} if rewards else {UNSCORED: f"{len(texts)} responses"},
            )

    def _rewards(self, row: Row, number: int) -> Sequence[float | None] | None:
        """The reward of each response; None if they have none of their own."""
        names = _metrics(row)
        name = self.metric or ("rewards" if isinstance(row.get("rewards"), list) else next(iter(names), None))
        if name is None:
            return [None] * number
        if name not in row:
            raise unknown("metric", name, names)
        value = row[name]
        if isinstance(value, list) and len(value) == number:
            return [reward_in({name: one}, name) for one in value]
        return [reward_in(row, name)] if number == 1 else None


def _metrics(row: Row) -> list[str]:
    """The names of a line's metrics; older versions do not list them."""
    listed = row.get("metrics")
    return [str(name) for name in listed] if isinstance(listed, list) else [name for name in row if name not in KEYS]


def _request(row: Row) -> tuple[Prompt, Mapping[str, Any]]:
    """The prompt of a line, and how its responses were generated."""
    arguments = find(row, "arguments")
    if isinstance(arguments, Mapping):
        first = arguments.get("gen_args_0")
        parts = [first.get("arg_0"), first.get("arg_1")] if isinstance(first, Mapping) else []
    else:
        parts = list(arguments[0]) if isinstance(arguments, list) and arguments else []
    if len(parts) != 2 or not isinstance(parts[1], Mapping):
        raise UserError("has no arguments of a generation: only tasks that generate text can be imported")
    prompt: Any = parts[0]
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]  # a conversation as JSON, for models behind an API
    turns = read_json(prompt) if isinstance(prompt, str) else prompt
    if isinstance(turns, list) and turns and all(isinstance(turn, Mapping) and "role" in turn for turn in turns):
        return messages(turns, "column 'arguments'"), parts[1]
    if not isinstance(prompt, str):
        raise UserError(f"column 'arguments' holds {kind_of(prompt)} for a prompt: give text or a list of messages")
    return prompt, parts[1]
