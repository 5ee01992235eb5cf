"""The rows of one file: JSONL, JSON, CSV, TSV, Parquet or Arrow, read lazily; text files may be compressed.

Values are read unchanged: numbers in JSON may have any size, and everything in CSV is text.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from rlzoo.buffers.bad_rows import located
from rlzoo.buffers.values import plain_row
from rlzoo.errors import UserError, kind_of
from rlzoo.jobs.sources import SUFFIXES, kind_of_file

BATCH = 1000
"""How many rows of an Arrow table are Python objects at a time."""

Item = tuple[str, dict[str, Any] | UserError]
"""The place of a row, for errors, and the row with plain values, or the error of a row that cannot be read."""

_OPENERS: dict[str, Any] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}

_POINTER = b"version https://git-lfs.github.com/spec/"
_UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


def file_rows(path: Path) -> Iterator[Item]:
    """The rows of a file. Raises UserError for an unknown kind of file, and for one that is damaged as a whole."""
    require_data(path)
    match kind_of_file(path):
        case ".parquet":
            yield from parquet_rows(path)
        case ".arrow":
            yield from arrow_rows(path)
        case ".csv":
            yield from _csv_rows(path, ",")
        case ".tsv":
            yield from _csv_rows(path, "\t")
        case ".json" | ".jsonl" as kind if not _is_lines(path, kind):
            yield from _json_rows(path)
        case ".json" | ".jsonl":
            yield from ((f"{path} line {number}", row) for number, row in json_lines(path))
        case _:
            ending = f"the ending {path.suffix!r}" if path.suffix else "no ending"
            raise UserError(f"{path} has {ending}: give one of {', '.join(SUFFIXES)}")


def require_data(path: Path) -> None:
    """Raise UserError for a Git LFS pointer, which stands in for a large file that was not downloaded."""
    with _open(path) as stream:
        try:
            pointer = stream.read(len(_POINTER)) == _POINTER
        except _UNREADABLE:
            return  # reported by whoever reads it
    if pointer:
        raise UserError(f"{path} is a Git LFS pointer, not the data: get them with git lfs pull")


def require_distinct(names: list[str], origin: str) -> None:
    """Raise UserError for a column name that occurs twice."""
    if repeated := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{origin} has the column {repeated[0]!r} more than once: rename or drop one")


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | UserError]]:
    """(line number, object) of each line that is not blank; for a bad line, its error, without the place."""
    for number, line in _lines(path):
        if isinstance(line, UserError) or line.strip():
            yield number, line if isinstance(line, UserError) else _object(line)


def parquet_rows(path: Path) -> Iterator[Item]:
    """The rows of a Parquet file, a batch at a time."""
    try:
        file = pa.parquet.ParquetFile(path)
        yield from batch_rows(file.iter_batches(BATCH), str(path))
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {first_line(error)}") from None


def arrow_rows(path: Path) -> Iterator[Item]:
    """The rows of an Arrow file, or of a stream in one, as `datasets` writes them."""
    try:
        with pa.memory_map(str(path)) as source:
            try:
                file = pa.ipc.open_file(source)
                batches: Iterable[pa.RecordBatch] = map(file.get_batch, range(file.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = pa.ipc.open_stream(source)
            yield from batch_rows(batches, str(path))
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise UserError(f"{path} is not a readable Arrow file: {first_line(error)}") from None


def batch_rows(batches: Iterable[pa.RecordBatch | pa.Table], origin: str) -> Iterator[Item]:
    """The rows of Arrow batches, numbered from 1."""
    number = 0
    for batch in batches:
        names = batch.schema.names
        require_distinct(names, origin)
        columns = [_values(column) for column in batch.columns]
        for values in zip(*columns, strict=True):
            number += 1
            yield f"{origin} row {number}", plain_row(dict(zip(names, map(_as_said, values), strict=True)))


def _as_said(value: Any) -> Any:
    """A conversation without the nulls with which Arrow gives each message, and each tool call, the keys of all."""
    is_conversation = isinstance(value, list) and value and all(isinstance(x, dict) and "role" in x for x in value)
    return _without_nulls(value) if is_conversation else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return value


def first_line(error: Exception) -> str:
    """An exception's message, cut to one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _values(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):  # nanoseconds, or years that Python's dates have not
        values = column.cast(pa.string()).to_pylist()
    return values


