"""open-instruct's saved rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from rlzoo.buffers.files import Item
from rlzoo.buffers.importer import (
    Importer,
    LoggedSample,
    ids_of,
    number_in,
    others,
    register_importer,
    version_in,
)
from rlzoo.buffers.values import Row
from rlzoo.errors import UserError

TOOLS = (
    "completions with the output of tools, the tokens with a log-prob of 0; sampled tokens of probability 1 have it "
    "too, and are not learned from either"
)
_READ = ("step", "prompt_tokens", "response_tokens", "reward", "advantage", "finish_reason", "logprobs", "request_info")


@register_importer
class OpenInstructRollouts(Importer):
    """``--save_traces``: ``RUN_rollouts_000000.jsonl`` in ``--rollouts_save_path``, with tokens and log-probs.

    The output of tools, which is not learned from, is what has a log-prob of 0. The log does not say in which messages
    it was. The traces of versions before 2026, one line per step with lists of ``queries``, ``responses`` and
    ``scores``, are read too. Checked against open-instruct's main branch at commit e6c3044 of 20 August 2026.
    """

    name: ClassVar[str] = "open-instruct"
    files: ClassVar[tuple[str, ...]] = ("**/*rollouts_*.jsonl",)
    other_rows: ClassVar[str] = "rows of metadata"

    def rows(self, items: Iterator[Item]) -> Iterator[Item]:
        for place, row in items:
            if not (isinstance(row, dict) and "git_commit" in row and "response_tokens" not in row):
                yield place, row

    def samples(self, row: Row) -> Iterable[LoggedSample]:
        if "responses" in row and "queries" in row:
            yield from _traces(row)
            return
        used, logp = row.get("request_info"), row.get("logprobs")
        called = isinstance(used, Mapping) and (used.get("num_calls") or used.get("tool_calleds"))
        mask = [value != 0 for value in logp] if called and isinstance(logp, list) else None
        if called and (mask is None or all(mask)):
            raise UserError(
                "has the output of tools among its tokens, and no log-probs of 0, which say which they are: drop it"
            )
        yield LoggedSample(
            prompt_ids=ids_of(row, "prompt_tokens"),
            completion_ids=ids_of(row, "response_tokens"),
            mask=mask,
            logp=logp if isinstance(logp, list) else None,
            reward=number_in(row, "reward"),
            version=version_in(row, "step"),
            truncated=_truncated(row.get("finish_reason")),
            columns=others(row, *_READ),
            notes={TOOLS: f"{mask.count(False)} of {len(mask)} tokens"} if mask else {},
        )


def _traces(row: Row) -> Iterator[LoggedSample]:
    """The samples of a step, of which lists have one entry each."""
    queries, responses, scores = (row.get(name) for name in ("queries", "responses", "scores"))
    lists: list[Any] = [queries, responses, scores]
    if not all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
        raise UserError("columns 'queries', 'responses' and 'scores' must be lists of the same length")
    reasons = row.get("finish_reasons") or [None] * len(lists[0])
    truths, names = (row.get(name) or [None] * len(lists[0]) for name in ("ground_truths", "datasets"))
    for query, response, score, reason, truth, name in zip(*lists, reasons, truths, names, strict=True):
        yield LoggedSample(
            prompt_ids=ids_of({"queries": query}, "queries"),
            completion_ids=ids_of({"responses": response}, "responses"),
            reward=number_in({"scores": score}, "scores"),
            version=version_in(row, "training_step"),
            truncated=_truncated(reason),
            columns={"ground_truth": truth, "dataset": name},
        )


def _truncated(reason: Any) -> bool | None:
    return None if reason is None else reason == "length"
