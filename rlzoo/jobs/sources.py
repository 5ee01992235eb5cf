"""The files that the name of a source of data stands for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""What may follow the ending of a file of text."""


def kind_of_file(path: Path) -> str:
    """The ending that says what a file holds, without that of a compression; "" if it is none of `SUFFIXES`."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    kind = {".ndjson": ".jsonl"}.get(kind, kind)
    return kind if kind in SUFFIXES else ""


def data_files(source: str | Path) -> list[Path]:
    """The files on this machine that a source names, whatever their split, in order; none for any other source."""
    path = Path(source)
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
    except (ValueError, OSError):  # no pattern of files
        return []


def is_pattern(name: str) -> bool:
    """Whether a name is a pattern of file names."""
    return any(mark in name for mark in "*?[") and not Path(name).exists()


def _order(path: Path) -> list[Any]:
    """Sorts part-2 before part-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]
