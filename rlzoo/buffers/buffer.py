"""The two kinds of buffer: a fixed one, and one that drops the samples of the oldest policy versions.

Both are Arrow tables, memory-mapped when opened from disk. Operations read only the columns that they need. Rows never
change in place, so buffers share them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import generate_random_fingerprint
from jaxtyping import Bool, Float, Int

from rlzoo.buffers import cache, storage, views
from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.checks import checked
from rlzoo.buffers.schema import (
    CHUNK,
    SCHEMA,
    arrow,
    decode,
    encode_components,
    encode_inputs,
    from_row,
    to_dataset,
    to_row,
    to_table,
)
from rlzoo.buffers.views import View
from rlzoo.errors import UserError
from rlzoo.types import TEMPERED, Trajectory, WhichView

TokenValues = Sequence[Sequence[float] | Float[np.ndarray, " T"] | None]
"""For each row, one value per completion token, or None."""


class Buffer:
    """Trajectories as columns: the base of `OfflineBuffer` and `RolloutBuffer`. N is the number of rows."""

    def __init__(self, rows: datasets.Dataset) -> None:
        """``rows`` have the columns of `SCHEMA`. Raises UserError for an invalid value, naming the row."""
        self._rows = checked(rows, "the data set")

    @property
    def rows(self) -> datasets.Dataset:
        """The rows as a data set with the columns of `SCHEMA`."""
        return self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Trajectory:
        return from_row(self._rows[index])

    def at(self, indices: Sequence[int]) -> list[Trajectory]:
        """The rows at these indices, in their order; read together, they take half the time."""
        found: pa.Table = self._rows.with_format("arrow")[list(indices)]
        return list(map(from_row, found.to_pylist()))

    def __iter__(self) -> Iterator[Trajectory]:
        for rows in self.chunks():
            yield from rows

    def column(self, name: str) -> list[Any]:
        """One field of every `Trajectory`. Reads only that column. Raises UserError for an unknown column."""
        if name not in SCHEMA:
            raise UserError(f"a buffer has no column {name!r}: known: {', '.join(SCHEMA)}")
        return [decode(name, value) for value in arrow(self._rows)[name].to_pylist()]

    def numbers(self, name: str) -> Float[np.ndarray, " N"]:
        """A column with one number per row, as an array [N]; NaN for null. Reads only that column."""
        found: Float[np.ndarray, " N"] = arrow(self._rows)[name].to_numpy()
        return found

    def is_complete(self, name: str) -> bool:
        """Whether every row has a value in this column. Reads no values."""
        return not arrow(self._rows)[name].null_count

    def has(self, name: str) -> Bool[np.ndarray, " N"]:
        """Which rows have a value in this column, [N]. Reads no values."""
        found: Bool[np.ndarray, " N"] = arrow(self._rows)[name].is_valid().to_numpy()
        return found

    def tokens(self, *names: str) -> Int[np.ndarray, " N"]:
        """The number of tokens per row, [N], in ``prompt_ids`` and ``completion_ids``, or only in the named columns."""
        table = arrow(self._rows)
        total = np.zeros(len(self), np.int64)
        for name in names or ("prompt_ids", "completion_ids"):
            total += pc.list_value_length(table[name]).to_numpy()
        return total

    def learned_tokens(self) -> Int[np.ndarray, " N"]:
        """The number of completion tokens per row that are learned from, [N]."""
        found, before = self.tokens("completion_ids"), 0
        for chunk in arrow(self._rows)["completion_mask"].chunks:
            kept = chunk.flatten().to_numpy(zero_copy_only=False)
            of_rows = np.bincount(pc.list_parent_indices(chunk).to_numpy()[kept], minlength=len(chunk))
            masked = np.flatnonzero(chunk.is_valid().to_numpy(zero_copy_only=False))
            found[before + masked] = of_rows[masked]
            before += len(chunk)
        return found

    def outside(self, vocabulary: int) -> tuple[int, int] | None:
        """A row with a token id outside of 0 to ``vocabulary`` - 1, and that id; None if there is none."""
        try:
            for name in ("prompt_ids", "completion_ids"):
                before = 0
                for chunk in arrow(self._rows)[name].chunks:
                    ids = chunk.flatten()
                    found = pc.min_max(ids).as_py()
                    if len(ids) and not 0 <= found["min"] <= found["max"] < vocabulary:
                        token = found["max"] if found["max"] >= vocabulary else found["min"]
                        ends = pc.list_value_length(chunk).to_numpy(zero_copy_only=False).cumsum()
                        place = pc.index(ids, token).as_py()
                        return before + int(np.searchsorted(ends, place, side="right")), token
                    before += len(chunk)
            return None
        finally:
            self.release_pages()

    def ids(self, size: int = CHUNK) -> Iterator[list[tuple[list[int], list[int]]]]:
        """(prompt ids, completion ids) of all rows, ``size`` rows at a time."""
        rows = self._rows.select_columns(["prompt_ids", "completion_ids"])
        for batch in rows.with_format("arrow").iter(size):
            yield list(zip(*(column.to_pylist() for column in batch.columns), strict=True))

    def chunks(self, size: int = CHUNK) -> Iterator[list[Trajectory]]:
        """All rows, ``size`` at a time."""
        for batch in self._rows.with_format("arrow").iter(size):
            yield list(map(from_row, batch.to_pylist()))

    def lacks(self, name: str, at_sampling_temperature: bool = False) -> bool:
        """Whether any row lacks a stored input, optionally at its sampling temperature."""
        lacking = ~self._has_values(name)
        if at_sampling_temperature and self._is_tempered(name):
            lacking |= (self.numbers("temperature") != 1.0) & ~self._has_values(TEMPERED + name)
        return bool(lacking.any())

    def _is_tempered(self, name: str) -> bool:
        """Whether the input has a separate value at a row's sampling temperature."""
        return TEMPERED + name in SCHEMA or name not in SCHEMA

    def _has_values(self, name: str) -> Bool[np.ndarray, " N"]:
        if name in SCHEMA:
            return self.has(name)
        return np.array([name in decode("inputs", row) for row in arrow(self._rows)["inputs"].to_pylist()], bool)

    def view(self, selection: WhichView, **options: Any) -> View:
        """A view of the buffer, with the options of its ``units`` method.

        Raises UserError for an unknown view or option, and if the view is empty or its units or weights are invalid.
        """
        try:
            return views.select(arrow(self._rows), selection, options, self.release_pages)
        finally:
            self.release_pages()

    def release_pages(self) -> None:
        """Release the memory of pages that were read from disk; they are read again when needed."""
        storage.release_pages(self._rows)

    def with_values(self, name: str, values: TokenValues) -> Self:
        """The same rows with new values of a stored input (None: no value); values at other temperatures are removed.

        Raises ValueError for the wrong number of rows or of values in a row.
        """
        if name in SCHEMA:
            changed = self._with_column(name, self._token_column(name, values))
            if TEMPERED + name in SCHEMA:
                none = self._token_column(TEMPERED + name, [None] * len(self))
                changed = changed._with_column(TEMPERED + name, none)
            return changed
        if len(values) != len(self):
            raise ValueError(f"{name} has {len(values)} rows for {len(self)} rows")
        held = [decode("inputs", row) for row in arrow(self._rows)["inputs"].to_pylist()]
        for row, value in zip(held, values, strict=True):
            for stale in (name, TEMPERED + name):
                row.pop(stale, None)
            row |= {} if value is None else {name: np.asarray(value, np.float32).tolist()}
        return self._with_column("inputs", [encode_inputs(row) for row in held])

    def with_behaviour_logp(self, values: TokenValues) -> Self:
        """The same rows with these behaviour log-probs, in nats.

        Raises ValueError for the wrong number of rows or of values in a row.
        """
        return self._with_column("behaviour_logp", self._token_column("behaviour_logp", values))

    def with_rewards(
        self, rewards: Sequence[float | None], components: Sequence[Mapping[str, float | None]] | None = None
    ) -> Self:
        """The same rows with these rewards and their named components. Raises ValueError for too few or too many."""
        components = [{}] * len(rewards) if components is None else components
        for name, values in (("rewards", rewards), ("reward components", components)):
            if len(values) != len(self):
                raise ValueError(f"{len(values)} {name} for {len(self)} rows")
        rewarded = self._with_column("reward", pa.array(rewards, pa.float64()))
        return rewarded._with_column("reward_components", [encode_components(dict(row)) for row in components])

    def concatenate(self, other: Buffer) -> Self:
        """These rows, then those of ``other``."""
        return self._with_rows(datasets.concatenate_datasets([self._rows, other.rows]))

    def save(self, path: str | Path, notes: Mapping[str, Any] | None = None, card: str | None = None) -> None:
        """Write a folder that opens memory-mapped, atomically. Raises UserError if ``path`` holds anything but a
        buffer.

        ``notes``, plain data, are stored in its buffer.json, and a ``card`` as its README.md (see `buffer_card`).
        """
        storage.write_folder(self._rows, path, {**(notes or {}), **self._settings()}, card)

    def to_parquet(self, path: str | Path) -> None:
        """Write one Parquet file."""
        storage.write_parquet(self._rows, path)

    def to_jsonl(self, path: str | Path) -> None:
        """Write one JSON object per line, with the fields of a `Trajectory`."""
        storage.write_jsonl(self, path)

    def write(self, path: str | Path, notes: Mapping[str, Any] | None = None, card: str | None = None) -> None:
        """Write a .parquet or a .jsonl file if the path ends so, else a folder with ``notes`` and card (see `save`)."""
        match Path(path).suffix:
            case ".parquet":
                self.to_parquet(path)
            case ".jsonl":
                self.to_jsonl(path)
            case _:
                self.save(path, notes, card)

    def push_to_hub(self, name: str, private: bool = True) -> None:
        """Upload the rows to the Hugging Face Hub as the data set ``name``; as in ``--push-to-hub``, a private one."""
        self._rows.push_to_hub(name, private=private)

    def _settings(self) -> dict[str, Any]:
        return {}

    def _with_rows(self, rows: datasets.Dataset) -> Self:
        twin = copy.copy(self)
        twin._rows = rows
        return twin

    def _with_column(self, name: str, values: Any) -> Self:
        others = self._rows.remove_columns(name)
        fingerprint = generate_random_fingerprint()  # otherwise `datasets` hashes the values
        rows = others.add_column(name, values, new_fingerprint=fingerprint, feature=SCHEMA[name])
        return self._with_rows(rows.select_columns(list(SCHEMA)))

    def _token_column(self, name: str, values: TokenValues) -> pa.ChunkedArray:
        if len(values) != len(self):
            raise ValueError(f"{name} has {len(values)} rows for {len(self)} rows")
        tokens = self.tokens("completion_ids")
        for row, (value, expected) in enumerate(zip(values, tokens, strict=True)):
            if value is not None and len(value) != expected:
                raise ValueError(f"{name} of row {row} has {len(value)} values for {expected} completion tokens")
        kind = pa.list_(pa.float32())
        chunks = (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))
        arrays = ([None if v is None else np.asarray(v, np.float32) for v in chunk] for chunk in chunks)
        return pa.chunked_array([pa.array(array, kind) for array in arrays], kind)


