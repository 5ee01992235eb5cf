"""Saved buffers: memory-mapped folders, Parquet and JSONL, written under a temporary name and then renamed."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pydantic

from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.checks import checked, wrong_rows
from rlzoo.buffers.files import json_lines
from rlzoo.buffers.schema import CHUNK, to_dataset, to_table, unchecked_row
from rlzoo.buffers.tables import load_table, quiet, read_parquet
from rlzoo.errors import UserError
from rlzoo.jobs.hub import local_copy
from rlzoo.jobs.outputs import file_digest, replacing
from rlzoo.jobs.sharing import CARD, hub_id, public
from rlzoo.jobs.sources import kind_of_file, path_of
from rlzoo.types import Trajectory

_DONT_NEED = 4  # MADV_DONTNEED
SETTINGS, _DIGESTS = "buffer.json", "sha256"
_LARGEST = 2**31 - 1
"""The largest integer that a row may hold."""
_FOLDER_MARK = "state.json"  # what `Dataset.save_to_disk` leaves in every folder


def write_folder(rows: datasets.Dataset, path: str | Path, settings: dict[str, Any], card: str | None = None) -> None:
    """Write a folder that opens memory-mapped, with its ``card``. Raises UserError if ``path`` exists and is not a
    buffer.
    """
    path = path_of(path)
    if path.exists() and not (path / _FOLDER_MARK).exists() and not _is_empty(path):
        raise UserError(f"{path} exists and is not a buffer: choose another path")
    with replacing(path) as beside, quiet():
        rows.save_to_disk(beside)
        digests = {file.name: file_digest(file) for file in sorted(beside.iterdir())}
        digests[SETTINGS] = _digest(settings)
        (beside / SETTINGS).write_text(json.dumps({**settings, _DIGESTS: digests}))
        if card is not None:  # without a digest: its readers may edit it
            (beside / CARD).write_text(card, encoding="utf-8")


def write_parquet(rows: datasets.Dataset, path: str | Path) -> None:
    """Write ``rows`` as one Parquet file."""
    with replacing(path_of(path)) as beside, quiet():
        rows.to_parquet(beside, write_page_checksum=True)


def write_jsonl(trajectories: Iterable[Trajectory], path: str | Path) -> None:
    """Write one trajectory per line, as a JSON object of its fields."""
    with replacing(path_of(path)) as beside, beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(t), ensure_ascii=False) + "\n" for t in trajectories)


def local_path(source: str | Path) -> Path:
    """Where a saved buffer is on this machine: its path, or the copy of a pushed folder that NAMESPACE/NAME names.

    Raises UserError if a pushed folder cannot be downloaded.
    """
    path = path_of(source)
    return path if path.exists() else local_copy(str(source), SETTINGS) or path


def is_folder(source: str | Path) -> bool:
    """Whether a source is the folder of a saved buffer, here or on the Hub. Raises UserError as `local_path` does."""
    return (local_path(source) / SETTINGS).is_file()


def read(source: str | Path, bad: BadRows | None = None) -> datasets.Dataset:
    """The rows of a folder, a .parquet or a .jsonl file, or those of a buffer on the Hub, without rows that ``bad``
    drops.

    Raises UserError for anything else, for damaged files and, unless it is dropped, for a row with an invalid value.
    """
    path, bad = local_path(source), BadRows() if bad is None else bad
    if not path.exists() and (name := hub_id(str(source))) is not None and "/" in name:
        rows = load_table(name)  # pushed by Buffer.push_to_hub, or by datasets
    elif not path.exists():
        raise UserError(
            f"{path} does not exist: give a folder, a .parquet or a .jsonl file that a buffer was saved to, or "
            "NAMESPACE/NAME of one on the Hub"
        )
    elif path.is_dir():
        _check_digests(path)
        rows = _read_folder(path)
    elif path.suffix == ".parquet":
        _check_pages(path)
        rows = read_parquet(path)
    elif kind_of_file(path) == ".jsonl":
        return _read_jsonl(path, bad)
    else:
        raise UserError(f"{path} is not a buffer: give a folder, a .parquet or a .jsonl file that one was saved to")
    try:
        return checked(rows, str(source), bad)
    finally:
        release_pages(rows)


def release_pages(rows: datasets.Dataset) -> None:
    """Return the pages of mapped files that were read to the system, which keeps them cached while it has room.

    Otherwise they count as memory of this process, although the system can reclaim them at any time. Linux only.
    """
    files = {str(Path(file["filename"]).resolve()) for file in rows.cache_files}
    if not files or sys.platform != "linux":
        return
    system = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access, *_, name = line.split(maxsplit=5) if line.count(" ") > 4 else ("", "", "")
        if name.removesuffix(" (deleted)") in files and access.startswith(
            "r--"
        ):  # read alone: nothing in them can be lost
            start, end = (int(place, 16) for place in span.split("-"))
            system.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings stored with the rows of a folder; empty if `write_folder` did not write it."""
    file = path_of(path) / SETTINGS
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{file} is damaged: save the buffer again")
    return settings


