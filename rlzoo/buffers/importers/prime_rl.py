"""prime-rl's rollouts, and the results of the verifiers library that it samples with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

from rlzoo.buffers.importer import (
    Importer,
    LoggedSample,
    completion_of,
    conversation_of,
    number_in,
    others,
    prompt_of,
    register_importer,
)
from rlzoo.buffers.values import Row, find
from rlzoo.errors import UserError

_CUT = ("max_turns", "max_input_tokens", "max_output_tokens", "max_total_tokens", "compaction_failed")
"""Stop conditions of a trace that was cut."""
_ROLLOUT = ("prompt", "completion", "reward", "trajectory", "timing", "tool_defs", "oai_tools", "token_usage", "error")


@register_importer
class PrimeRLRollouts(Importer):
    """Rollouts with their tokens and log-probs: ``rollouts/step_N/train/effective/traces.jsonl``.

    Each line is an episode, whose traces of agents that are not trained are left out. Records of earlier versions are
    read too: ``train_rollouts.jsonl`` with a trace per line, and the results of verifiers' first API (``prompt``,
    ``completion``, ``reward``), with the tokens of one turn if the ``trajectory`` was saved. Checked
    against prime-rl at commit 559b447 and verifiers at a60a606, both of 21 August 2026.
    """

    name: ClassVar[str] = "prime-rl"
    files: ClassVar[tuple[str, ...]] = (
        "**/train/effective/traces.jsonl*",
        "**/train_rollouts.jsonl",
        "**/traces.jsonl*",
        "**/results.jsonl",
    )

    def samples(self, row: Row) -> Iterable[LoggedSample]:
        if "traces" in row:
            traces = row["traces"] if isinstance(row["traces"], list) else []
            trained = [trace for trace in traces if (trace.get("agent") or {}).get("trainable", True)]
            if not trained:
                raise UserError("has no trace of an agent that is trained: drop it")
            for trace in trained:
                yield from _trace(trace, row)
        elif "nodes" in row:
            yield from _trace(row, row)
        else:
            yield _rollout(row)


def _trace(trace: Row, record: Row) -> Iterator[LoggedSample]:
    if trace.get("errors") and not trace.get("ok"):
        error = trace["errors"][-1]
        raise UserError(f"ended in an error ({error.get('type', 'unknown')!s:.60}): drop it")
    path = _branch(trace)
    sampled = [place for place, node in enumerate(path) if node.get("sampled")]
    if not sampled:
        raise UserError("has no turn that was sampled: drop it")
    first, last = sampled[0], sampled[-1]
    told = path[last].get("finish_reason") or next((call.get("finish_reason") for call in _calls(trace)), None)
    cut = trace.get("stop_condition") in _CUT or told == "length"
    rewards = _rewards(trace)
    yield LoggedSample(
        prompt=conversation_of([_message(node["message"]) for node in path[:first]], "the trace") if first else None,
        completion=completion_of([_message(node["message"]) for node in path[first : last + 1]], "the trace"),
        reward=sum(value for _, value in rewards.values()) if rewards else number_in(trace, "reward"),
        components={name: score for name, (score, _) in rewards.items()},
        version=_version(trace, record),
        truncated=cut if told or "stop_condition" in trace else None,
        columns={**_task(trace), **{f"metric_{k}": v for k, v in (trace.get("metrics") or {}).items()}},
        **_tokens(path),
    )


def _tokens(path: list[Row]) -> dict[str, Any]:
    """The tokens of a branch, which of its completion's were sampled, and their log-probs; nothing without tokens."""
    ids, mask, logp = list[int](), list[bool](), list[float | None]()
    for node in path:
        own = [bool(kept) for kept in node.get("mask") or ()]
        values = iter(node.get("logprobs") or ())
        ids += node.get("token_ids") or ()
        mask += own
        logp += [next(values, None) if kept else None for kept in own]
    if not ids or len(mask) != len(ids) or not any(mask):
        return {}
    start, end = mask.index(True), len(mask) - mask[::-1].index(True)
    tokens = {"prompt_ids": ids[:start], "completion_ids": ids[start:end], "mask": mask[start:end]}
    return {**tokens, "logp": logp[start:end] if any(one is not None for one in logp) else None}


def _branch(trace: Row) -> list[Row]:
    """The messages from the first to the last one stored."""
    nodes = find(trace, "nodes")
    if not isinstance(nodes, list) or not nodes or not all(isinstance(node, Mapping) for node in nodes):
        raise UserError("has no messages in 'nodes': drop it")
    path: list[Row] = []
    place: Any = len(nodes) - 1
    while place is not None and len(path) <= len(nodes):
        path.append(nodes[place])
        place = nodes[place].get("parent")
    return path[::-1]


def _calls(trace: Row) -> list[Row]:
    """The model calls of a trace, the last first."""
    return [call for call in reversed(trace.get("calls") or ()) if isinstance(call, Mapping) and not call.get("error")]


def _rewards(trace: Row) -> dict[str, tuple[float, float]]:
    """Name → score, and score times weight; those that were not computed are left out."""
    found: dict[str, tuple[float, float]] = {}
    for name, reward in (trace.get("rewards") or {}).items():
        if isinstance(reward, Mapping):
            score = number_in(reward, "score")
            weight = number_in(reward, "weight")
        else:
            score, weight = number_in({"score": reward}, "score"), 1.0
        if score is not None:
            found[str(name)] = score, score * (1.0 if weight is None else weight)
    return found


def _version(trace: Row, record: Row) -> int:
    """The version of the policy at the start of a rollout, or else the step, wherever a record has it."""
    info, run = trace.get("info"), record.get("run")
    work = run.get("work") if isinstance(run, Mapping) else None
    stamps = [work, trace, record, record.get("prime_rl"), info.get("prime_rl") if isinstance(info, Mapping) else None]
    for stamp in (one for one in stamps if isinstance(one, Mapping)):
        policy = stamp.get("policy")
        started = policy.get("start") if isinstance(policy, Mapping) else None
        for version in (started, stamp.get("policy_version"), stamp.get("step")):
            if isinstance(version, int):
                return version
    return 0


def _task(trace: Row) -> dict[str, Any]:
    """The data of a trace's task."""
    task = trace.get("task")
    data = task.get("data", task) if isinstance(task, Mapping) else {}
    return others(data, "prompt") if isinstance(data, Mapping) else {}


def _message(message: Any) -> dict[str, Any]:
    known = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")
    return {name: message.get(name) for name in known}


def _rollout(row: Row) -> LoggedSample:
    """A result of verifiers' first API."""
    prompt, said = prompt_of(row, "prompt"), find(row, "completion")
    steps = row.get("trajectory") or []
    held = steps[0].get("tokens") if len(steps) == 1 else None  # the tokens of several turns overlap
    tokens: dict[str, Any] = {}
    if isinstance(held, Mapping):
        tokens = {
            "prompt_ids": held.get("prompt_ids"),
            "completion_ids": held.get("completion_ids"),
            "logp": held.get("completion_logprobs"),
        }
    return LoggedSample(
        prompt=prompt,
        completion=said if isinstance(said, str) else completion_of(said, "column 'completion'"),
        reward=number_in(row, "reward"),
        components={k: float(v) for k, v in (row.get("metrics") or {}).items() if isinstance(v, (int, float))},
        version=_version(row, row),
        truncated=row.get("is_truncated"),
        columns=others(row, *_ROLLOUT),
        **tokens,
    )
