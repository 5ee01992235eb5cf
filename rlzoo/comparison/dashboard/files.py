"""The files of a folder that another process may be writing: read only, and never through a link that leads out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Signature = tuple[int, int, int]
"""Inode, size and modification time in nanoseconds: what tells a file from the one that replaced it."""


def signature(file: Path) -> Signature | None:
    """The signature of a file; None if there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class WatchedFolder:
    """A folder and what was read of it: a file is read again only when it has changed."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._kept: dict[Path, tuple[Signature, Any]] = {}
        self._tails: dict[Path, tuple[int, int, Any]] = {}

    def path(self, *parts: str) -> Path | None:
        """A file or folder inside; None if there is none, or if a link on the way leads outside."""
        place = self.root.joinpath(*parts)
        try:
            inside = place.resolve(strict=True).is_relative_to(self.root)
        except (OSError, RuntimeError):
            return None
        return place if inside else None

    def names(self, *parts: str) -> list[str]:
        """The names in a folder inside, in order; none if it does not exist."""
        folder = self.path(*parts)
        try:
            return sorted(place.name for place in folder.iterdir()) if folder is not None else []
        except OSError:
            return []

    def read(self, parse: Callable[[bytes], T | None], *parts: str) -> T | None:
        """What ``parse`` makes of a file's content; None if there is no file.

        Of a file that ``parse`` rejects (by None or a ValueError), what was last made of it.
        """
        file = self.path(*parts)
        now = None if file is None else signature(file)
        if file is None or now is None:
            self._kept.pop(self.root.joinpath(*parts), None)
            return None
        before = self._kept.get(file)
        if before is None or before[0] != now:
            try:
                found = parse(file.read_bytes())
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                found = None
            if found is None and before is not None:
                found = before[1]
            self._kept[file] = now, found
        kept: T | None = self._kept[file][1]
        return kept

    def json(self, *parts: str) -> dict[str, Any] | None:
        """The object in a JSON file; None if there is none."""
        return self.read(lambda content: _object(json.loads(content)), *parts)

    def lines(self, fresh: Callable[[], T], add: Callable[[T, dict[str, Any]], None], *parts: str) -> T | None:
        """What ``add`` makes, from ``fresh``, of the JSON objects in the lines of a file; None if there is no file.

        Only new lines are read. A line without its end is being written, or was when the writer was killed.
        """
        file = self.path(*parts)
        now = None if file is None else signature(file)
        if file is None or now is None:
            self._tails.pop(self.root.joinpath(*parts), None)
            return None
        inode, start, found = self._tails.get(file, (now[0], 0, None))
        if found is None or inode != now[0] or now[1] < start:
            start, found = 0, fresh()
        if now[1] > start:
            try:
                with file.open("rb") as stream:
                    stream.seek(start)
                    content = stream.read()
            except OSError:
                content = b""
            whole = content[: content.rfind(b"\n") + 1]
            for line in whole.splitlines():
                try:
                    add(found, _object(json.loads(line)))
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    continue  # what a killed process left before the line of the one that resumed
            start += len(whole)
        self._tails[file] = now[0], start, found
        read: T = found
        return read


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError
    return value
