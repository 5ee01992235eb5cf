"""What a buffer holds, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Float, Int

from rlzoo.buffers.buffer import Buffer
from rlzoo.buffers.schema import LOG_PROBS, arrow

QUANTILES = {"min": 0.0, "10%": 0.1, "median": 0.5, "90%": 0.9, "max": 1.0}
"""The quantiles that are given of lengths and sizes."""
LISTED = 8
"""How many distinct rewards are listed; of more, a histogram is given."""
_SOURCES = {"policy": "samples", "demonstration": "demonstrations", "preference": "preferences"}


def overview(buffer: Buffer) -> dict[str, Any]:
    """Counts, turns, lengths in tokens, rewards, groups, log-probs and columns, as plain data.

    A group is all samples of one prompt by one policy version. Its rewards are equal if it has at least two samples,
    all with the same reward.
    """
    sources, versions = Counter(buffer.column("source")), buffer.numbers("policy_version")
    columns = sorted({name for row in buffer.column("columns") for name in row})
    found = {
        "rows": len(buffer),
        "prompts": len(set(buffer.column("prompt_id"))),
        "sources": dict(sources),
        "policy_versions": [int(version) for version in np.unique(versions)],
        "temperatures": [float(heat) for heat in np.unique(buffer.numbers("temperature"))],
        "truncated": sum(buffer.column("truncated")),
        "conversations": int(buffer.has("messages").sum()),
        "turns": turns_of(buffer),
        "prompt_tokens": quantiles(buffer.tokens("prompt_ids")),
        "completion_tokens": quantiles(buffer.tokens("completion_ids")),
        "learned_tokens": quantiles(buffer.learned_tokens()),
        "rewards": _rewards(buffer),
        "groups": _groups(buffer),
        "log_probs": {name: int(buffer.has(name).sum()) for name in LOG_PROBS},
        "columns": columns,
    }
    buffer.release_pages()
    return found


def quantiles(values: Int[np.ndarray, " N"]) -> dict[str, float]:
    """The `QUANTILES` of some counts, and their sum; empty for none."""
    if not len(values):
        return {}
    found = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf")
    return {**dict(zip(QUANTILES, map(int, found), strict=True)), "sum": int(values.sum())}


def turns_of(buffer: Buffer) -> dict[str, int]:
    """How many completions have ``several`` turns, and how many have a mask and, of these turns, only ``text``."""
    messages, masked = arrow(buffer.rows)["completion_messages"], buffer.has("completion_mask")
    return {
        "several": sum(length is not None and length > 1 for length in pc.list_value_length(messages).to_pylist()),
        "text": int((masked & ~buffer.has("completion_messages")).sum()),
    }


def _turns_described(several: int, text: int, rows: int) -> str:
    """The turns of ``rows`` completions; empty if all have one."""
    told = [f"{several:,} of {rows:,} completions have several"] if several else []
    told += [f"{text:,} have masked tokens but not their messages"] if text else []
    return "; ".join(told)


def _rewards(buffer: Buffer) -> dict[str, Any]:
    reward = buffer.numbers("reward")
    known = reward[~np.isnan(reward)]
    if not len(known):
        return {"count": 0}
    values, counts = np.unique(known, return_counts=True)
    if len(values) <= LISTED:
        spread: dict[str, Any] = {"values": dict(zip(map(float, values), map(int, counts), strict=True))}
    else:
        heights, edges = np.histogram(known, LISTED)
        spread = {"histogram": {"edges": edges.tolist(), "counts": heights.tolist()}}
    return {
        "count": len(known),
        "mean": float(known.mean()),
        "std": float(known.std()),
        "min": float(values[0]),
        "max": float(values[-1]),
        **spread,
        "components": sorted({name for row in buffer.column("reward_components") for name in row}),
    }


def _groups(buffer: Buffer) -> dict[str, Any]:
    keys = zip(
        buffer.column("source"), buffer.column("prompt_id"), buffer.numbers("policy_version").tolist(), strict=True
    )
    groups: dict[tuple[str, int], list[float]] = {}
    reward: Float[np.ndarray, " N"] = buffer.numbers("reward")
    for (source, prompt, version), value in zip(keys, reward.tolist(), strict=True):
        if source == "policy":
            groups.setdefault((prompt, version), []).append(value)
    equal = sum(len(group) > 1 and len(set(group)) == 1 for group in groups.values())
    sizes = np.array([len(group) for group in groups.values()], np.int64)
    return {"count": len(groups), "sizes": quantiles(sizes), "single": int((sizes == 1).sum()), "equal_rewards": equal}


def described(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """An `overview` as names and texts."""
    rows = numbers["rows"]
    sources = ", ".join(f"{count:,} {_SOURCES[name]}" for name, count in numbers["sources"].items())
    yield "rows", f"{rows:,} ({sources}) of {numbers['prompts']:,} prompts"
    versions = numbers["policy_versions"]
    yield (
        "policy versions",
        f"{versions[0]}" if len(versions) == 1 else f"{len(versions)}, {versions[0]} to {versions[-1]}",
    )
    if turns := _turns_described(**numbers["turns"], rows=rows):
        yield "turns", turns
    masked = numbers["learned_tokens"] != numbers["completion_tokens"]
    for name in ("prompt_tokens", "completion_tokens", *(["learned_tokens"] if masked else [])):
        yield name.replace("_", " "), _spread(numbers[name])
    yield "truncated", f"{numbers['truncated']:,} ({numbers['truncated'] / rows:.1%})"
    rewards, groups = numbers["rewards"], numbers["groups"]
    spread = f", {_rewards_described(rewards)}" if rewards["count"] else ""
    yield "rewards", f"{rewards['count']:,} of {rows:,}{spread}"
    if groups["count"]:
        several = groups["count"] - groups["single"]
        equal = (
            f"; {groups['equal_rewards']:,} ({groups['equal_rewards'] / several:.1%}) of equal rewards"
            if several
            else ""
        )
        yield "groups", f"{groups['count']:,} of {_spread(groups['sizes'])} samples{equal}"
    held = [
        f"{name.removesuffix('_logp').replace('_', ' ')} {count:,}"
        for name, count in numbers["log_probs"].items()
        if count
    ]
    yield "log-probs", ", ".join(held) or "none"
    yield "columns", ", ".join(numbers["columns"]) or "none"


def _spread(found: Mapping[str, float]) -> str:
    """Quantiles in a line."""
    if found["min"] == found["max"]:
        return f"{found['min']:,}"
    inner = ", ".join(f"{name}: {found[name]:,}" for name in ("10%", "median", "90%"))
    return f"{found['min']:,} to {found['max']:,} ({inner})"


def _rewards_described(found: Mapping[str, Any]) -> str:
    told = f"mean {found['mean']:.4g}, standard deviation {found['std']:.4g}"
    if "values" in found:
        return told + "; " + ", ".join(f"{value:g}: {count:,}" for value, count in found["values"].items())
    edges, counts = found["histogram"]["edges"], found["histogram"]["counts"]
    bins = zip(edges[:-1], edges[1:], counts, strict=True)
    return told + "; " + ", ".join(f"{low:.3g} to {high:.3g}: {count:,}" for low, high, count in bins)
