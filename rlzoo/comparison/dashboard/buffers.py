"""A saved buffer, mapped into memory: its numbers, its groups, and any page of its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from rlzoo.comparison.dashboard.files import Signature, WatchedFolder, signature

PAGE = 50
"""The rows, or groups, of a page."""
CHUNK = 10_000
"""How many rows are searched at a time."""
SEARCHED = ("prompt", "completion")
LISTED = ("prompt_id", "source", "reward", "truncated", "policy_version", "completion")
"""The columns of a list of rows; others are read only for a single row."""


@dataclass(frozen=True)
class RowQuery:
    """Which rows are shown: all from ``start`` on that have this source, prompt and text, if any is given."""

    start: int = 0
    source: str = ""
    prompt_id: str = ""
    text: str = ""


@dataclass(frozen=True)
class BufferNumbers:
    """What a buffer holds."""

    rows: int
    prompts: int
    sources: dict[str, int]
    rewards: tuple[int, float | None, float | None, float | None]
    """How many rows have one, and their mean, minimum and maximum."""
    tokens: tuple[int, float, int]
    """The least, mean and greatest number of completion tokens."""
    with_logp: int
    """How many rows have behaviour log-probs."""


class WatchedBuffer:
    """A buffer's folder. It is mapped again when it has been replaced; its files are not verified."""

    def __init__(self, folder: WatchedFolder, parts: tuple[str, ...]) -> None:
        self._folder, self._parts = folder, parts
        self._opened: tuple[Signature, pa.Table] | None = None
        self._known: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return self._parts[-1] if self._parts else self._folder.root.name

    @property
    def key(self) -> str:
        """What stands for it in the paths of pages, which the folder's own name need not suit."""
        return self._parts[-1] if self._parts else "rows"

    def table(self) -> pa.Table | None:
        """The rows as an Arrow table, of which nothing is read yet; None if there are none to read."""
        mark = self._folder.path(*self._parts, "state.json")
        now = None if mark is None else signature(mark)
        if now is None:
            return None
        if self._opened is None or self._opened[0] != now:
            names = [name for name in self._folder.names(*self._parts) if name.endswith(".arrow")]
            files = [file for name in names if (file := self._folder.path(*self._parts, name)) is not None]
            try:
                tables = [_open(file) for file in files]
                self._opened, self._known = (now, pa.concat_tables(tables, promote_options="default")), {}
            except (pa.ArrowException, OSError, ValueError):  # being written, or damaged
                return None
        return self._opened[1]

    def numbers(self, table: pa.Table) -> BufferNumbers:
        """Counts over all rows, of small columns."""
        if "numbers" not in self._known:
            reward = table["reward"] if "reward" in table.column_names else pa.nulls(len(table), pa.float64())
            tokens = _lengths(table, "completion_ids")
            spread = pc.min_max(reward)
            ends = spread["min"].as_py(), spread["max"].as_py()
            sources = pc.value_counts(table["source"].combine_chunks()).to_pylist() if len(table) else []
            logp = table["behaviour_logp"] if "behaviour_logp" in table.column_names else None
            self._known["numbers"] = BufferNumbers(
                len(table), pc.count_distinct(table["prompt_id"]).as_py(),
                {str(one["values"]): one["counts"] for one in sources},
                (len(reward) - reward.null_count, pc.mean(reward).as_py(), *ends),
                (int(tokens.min()), float(tokens.mean()), int(tokens.max())) if len(tokens) else (0, 0.0, 0),
                0 if logp is None else len(logp) - logp.null_count,
            )  # fmt: skip
        found: BufferNumbers = self._known["numbers"]
        return found

    def groups(self, table: pa.Table) -> list[dict[str, Any]]:
        """The prompts of samples, with the number of rows and their rewards: count, mean, min and max."""
        if "groups" not in self._known:
            rows = table.select(["prompt_id", "source", "reward"])
            rows = rows.filter(pc.not_equal(rows["source"], "demonstration"))
            over = [("reward", kind) for kind in ("mean", "min", "max")] + [("source", "count")]
            self._known["groups"] = rows.group_by("prompt_id", use_threads=False).aggregate(over).to_pylist()
        found: list[dict[str, Any]] = self._known["groups"]
        return found

    def page(self, table: pa.Table, query: RowQuery) -> tuple[list[dict[str, Any]], int | None]:
        """The rows that a query shows, with their ``row`` numbers, and the start of the next page, if there is one."""
        found: list[int] = []
        for start, batch in _batches(table, query.start):
            keep = _matches(batch, query)
            own = range(len(batch)) if keep is None else np.flatnonzero(keep).tolist()
            found += [start + place for place in own]
            if len(found) > PAGE:
                break
        shown, rest = found[:PAGE], found[PAGE:]
        names = [name for name in LISTED if name in table.column_names]
        taken: list[dict[str, Any]] = table.select(names).take(pa.array(shown, pa.int64())).to_pylist() if shown else []
        for number, row in zip(shown, taken, strict=True):
            row["row"] = number
            row["tokens"] = len(table["completion_ids"][number])
            logp = table["behaviour_logp"][number].values if "behaviour_logp" in table.column_names else None
            row["logp"] = None if logp is None or not len(logp) else pc.mean(logp).as_py()
        return taken, rest[0] if rest else None

    def row(self, table: pa.Table, number: int) -> dict[str, Any] | None:
        """All columns of a row; None if there is no such row."""
        if not 0 <= number < len(table):
            return None
        (found,) = table.slice(number, 1).to_pylist()
        with_columns: dict[str, Any] = dict(found)
        try:
            with_columns["columns"] = json.loads(found.get("columns") or "{}")
        except ValueError:
            with_columns["columns"] = {"columns": found["columns"]}
        return with_columns


def _open(file: Path) -> pa.Table:
    """An Arrow stream, as `datasets` writes it, mapped into memory."""
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    if name not in table.column_names:
        return np.zeros(0, np.int64)
    found: np.ndarray = pc.list_value_length(table[name]).to_numpy()
    return found


def _batches(table: pa.Table, start: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The rows from ``start`` on as they lie in the files, with the number of the first of each batch."""
    for batch in table.slice(start).select([*SEARCHED, "source", "prompt_id"]).to_batches(max_chunksize=CHUNK):
        yield start, batch
        start += len(batch)


def _matches(batch: pa.RecordBatch, query: RowQuery) -> Any:
    """Which rows match; None: all."""
    masks = []
    if query.source:
        masks.append(pc.equal(batch["source"], query.source))
    if query.prompt_id:
        masks.append(pc.equal(batch["prompt_id"], query.prompt_id))
    if query.text:
        own = [pc.match_substring(batch[name], query.text, ignore_case=True) for name in SEARCHED]
        masks.append(pc.or_kleene(pc.fill_null(own[0], False), pc.fill_null(own[1], False)))
    if not masks:
        return None
    whole = masks[0]
    for mask in masks[1:]:
        whole = pc.and_(whole, mask)
    return pc.fill_null(whole, False).to_numpy(zero_copy_only=False)
