"""Pieces of work that are done once: each result is a file of plain data that vouches for itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rlzoo.jobs.outputs import write_atomically
from rlzoo.jobs.ranks import agreed, is_main


class CachedResults:
    """The results in a folder, by name. All processes of a distributed run use it together; the main one writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """What ``work`` gave back when it was done first, as JSON holds it: tuples are lists."""
        if (found := agreed(self.read(name))) is not None:
            return found
        result = work()
        return agreed(self.write(name, result) if is_main() else None)

    def read(self, name: str) -> Any:
        """A result; None if there is none, or if its file is damaged, which is to say that the work is not done."""
        try:
            checksum, _, content = self._file(name).read_bytes().partition(b"\n")
        except OSError:
            return None
        if checksum.decode("ascii", "replace") != hashlib.sha256(content).hexdigest():
            return None
        return json.loads(content)

    def write(self, name: str, result: Any) -> Any:
        """Keep a result; gives it back as it will be read. Raises TypeError for what JSON cannot hold."""
        content = json.dumps(result)
        write_atomically(self._file(name), f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}")
        return json.loads(content)

    def within(self, name: str) -> CachedResults:
        """A folder of its own for the pieces of one piece."""
        return CachedResults(self.folder / quote(name, safe=""))

    def _file(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.result"


def random_state(plain: Any) -> Any:
    """The state of a `random.Random`, from what JSON made of it."""
    version, numbers, gauss = plain
    return version, tuple(numbers), gauss