class OfflineBuffer(Buffer):
    """A buffer whose rows are fixed."""

    @classmethod
    def of_checked(cls, rows: datasets.Dataset) -> Self:
        """A buffer of rows that have been checked already."""
        buffer = cls.__new__(cls)
        buffer._rows = rows
        return buffer

    @classmethod
    def from_trajectories(cls, trajectories: Iterable[Trajectory]) -> Self:
        """A buffer of these rows, in memory, or in a temporary file if there are many.

        Raises ValueError for log-probs of another length than the completion, UserError for an invalid value.
        """
        return cls.of_checked(cache.spooled(map(to_row, trajectories)))

    @classmethod
    def load(cls, path: str | Path, bad: BadRows | None = None) -> Self:
        """Open a folder (memory-mapped), a .parquet or a .jsonl file that a buffer was saved to, or NAMESPACE/NAME of a
        buffer on the Hub.

        Raises UserError for anything else, and for a row with an invalid value unless ``bad`` drops such rows.
        """
        return cls.of_checked(storage.read(path, bad))


class RolloutBuffer(Buffer):
    """A buffer of the newest ``capacity_versions`` policy versions; samples of older ones are dropped."""

    def __init__(self, capacity_versions: int) -> None:
        if capacity_versions < 1:
            raise UserError(f"a rollout buffer needs capacity_versions of at least 1, got {capacity_versions}")
        super().__init__(to_dataset(to_table([])))
        self.capacity_versions = capacity_versions

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open a folder that `save` wrote, or NAMESPACE/NAME of one on the Hub. Raises UserError for anything else."""
        rows, settings = storage.read(path), storage.read_settings(storage.local_path(path))
        if "capacity_versions" not in settings:
            raise UserError(f"{path} is not a rollout buffer: open it with OfflineBuffer.load")
        return cls(settings["capacity_versions"])._with_rows(rows)

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        """Add samples, then drop all but the newest policy versions."""
        self._rows = self.concatenate(OfflineBuffer.from_trajectories(trajectories)).rows

    def freeze(self) -> OfflineBuffer:
        """The current rows as a fixed buffer."""
        return OfflineBuffer.of_checked(self._rows)

    def _settings(self) -> dict[str, Any]:
        return {"capacity_versions": self.capacity_versions}

    def _with_rows(self, rows: datasets.Dataset) -> Self:
        table = arrow(rows)
        versions = np.unique(table["policy_version"].to_numpy())
        if len(versions) > self.capacity_versions:
            kept = pc.is_in(table["policy_version"], pa.array(versions[-self.capacity_versions :]))
            rows = to_dataset(table.filter(kept))
        return super()._with_rows(rows)
