"""Encoded rows on disk: memory stays flat whatever their number, and a table is tokenised only once.

They are kept in the folder ``rlzoo`` of the cache of `datasets` (``HF_DATASETS_CACHE``), under a key of everything that
their tokens depend on: the content of the table's files, the tokenizer and its template, the settings, and the code
that reads and encodes. `datasets.disable_caching` turns this cache off too. What has not been used for `KEPT_DAYS` is
removed when another table is added, for `datasets` removes nothing but the files of a data set that is at hand.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import datasets
import pyarrow as pa
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import MemoryMappedTable

from rlzoo.buffers import storage
from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.checks import checked
from rlzoo.buffers.schema import CHUNK, SCHEMA, to_dataset, to_tables
from rlzoo.errors import UserError
from rlzoo.jobs.outputs import PARTIAL, file_digest, write_atomically

BATCH = 1000
"""How many rows are Python objects at a time."""
KEPT_DAYS = 30
"""Days without use after which the rows of a table are removed."""
_LIBRARIES = ("datasets", "jinja2", "pyarrow", "tokenizers", "transformers")
_ATTRIBUTES = ("chat_template", "special_tokens_map", "split_special_tokens", "clean_up_tokenization_spaces")


def folder() -> Path:
    """The folder in which encoded rows are kept."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "rlzoo"


def key(files: Sequence[Path], tokenizer: Any, settings: Mapping[str, Any]) -> str | None:
    """The key of a table's encoded rows; None if they cannot be cached, or caching is off.

    Rows in memory cannot be cached, nor can those of a tokenizer other than a fast one of transformers, because its own
    code may do anything.
    """
    if not files or not datasets.is_caching_enabled() or not type(tokenizer).__module__.startswith("transformers."):
        return None
    if not getattr(tokenizer, "is_fast", False):
        return None
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    own = {name: value for name, value in backend.items() if name not in ("truncation", "padding")}  # of the last call
    known = {name: repr(getattr(tokenizer, name, None)) for name in _ATTRIBUTES}
    dated = "strftime_now" in known["chat_template"]  # Llama's template contains the date
    parts = [
        settings,
        [file_digest(file) for file in files],
        [type(tokenizer).__name__, own, known, datetime.date.today().isoformat() if dated else None],
        [_code(), *map(version, _LIBRARIES)],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """A digest of the modules that read and encode rows."""
    here = Path(__file__).parent
    files = [
        *sorted(here.glob("*.py")),
        *(here.parent / "policy" / f"{name}.py" for name in ("chat", "encoding", "turns")),
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def find(name: str | None, bad: BadRows) -> datasets.Dataset | None:
    """The rows cached under a key, with their counts restored to ``bad``; None if they are missing or damaged."""
    if name is None:
        return None
    try:
        entry = json.loads((folder() / f"{name}.json").read_text(encoding="utf-8"))
        rows = folder() / entry["file"]
        if file_digest(rows) != entry["sha256"]:
            return None
        bad.restore(entry["bad_rows"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    with suppress(OSError):  # it may be another user's
        for file in (folder() / f"{name}.json", rows):
            os.utime(file)  # which says when it was used last
    return _mapped(rows)


def _remove_unused() -> None:
    """Remove the files that have not been used for `KEPT_DAYS`, and what killed processes have left."""
    for file in folder().iterdir():
        with suppress(OSError):  # another process removes it too, or it is another user's
            if file.is_file() and file.stat().st_mtime < time.time() - KEPT_DAYS * 86_400:
                file.unlink()


def spooled(rows: Iterable[dict[str, Any]], name: str | None = None, bad: BadRows | None = None) -> datasets.Dataset:
    """Rows as a data set with checked values, cached under the key ``name`` with the counts of ``bad``.

    Without a name, few rows stay in memory; many go to an unnamed file, which disappears with its last user. Raises
    UserError for an invalid value.
    """
    tables, name = to_tables(rows, BATCH), name if _is_writable() else None
    first = list(islice(tables, CHUNK // BATCH + 1)) if name is None else []
    if name is None and len(first) <= CHUNK // BATCH:
        return checked(to_dataset(pa.concat_tables(first or [SCHEMA.arrow_schema.empty_table()])), "the data set")
    return _written(chain(first, tables), name, bad)


def _written(tables: Iterator[pa.Table], name: str | None, bad: BadRows | None) -> datasets.Dataset:
    """Tables in a file, which is written under a temporary name, checked, and then renamed."""
    where = folder() if _is_writable() else Path(tempfile.gettempdir())
    file = where / f".rows-{uuid4().hex}{PARTIAL}"
    try:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA.arrow_schema) as stream:
            for table in tables:
                _write(stream, table, where)
        found = checked(_mapped(file), "the data set")
        storage.release_pages(found)
        if name is None:
            return found
        digest = file_digest(file)
        kept = where / f"{name}-{digest[:16]}.arrow"
        file.replace(kept)
        entry = {"file": kept.name, "sha256": digest, "bad_rows": (bad or BadRows()).to_json()}
        write_atomically(where / f"{name}.json", json.dumps(entry))
        _remove_unused()
        return _mapped(kept)
    finally:
        file.unlink(missing_ok=True)


def _write(stream: Any, table: pa.Table, where: Path) -> None:
    try:
        stream.write_table(table)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"encoded rows cannot be written to {where} ({reason}): make room, or set HF_DATASETS_CACHE"
        ) from None


def _mapped(file: Path) -> datasets.Dataset:
    return datasets.Dataset(MemoryMappedTable.from_file(str(file)), fingerprint=generate_random_fingerprint())


def _is_writable() -> bool:
    """Whether the cache can be written to; a cluster's nodes may share one that they only read."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder(), os.W_OK)
