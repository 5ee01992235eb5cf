"""The samples of evaluations: an index of problems, and the completions of one problem.

Texts may be many gigabytes. They lie in temporary files that are mapped into memory, and only what is shown is read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from rlzoo.comparison.dashboard.files import Signature, WatchedFolder, signature
from rlzoo.config import BASE

SCHEMA = pa.schema(
    [
        ("algorithm", pa.string()),
        ("seed", pa.int64()),
        ("learning_rate", pa.float64()),
        ("benchmark", pa.string()),
        ("problem_id", pa.string()),
        ("decoding", pa.string()),
        ("sample", pa.int64()),
        ("reward", pa.float64()),
        ("correct", pa.bool_()),
        ("length", pa.int64()),
        ("truncated", pa.bool_()),
        ("answer", pa.string()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("text", pa.string()),
    ]
)
"""The columns that are shown; those of older runs that lack some have nulls."""
DECODINGS = ("sample", "greedy")
ROWS = 1000
"""How many rows are written, and later mapped, at a time."""


@dataclass
class ProblemResults:
    """How many samples of each algorithm are right on a problem."""

    benchmark: str
    id: str
    right: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Algorithm → right samples, and all samples."""

    def spread(self, rows: Sequence[str]) -> float:
        """The variance of the share of right samples between some algorithms, without the base model."""
        shares = [right / n for name, (right, n) in self.right.items() if name != BASE and (not rows or name in rows)]
        return float(np.var(shares)) if shares else 0.0

    def share(self, rows: Sequence[str]) -> float | None:
        """The share of right samples of some algorithms together, without the base model."""
        own = [value for name, value in self.right.items() if name != BASE and (not rows or name in rows)]
        return sum(right for right, _ in own) / sum(n for _, n in own) if own else None


class OutcomeStore:
    """The outcomes of a run: those of cached results while it is unfinished, or its table."""

    def __init__(self, folder: WatchedFolder) -> None:
        self._folder = folder
        self._parts: dict[str, pa.Table] = {}
        self._table: tuple[str, Signature] | None = None
        self._read: tuple[str, Signature] | None = None
        self._indexed: dict[str, list[ProblemResults]] = {}

    @cached_property
    def _scratch(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="rlzoo-serve-")

    def add(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take the outcomes of one cached result, in place of earlier ones of its name."""
        made = (pa.RecordBatch.from_pylist(list(rows[at : at + ROWS]), SCHEMA) for at in range(0, len(rows), ROWS))
        self._parts[name] = self._mapped(made)
        self._indexed = {}

    def use_table(self, name: str | None) -> None:
        """Use the outcomes of a finished run, in a Parquet file of the folder, in place of cached results."""
        file = None if name is None else self._folder.path(name)
        now = None if file is None else signature(file)
        self._table = None if name is None or now is None else (name, now)

    def _mapped(self, batches: Iterable[pa.RecordBatch]) -> pa.Table:
        """A table in a file that is mapped, and removed once nothing uses it."""
        with (
            tempfile.NamedTemporaryFile(dir=self._scratch.name, delete=False) as file,
            pa.ipc.new_file(file, SCHEMA) as writer,
        ):
            for batch in batches:
                writer.write_batch(batch.filter(pc.is_in(batch["decoding"], pa.array(DECODINGS))))
        table = pa.ipc.open_file(pa.memory_map(file.name)).read_all()
        Path(file.name).unlink()
        return table

    def _tables(self) -> list[pa.Table]:
        if self._table is not None and self._read != self._table:
            file = self._folder.path(self._table[0])
            self._parts = {} if file is None else {self._table[0]: self._mapped(_batches(file))}
            self._read, self._indexed = self._table, {}
        return list(self._parts.values())

    def problems(self, decoding: str) -> list[ProblemResults]:
        """All problems, in the order of the benchmarks. Raises pyarrow's errors for a damaged table."""
        tables = self._tables()
        if decoding not in self._indexed:
            keys = ["benchmark", "problem_id", "algorithm"]
            small = [table.select([*keys, "decoding", "correct"]) for table in tables]
            found: dict[tuple[str, str], ProblemResults] = {}
            if small:
                whole = pa.concat_tables(small)
                whole = whole.filter(pc.equal(whole["decoding"], decoding))
                over = [("correct", "sum"), ("algorithm", "count")]
                for row in whole.group_by(keys, use_threads=False).aggregate(over).to_pylist():
                    at = row["benchmark"], row["problem_id"]
                    one = found.setdefault(at, ProblemResults(*at))
                    one.right[row["algorithm"]] = int(row["correct_sum"] or 0), int(row["algorithm_count"])
            order = {name: place for place, name in enumerate(dict.fromkeys(name for name, _ in found))}
            self._indexed[decoding] = sorted(found.values(), key=lambda one: order[one.benchmark])
        return self._indexed[decoding]

    def completions(self, problem: ProblemResults, decoding: str) -> list[dict[str, Any]]:
        """The rows of a problem's samples, those of the first seed first."""
        rows: list[dict[str, Any]] = []
        for table in self._tables():
            own = pc.equal(table["problem_id"], problem.id)
            for name, value in (("benchmark", problem.benchmark), ("decoding", decoding)):
                own = pc.and_(own, pc.equal(table[name], value))
            rows += table.filter(own).to_pylist()
        return sorted(rows, key=lambda row: (row["seed"], row["sample"]))


def _batches(file: Path) -> Iterable[pa.RecordBatch]:
    """The rows of a Parquet file, a batch at a time, with the columns of `SCHEMA`."""
    with pq.ParquetFile(file) as table:
        there = [name for name in SCHEMA.names if name in table.schema_arrow.names]
        for batch in table.iter_batches(ROWS, columns=there):
            columns = [
                batch[name].cast(kind) if name in there else pa.nulls(len(batch), kind)
                for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
