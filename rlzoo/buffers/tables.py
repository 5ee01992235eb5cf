"""Data sets as people have them: JSONL, JSON, CSV and Parquet files, and the Hugging Face Hub."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from rlzoo.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def load_table(path_or_hub_id: str | Path, split: str | None = None) -> datasets.Dataset:
    """The rows of a local file or of a data set on the Hub.

    A Hub id may name a configuration (``openai/gsm8k:main``). ``split`` is a split of the Hub's, such as
    ``train`` or ``train[:100]``; a file is one split, whatever its name. Raises UserError for a file that is
    missing, empty or damaged (with the line), and for a Hub data set that cannot be had.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a file ({', '.join(SUFFIXES)}) or a Hub id")
    if path.is_file():
        rows = _read_file(path)
    elif path.suffix in SUFFIXES or path.is_absolute() or str(path_or_hub_id).startswith("."):
        raise UserError(f"{path} does not exist: give a file ({', '.join(SUFFIXES)}) or a Hub id")
    else:
        rows = _read_hub(str(path_or_hub_id), split)
    if not len(rows):
        raise UserError(f"{path_or_hub_id} has no rows: it is empty")
    return rows


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each JSONL line that is not blank. Raises UserError for a bad line."""
    found = False
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            found = True
            yield number, _parse_object(line, f"{path} line {number}")
    if not found:
        raise UserError(f"{path} has no rows: it is empty")


def read_parquet(path: Path) -> datasets.Dataset:
    """The rows of a Parquet file, memory-mapped through the cache of `datasets`."""
    try:
        pa.parquet.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {_first_line(error)}") from None
    try:
        with quiet():
            return datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # its parsers of what stands beside the columns raise many kinds, all about this file
        raise UserError(f"{path} is not a readable Parquet file: {_first_line(error)}") from None


def table_of(rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> datasets.Dataset:
    """Rows as a data set; a column that a row lacks is null there. ``places`` names each row for errors.

    Raises UserError naming the first value whose type does not agree with the column's earlier ones.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in names:
        if "\0" in name or name.encode(errors="replace").decode() != name:
            place = next(place for place, row in zip(places, rows, strict=True) if name in row)
            raise UserError(f"{place}: {name!r} cannot be the name of a column")
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeError):
            bad = _first_misfit(values)
            kind = type(values[bad]).__name__
            raise UserError(
                f"{places[bad]}: column {name!r} holds a value ({kind}) that does not fit the rows before: "
                "give a column one type"
            ) from None
    return datasets.Dataset(pa.table(columns))


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars from `datasets` meanwhile."""
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _read_file(path: Path) -> datasets.Dataset:
    match path.suffix:
        case ".parquet":
            return read_parquet(path)
        case ".csv":
            return _read_csv(path)
        case ".json" if _read_text(path).lstrip().startswith("["):
            return _read_json(path)
        case ".json" | ".jsonl":
            numbers, rows = zip(*read_lines(path), strict=True)
            return table_of(rows, [f"{path} line {number}" for number in numbers])
    raise UserError(f"{path} has the ending {path.suffix or 'of none'!r}: give one of {', '.join(SUFFIXES)}")


def _read_json(path: Path) -> datasets.Dataset:
    try:
        rows = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, or nested too deep
        raise UserError(f"{path} is not JSON that can be read: {_first_line(error)}") from None
    places = [f"{path} row {number}" for number in range(1, len(rows) + 1)]
    for place, row in zip(places, rows, strict=True):
        if not isinstance(row, dict):
            raise UserError(f"{place} is a {type(row).__name__}: every row must be an object of columns")
    return table_of(rows, places)


def _read_csv(path: Path) -> datasets.Dataset:
    one_thread = pa.csv.ReadOptions(use_threads=False)  # with more, errors do not name the row
    quoted = pa.csv.ParseOptions(newlines_in_values=True)
    if not _read_text(path).strip():
        raise UserError(f"{path} has no rows: it is empty")
    try:
        table = pa.csv.read_csv(path, read_options=one_thread, parse_options=quoted)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable CSV file: {_first_line(error)}") from None
    names = table.column_names
    if len(set(names)) < len(names):
        raise UserError(f"{path} line 1: the column {max(names, key=names.count)!r} is there more than once")
    return datasets.Dataset(table)


def _read_hub(name: str, split: str | None) -> datasets.Dataset:
    repo, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repo, config or None, split=split)
    except Exception as error:  # the Hub's client and its parsers raise many kinds, all about the named data set
        raise UserError(_hub_message(repo, error)) from None
    if isinstance(rows, datasets.DatasetDict):
        if len(rows) > 1:
            raise UserError(f"{name} has the splits {', '.join(rows)}: say which with split")
        (rows,) = rows.values()
    return rows


def _hub_message(repo: str, error: Exception) -> str:
    message = _first_line(error)
    if "onfig name is missing" in message:
        names = str(error).partition("[")[2].partition("]")[0]
        return f"{repo} has several configurations: write {repo}:NAME with one of {names}"
    return (
        f"{repo} is neither a file here nor a data set that the Hub gives ({message}): "
        f"check the name, or give a file ({', '.join(SUFFIXES)})"
    )


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path} line {line} holds a NUL character: it is no text, or damaged")
    return text


def _parse_object(line: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of too many digits, or nested too deep
        raise UserError(f"{place} is not JSON that can be read: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{place} is a {type(value).__name__}: every line must be an object of columns")
    return value


def _first_misfit(values: list[Any]) -> int:
    return bisect_left(range(len(values)), True, key=lambda end: not _is_column(values[: end + 1]))


def _is_column(values: list[Any]) -> bool:
    try:
        pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeError):
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
