"""Reading tables: files, folders of shards, patterns, saved data sets, and the Hugging Face Hub."""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from rlzoo.buffers.bad_rows import BadRows, located
from rlzoo.buffers.files import BATCH, Item, batch_rows, file_rows, first_line, require_data, require_distinct
from rlzoo.buffers.values import usable
from rlzoo.errors import UnreachableError, UserError
from rlzoo.jobs.sources import SUFFIXES, data_files, is_pattern, kind_of_file, path_of

GIVE = f"give a file ({', '.join(SUFFIXES)}), a folder of them, or a Hub id"
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in file names → the split that they stand for."""


def load_table(source: str | Path, split: str | None = None) -> datasets.Dataset:
    """The rows of a local file, a folder of shards, a pattern, a saved data set, or a data set on the Hub.

    A Hub id may name a configuration (``openai/gsm8k:main``). ``split`` names a split, or a slice of one, such as
    ``train[:100]``; a file is a single split, whatever its name. Raises UserError for a source that is missing, empty
    or damaged (naming the row), for a column of several types, and for a Hub data set that cannot be loaded.
    """
    found = _found(source, split)
    if isinstance(found, list) and all(kind_of_file(file) == ".parquet" for file in found):
        found = _part(_joined(found), split)
    if isinstance(found, list):
        places, rows = [], []
        for place, row in read_rows(source, split):
            if isinstance(row, UserError):
                raise UserError(located(place, row))
            places.append(place)
            rows.append(usable(row))
        return table_of(rows, places)
    if not len(found):
        raise UserError(f"{source} has no rows: it is empty")
    return found


def read_rows(source: str | Path, split: str | None = None) -> Iterator[Item]:
    """(place, row or error) of each row of such a source, read lazily, with unchanged values.

    Raises UserError for a source that is missing, empty or damaged as a whole.
    """
    yield from SourceTable.find(source, split).rows()


@dataclass(frozen=True)
class SourceTable:
    """A table that has been found and can be read."""

    source: str
    split: str | None
    found: list[Path] | datasets.Dataset = field(repr=False)
    """Its files, or the data set that it is."""

    @classmethod
    def find(cls, source: str | Path, split: str | None = None) -> SourceTable:
        """Find a table. Raises UserError if it is missing."""
        return cls(str(source), split, _found(source, split))

    @property
    def files(self) -> list[Path]:
        """The files that hold it; none if it is in memory."""
        if isinstance(self.found, list):
            return self.found
        return [Path(file["filename"]) for file in self.found.cache_files]

    def rows(self) -> Iterator[Item]:
        """(place, row or error), read lazily. Raises UserError for a table that is empty or damaged as a whole."""
        if isinstance(self.found, list):
            rows: Iterator[Item] = itertools.chain.from_iterable(map(file_rows, self.found))
            if _is_sliced(self.split):
                rows = _sliced(rows, self.found, str(self.split))
        else:
            rows = batch_rows(self.found.with_format("arrow").iter(BATCH), self.source)
        first = next(rows, None)
        if first is None:
            where = f" in {self.split}" if _is_sliced(self.split) else ": it is empty"
            raise UserError(f"{self.source} has no rows{where}")
        yield from itertools.chain([first], rows)


def chunks(items: Iterator[Item], size: Callable[[], int]) -> Iterator[list[Item]]:
    """The items, ``size()`` at a time. Items before an error are yielded before it is raised."""
    while True:
        chunk: list[Item] = []
        try:
            chunk.extend(itertools.islice(items, size()))
        except UserError:
            if chunk:
                yield chunk
            raise
        if not chunk:
            return
        yield chunk


def good_rows(items: Iterable[Item], bad: BadRows) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of the rows that can be read; the others are handled by ``bad``."""
    for place, row in items:
        bad.rows += 1
        if isinstance(row, UserError):
            bad.refuse(place, row)
        else:
            yield place, row


def read_parquet(path: Path) -> datasets.Dataset:
    """The rows of a Parquet file, memory-mapped through the cache of `datasets`. Raises UserError if it is damaged."""
    require_data(path)
    try:
        names = pa.parquet.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {first_line(error)}") from None
    require_distinct(names, str(path))
    try:
        with quiet():
            return datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # parsers of its metadata raise many kinds, all about this file
        raise UserError(f"{path} is not a readable Parquet file: {first_line(error)}") from None


