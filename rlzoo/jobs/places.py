"""Where things lie in the folder of a run, for the run and for programs that look on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

RECORD, STATE, LOCK = "run.json", ".state", "lock"
JOURNAL = "journal"
"""The folder, in that of the state, of what the run's tasks are doing: see `rlzoo.jobs.journal`."""
ENDED = "ended.json"
"""The file in the journal that says why an unfinished run is not running."""


def result_file(folder: Path, name: str) -> Path:
    """The file of a cached result."""
    return folder / f"{quote(name, safe='')}.result"


def result_of(content: bytes) -> Any:
    """The result in a file that `packed` made; None if it is damaged."""
    checksum, _, text = content.partition(b"\n")
    if checksum.decode("ascii", "replace") != hashlib.sha256(text).hexdigest():
        return None
    return json.loads(text)


def packed(result: Any) -> str:
    """A result as JSON after its checksum. Raises TypeError for one that JSON cannot represent."""
    text = json.dumps(result)
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def journal_file(state: Path, name: str) -> Path:
    """The file of a task's journal."""
    return state / JOURNAL / f"{quote(name, safe='')}.jsonl"
