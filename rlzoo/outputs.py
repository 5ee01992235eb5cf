"""Where a command writes: claimed before the work starts, and left as it was if the work fails."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from rlzoo.errors import UserError


@contextmanager
def new_output(path: Path, kind: Literal["folder", "file"] = "folder") -> Iterator[None]:
    """Claim a new folder, or the place of a new file, for the work inside the ``with``.

    Missing parents are made. If the work raises, nothing that was made or written is left behind. Raises UserError
    if ``path`` is there already (a folder may be, if it is empty) or cannot be written.
    """
    try:
        if path.exists() and (kind == "file" or not path.is_dir() or any(path.iterdir())):
            raise UserError(f"--out {str(path)!r} exists already: give another name, or remove it")
        whole = path.absolute()
        missing = [p for p in (*reversed(whole.parents), whole) if not p.exists()]
        (path if kind == "folder" else path.parent).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {str(path)!r} cannot be created ({error.strerror}): give another place") from None
    try:
        _probe(path / ".probe" if kind == "folder" else path)
        yield
    except BaseException:
        for place in [path] if whole in missing else list(path.iterdir()):
            _remove(place)
        for parent in reversed([p for p in missing if p != whole]):
            with suppress(OSError):  # somebody else's results may be in it by now
                parent.rmdir()
        raise


def write_atomically(path: Path, content: str) -> None:
    """Write a text file through a temporary one in the same folder, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", errors="replace", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
        except BaseException:
            temporary.unlink()
            raise
    temporary.chmod(0o644)
    temporary.replace(path)


def _probe(file: Path) -> None:
    """Write and remove a file, to know before the work that its results can be written."""
    try:
        file.touch(exist_ok=False)
        file.unlink()
    except OSError as error:
        where = str(file.parent)
        raise UserError(f"--out: {where!r} cannot be written to ({error.strerror}): give another place") from None


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