def table_of(rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> datasets.Dataset:
    """Rows as a data set; a column that a row lacks is null there. ``places`` names the rows in errors.

    Raises UserError naming the first value whose type does not fit the earlier values of its column.
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
                f"{places[bad]}: column {name!r} holds a value ({kind}) that does not fit the earlier rows: "
                "give a column one type"
            ) from None
    return datasets.Dataset(pa.table(columns))


@contextmanager
def quiet() -> Iterator[None]:
    """A context without progress bars from `datasets`."""
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _is_local(source: str | Path) -> bool:
    """Whether a source is, or looks like, something on this machine."""
    path, name = path_of(source), str(source)
    return path.exists() or is_pattern(name) or bool(kind_of_file(path)) or path.is_absolute() or name.startswith(".")


def _found(source: str | Path, split: str | None) -> list[Path] | datasets.Dataset:
    """The files of a source, or the data set that it is, whichever slice of a split is requested."""
    path = path_of(source)
    if not str(source).strip():
        raise UserError(f"the name of the data is empty: {GIVE}")
    if not _is_local(source):
        return _read_hub(str(source), split)
    if path.is_file():
        return [path]
    if path.is_dir():
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        return _read_saved(path, split) if saved else _shards(path, split)
    if is_pattern(str(source)):
        if files := data_files(source):
            return files
        raise UserError(f"{source} matches no file: {GIVE}")
    raise UserError(f"{path} does not exist: {GIVE}")


def _read_saved(path: Path, split: str | None) -> datasets.Dataset:
    try:
        rows = datasets.load_from_disk(path)
    except Exception as error:  # damaged files raise many kinds
        raise UserError(f"{path} is not a readable saved data set: {first_line(error)}") from None
    return _part(rows[_chosen(path, list(rows), split)] if isinstance(rows, datasets.DatasetDict) else rows, split)


def _shards(path: Path, split: str | None) -> list[Path]:
    """The data files in a folder; if their names indicate several splits, those of the requested one."""
    files = data_files(path)
    if not files:
        raise UserError(f"{path} is a folder without data: {GIVE}")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(path)) or "", []).append(file)
    if list(splits) != [""]:
        splits.pop("", None)  # files beside the splits belong to none of them
        files = splits[_chosen(path, list(splits), split)]
    if len(folders := list(dict.fromkeys(str(file.parent.relative_to(path)) for file in files))) > 1:
        raise UserError(f"{path} has data in several folders ({', '.join(folders)}): name one of them, or a pattern")
    if len(kinds := sorted({kind_of_file(file) for file in files})) > 1:
        raise UserError(
            f"{path} has data of several kinds ({', '.join(kinds)}): give a pattern such as {path}/*{kinds[0]}"
        )
    return files


def _split_of(file: Path) -> str | None:
    """The split that a file's name, or else the name of its folder, indicates."""
    stem = file.name.partition(".")[0]
    if shard := re.fullmatch(r"(.+?)-\d{5}-of-\d{5}(-\w+)?", stem):
        return _SPLITS.get(shard[1], shard[1])
    for part in (stem, *reversed(file.parent.parts)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def _chosen(where: object, splits: Sequence[str], split: str | None) -> str:
    name = split.partition("[")[0] if split is not None else None
    if name is None and len(splits) == 1:
        return splits[0]
    if name not in splits:
        asked = "" if name is None else f" and no {name!r}"
        split_s = "split" if len(splits) == 1 else "splits"
        raise UserError(f"{where} has the {split_s} {', '.join(splits)}{asked}: say which with split")
    return str(name)


def _is_sliced(split: str | None) -> bool:
    return split is not None and "[" in split


def _indices(split: str, length: int) -> range:
    """The rows that ``train[:100]`` asks for."""
    try:
        instruction = datasets.ReadInstruction.from_spec(split)
        (part,) = instruction.to_absolute({split.partition("[")[0]: length})
    except (ValueError, AssertionError) as error:
        raise UserError(f"split {split!r}: {first_line(error)}") from None
    return range(part.from_ or 0, length if part.to is None else part.to)


def _sliced(rows: Iterator[Item], files: Sequence[Path], split: str) -> Iterator[Item]:
    """The rows of a slice such as ``train[:100]``. The files are read twice, because a slice may need their number."""
    length = sum(1 for _ in itertools.chain.from_iterable(map(file_rows, files)))
    part = _indices(split, length)
    yield from itertools.islice(rows, part.start, part.stop)


def _part(rows: datasets.Dataset, split: str | None) -> datasets.Dataset:
    return rows.select(_indices(str(split), len(rows))) if _is_sliced(split) else rows


def _joined(files: Sequence[Path]) -> datasets.Dataset:
    tables = [read_parquet(file) for file in files]
    try:
        return datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
    except ValueError as error:
        raise UserError(f"{files[0]} and the files after it have other columns or types: {first_line(error)}") from None


def _read_hub(name: str, split: str | None) -> datasets.Dataset:
    repo, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repo, config or None, split=split)
    except ConnectionError as error:
        raise UnreachableError(_hub_message(repo, error)) from None
    except Exception as error:  # the Hub's client and its parsers raise many kinds, all about the named data set
        raise UserError(_hub_message(repo, error)) from None
    if isinstance(rows, datasets.DatasetDict):
        if len(rows) > 1:
            raise UserError(f"{name} has the splits {', '.join(rows)}: say which with split")
        (rows,) = rows.values()
    return rows


def _hub_message(repo: str, error: Exception) -> str:
    message = first_line(error)
    if "onfig name is missing" in message:
        names = str(error).partition("[")[2].partition("]")[0]
        return f"{repo} has several configurations: write {repo}:NAME with one of {names}"
    return f"{repo} is neither a file here nor a data set that the Hub gives ({message}): check the name, or {GIVE}"


def _first_misfit(values: list[Any]) -> int:
    return bisect_left(range(len(values)), True, key=lambda end: not _is_column(values[: end + 1]))


def _is_column(values: list[Any]) -> bool:
    try:
        pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeError):
        return False
    return True
