"""Cached results of long work: each is a file of plain data with a checksum."""

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
    """Cached results in a folder, by name. All processes of a distributed run share them; the main one writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """The cached result, or else that of ``work``, which is then cached; after JSON, so tuples are lists.

        All processes must call this. Raises TypeError for a result that JSON cannot represent.
        """
        if (found := agreed(self.read(name))) is not None:
            return found
        result = work()
        return agreed(self.write(name, result) if is_main() else None)

    def read(self, name: str) -> Any:
        """A cached result; None if there is none or its file is damaged."""
        try:
            checksum, _, content = self._file(name).read_bytes().partition(b"\n")
        except OSError:
            return None
        if checksum.decode("ascii", "replace") != hashlib.sha256(content).hexdigest():
            return None
        return json.loads(content)

    def write(self, name: str, result: Any) -> Any:
        """Cache a result, and return it as `read` will. Raises TypeError for a result that JSON cannot represent."""
        content = json.dumps(result)
        write_atomically(self._file(name), f"{hashlib.sha256(content.encode()).hexdigest()}\n{content}")
        return json.loads(content)

    def within(self, name: str) -> CachedResults:
        """A subfolder for the intermediate results of one result."""
        return CachedResults(self.folder / quote(name, safe=""))

    def _file(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.result"


def random_state(plain: Any) -> Any:
    """The state of a `random.Random`, restored from JSON."""
    version, numbers, gauss = plain
    return version, tuple(numbers), gauss