def _open(path: Path) -> IO[bytes]:
    opener = _OPENERS.get(path.suffix.lower())
    try:
        stream: IO[bytes] = path.open("rb") if opener is None else opener(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None
    return stream


def _lines(path: Path) -> Iterator[tuple[int, str | UserError]]:
    """(number, line) of a text file; for a line that is not text, the error without its place."""
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, 1):
                yield number, _text(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read: {reason}") from None


def _text(line: bytes) -> str | UserError:
    if b"\0" in line:
        return UserError("holds a NUL character: it is damaged, or UTF-16, which must be converted to UTF-8")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        return UserError(f"is not UTF-8 text (byte {error.start + 1} of the line): convert the file")


class _Repeating(dict[str, Any]):
    """A JSON object that has a key more than once, of which a dictionary keeps the last."""

    key = ""


def _loads(text: str) -> tuple[Any, list[str]]:
    """The value of a JSON text, and the keys that a (`_Repeating`) object repeats. Raises as `json.loads` does."""
    repeated: list[str] = []

    def made(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            found = _Repeating(found)
            found.key = next(name for name in names if names.count(name) > 1)
            repeated.append(found.key)
        return found

    return json.loads(text, object_pairs_hook=made), repeated


def _repeated(value: Any) -> str | None:
    """The first key that an object in a value has more than once."""
    if isinstance(value, _Repeating):
        return value.key
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((key for one in inner if (key := _repeated(one)) is not None), None)


def _several(key: str) -> UserError:
    return UserError(f"has the key {key!r} more than once: keep one")


def _object(line: str) -> dict[str, Any] | UserError:
    try:
        value, repeated = _loads(line)
    except json.JSONDecodeError as error:
        return UserError(f"is not JSON: {_reason(error)} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number with too many digits, or nested too deep
        return UserError(f"is not JSON that can be read: {first_line(error)}")
    return _several(repeated[0]) if repeated else object_row(value, "line")


def _json_rows(path: Path) -> Iterator[Item]:
    lines = []
    for number, line in _lines(path):
        if isinstance(line, UserError):
            raise UserError(located(f"{path} line {number}", line))
        lines.append(line)
    try:
        rows, repeated = _loads("".join(lines))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno} is not JSON: {_reason(error)} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON that can be read: {first_line(error)}") from None
    if isinstance(rows, dict):
        if isinstance(rows, _Repeating):
            raise UserError(located(str(path), _several(rows.key)))
        tables = [name for name, value in rows.items() if _are_rows(value)]
        if len(tables) > 1:
            raise UserError(f"{path} holds several lists of rows ({', '.join(tables)}): give each its own file")
        rows = rows[tables[0]] if tables else [rows]  # the rows, and metadata beside them
    if not isinstance(rows, list):
        raise UserError(f"{path} holds {kind_of(rows)}: give a list of rows, or one object per line")
    for number, row in enumerate(rows, 1):
        key = _repeated(row) if repeated else None
        yield f"{path} row {number}", object_row(row, "row") if key is None else _several(key)


def _are_rows(value: Any) -> bool:
    """Whether a value is a list of objects other than a conversation's messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, dict) and not {"role", "from"} & set(entry) for entry in value)
    )


def _begins_list(line: str) -> bool:
    """Whether a line opens a list of objects, here or on the next line."""
    return bool(re.match(r"\s*\[\s*(\{|$)", line))


def _reason(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at")


def object_row(value: Any, what: str) -> dict[str, Any] | UserError:
    """The columns of a line or row as plain values; for anything but an object, its error, without the place."""
    if isinstance(value, Mapping):
        return plain_row(value)
    return UserError(f"is {kind_of(value)}: every {what} must be an object of columns")


def _csv_rows(path: Path, delimiter: str) -> Iterator[Item]:
    def lines() -> Iterator[str]:
        for number, line in _lines(path):
            if isinstance(line, UserError):
                raise UserError(located(f"{path} line {number}", line))
            yield line

    header = next((line for line in lines() if line.strip()), "")
    # spreadsheets in many countries separate by semicolons
    delimiter = next((mark for mark in (delimiter, ";", "\t") if mark in header), delimiter)
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        records = (record for record in reader if record)
        names = next(records, [])
        require_distinct(names, f"{path} line 1")
        for number, record in enumerate(records, 1):
            row: dict[str, Any] | UserError = dict(zip(names, record, strict=False))
            if len(record) != len(names):
                row = UserError(
                    f"has {len(record)} values for {len(names)} columns: quote commas and line breaks in text"
                )
            yield f"{path} row {number}", row
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is not CSV: {error}") from None


def _is_lines(path: Path, kind: str) -> bool:
    """Whether a JSON file has one object per line: a .jsonl file unless it begins with a list, and a .json file if its
    first line is an object and there are more."""
    lines = (line for _, line in _lines(path) if isinstance(line, UserError) or line.strip())
    first, second = next(lines, "{}"), next(lines, None)
    if kind == ".jsonl":
        return not (isinstance(first, str) and _begins_list(first))
    return second is not None and isinstance(first, str) and _is_object(first)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