def public_settings(path: str | Path) -> bytes | None:
    """The settings of a folder for others to see (see `rlzoo.jobs.sharing`), as its file; None if it has none."""
    settings = public(read_settings(path))
    if not settings:
        return None
    digests = settings.pop(_DIGESTS, {})
    return json.dumps({**settings, _DIGESTS: {**digests, SETTINGS: _digest(settings)}}).encode()


def notes_of(path: str | Path) -> dict[str, Any]:
    """The notes that were stored with a buffer (see `Buffer.save`); empty for a file."""
    return {name: value for name, value in read_settings(path).items() if name != _DIGESTS}


def _check_digests(path: Path) -> None:
    """Raise UserError for a folder whose files have changed since they were written."""
    settings = read_settings(path)
    digests = settings.pop(_DIGESTS, {})  # a folder of `datasets`, or of an older version, has none
    there = {file.name for file in path.iterdir() if file.is_file()}  # others may have been added on the Hub
    if not isinstance(digests, dict) or not digests.keys() <= there:
        raise UserError(f"{path} is damaged: it does not have the files that were written; save the buffer again")
    for name, digest in digests.items():
        if (_digest(settings) if name == SETTINGS else file_digest(path / name)) != digest:
            raise UserError(f"{path / name} is damaged: its checksum has changed since it was written")


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _check_pages(path: Path) -> None:
    """Raise UserError for a Parquet file with a page whose checksum has changed since it was written."""
    try:
        for _ in pyarrow.parquet.ParquetFile(path, page_checksum_verification=True).iter_batches():
            pass
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is not a readable Parquet file: {reason}") from None


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _read_folder(path: Path) -> datasets.Dataset:
    try:
        rows = datasets.load_from_disk(path)
    except (OSError, KeyError, ValueError):
        raise UserError(f"{path} is not a saved buffer: save one with its save method or rlzoo rollout") from None
    if not isinstance(rows, datasets.Dataset):
        raise UserError(f"{path} holds several splits ({', '.join(rows)}): give the folder of one")
    return rows


_TRAJECTORY = pydantic.TypeAdapter(Trajectory)
_FIELDS = frozenset(f.name for f in fields(Trajectory))


def _read_jsonl(path: Path, bad: BadRows) -> datasets.Dataset:
    """The rows of a .jsonl file, whose fields have types as well as values to check."""
    lines, tables, made = json_lines(path), [], 0
    while chunk := list(itertools.islice(lines, CHUNK)):
        bad.rows += len(chunk)
        read = [(number, _buffer_row(line)) for number, line in chunk]
        table = to_table(row for _, row in read if not isinstance(row, UserError))
        wrong, place, kept = wrong_rows(table), itertools.count(), list[int]()
        for number, row in read:
            if isinstance(row, UserError):
                bad.refuse(f"{path} line {number}", row)
            elif (index := next(place)) in wrong:
                bad.refuse(f"{path} line {number}", UserError(wrong[index]))
            else:
                kept.append(index)
        tables.append(table.take(kept) if wrong else table)
        made += len(kept)
    bad.require_some(made)
    if not made:
        raise UserError(f"{path} has no rows: it is empty")
    return to_dataset(pyarrow.concat_tables(tables))


def _buffer_row(line: dict[str, Any] | UserError) -> dict[str, Any] | UserError:
    """The row of a line, or the error of one with wrong fields or types."""
    if isinstance(line, UserError):
        return line
    if surplus := sorted(line.keys() - _FIELDS):
        return UserError(f"a buffer has no field {surplus[0]!r}: keep it in 'columns'")
    try:
        row = _TRAJECTORY.validate_python(line)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        return UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}")
    for name in ("prompt_ids", "completion_ids"):
        if (largest := max(getattr(row, name), key=abs, default=0)) and abs(largest) > _LARGEST:
            return UserError(f"{name} holds {largest}, which is not a token id")
    if abs(row.policy_version) > _LARGEST:
        return UserError(f"policy_version is {row.policy_version}: it must be at most {_LARGEST}")
    return unchecked_row(row)
