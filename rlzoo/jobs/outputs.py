"""Atomic writes: to a temporary file beside the target, synced to the disk, then renamed."""

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
"""The suffix of temporary files, which a killed process may leave behind."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file or folder to; it replaces ``path`` at the end, unless an exception is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL) as scratch:
        beside = Path(scratch) / path.name
        yield beside
        for file in [p for p in beside.rglob("*") if p.is_file()] if beside.is_dir() else [beside]:
            _sync(file)
        for folder in [beside, *beside.rglob("*")]:
            if folder.is_dir():
                _sync(folder)
        if path.is_dir():  # a folder cannot be renamed onto one that is not empty
            path.rename(Path(scratch) / "replaced")
        beside.replace(path)
        _sync(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically, even if the process is killed or the machine crashes; text as UTF-8."""
    with replacing(path) as beside:
        beside.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_partial(path: Path) -> None:
    """Remove temporary files that killed processes left in the folder ``path``, or beside it."""
    own = re.compile(rf"\.{re.escape(path.name)}\.[^.]*{re.escape(PARTIAL)}")
    beside = [place for place in path.parent.iterdir() if own.fullmatch(place.name)]
    for place in [*beside, *path.rglob(f".*{PARTIAL}")]:
        remove(place)


def remove(place: Path) -> None:
    """Remove a file or folder, if it exists."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
