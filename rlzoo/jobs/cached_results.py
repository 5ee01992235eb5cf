"""Cached results of long work: each is a file of plain data with a checksum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rlzoo.jobs.outputs import write_atomically
from rlzoo.jobs.places import packed, result_file, result_of
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
            return result_of(result_file(self.folder, name).read_bytes())
        except OSError:
            return None

    def write(self, name: str, result: Any) -> Any:
        """Cache a result, and return it as `read` will. Raises TypeError for a result that JSON cannot represent."""
        content = packed(result)
        write_atomically(result_file(self.folder, name), content)
        return json.loads(content.partition("\n")[2])

    def within(self, name: str) -> CachedResults:
        """A subfolder for the intermediate results of one result."""
        return CachedResults(self.folder / quote(name, safe=""))


def random_state(plain: Any) -> Any:
    """The state of a `random.Random`, restored from JSON."""
    version, numbers, gauss = plain
    return version, tuple(numbers), gauss
