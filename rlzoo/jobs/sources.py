"""The files of a data source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Compressions of text files."""


def path_of(source: str | Path) -> Path:
    """The path that a source names on this machine, with ``~`` and ``~user`` replaced by the home folder."""
    try:
        return Path(source).expanduser()
    except RuntimeError:  # no such user: a file of that name
        return Path(source)


def kind_of_file(path: Path) -> str:
    """The suffix of a file's format, without that of its compression; "" if it is not in `SUFFIXES`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    kind = {".ndjson": ".jsonl"}.get(kind, kind)
    return kind if kind in SUFFIXES else ""


def data_files(source: str | Path) -> list[Path]:
    """The local data files of a file, folder or pattern, in order; empty for any other kind of source."""
    path = path_of(source)
    if path.is_dir():
        found = path.rglob("*")
        files = iter([f for f in found if not any(part.startswith(".") for part in f.relative_to(path).parts)])
    elif path.is_file():
        files = iter([path])
    elif is_pattern(str(source)):
        files = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    else:
        return []
    try:
        return sorted((f for f in files if kind_of_file(f) and f.name not in _NO_DATA and f.is_file()), key=_order)
    except (ValueError, OSError):  # not a pattern of files
        return []


def is_pattern(name: str) -> bool:
    """Whether a name is a pattern of file names, and not that of an existing file."""
    return any(mark in name for mark in "*?[") and not path_of(name).exists()


def _order(path: Path) -> list[Any]:
    """A sort key with part-2 before part-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]
