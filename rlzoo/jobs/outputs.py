"""Files that are whole or not there: written beside their place, synced to the disk, then renamed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"
"""How names end of what is being written; a process that is killed may leave some."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which takes the place of ``path`` at the end, unless something raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL) as scratch:
        beside = Path(scratch) / path.name
        yield beside
        for file in [p for p in beside.rglob("*") if p.is_file()] if beside.is_dir() else [beside]:
            _sync(file)
        for folder in [beside, *beside.rglob("*")]:
            if folder.is_dir():
                _sync(folder)
        if path.is_dir():  # a folder cannot be renamed onto one that holds files
            path.rename(Path(scratch) / "replaced")
        beside.replace(path)
        _sync(path.parent)


def write_atomically(path: Path, content: str) -> None:
    """Write a text file that no reader sees half of, whatever happens to this process or the machine."""
    with replacing(path) as beside:
        beside.write_text(content, encoding="utf-8", errors="replace")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_partial(path: Path) -> None:
    """Remove what processes that were killed had half written into the folder ``path``, or had to put in its place."""
    own = re.compile(rf"\.{re.escape(path.name)}\.[^.]*{re.escape(PARTIAL)}")
    beside = [place for place in path.parent.iterdir() if own.fullmatch(place.name)]
    for place in [*beside, *path.rglob(f".*{PARTIAL}")]:
        remove(place)


def remove(place: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
