"""Runs and their folders: one process at a time writes to a folder, and an interrupted run resumes.

During a run, the subfolder ``.state`` holds the run's identity and its cached results, from which the same command
resumes. At the end, the folder holds the results, and ``.state`` is removed.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import platform
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from rlzoo.errors import TryAgainError, UserError
from rlzoo.jobs.outputs import remove, remove_partial, write_atomically
from rlzoo.jobs.places import ENDED, JOURNAL, LOCK, RECORD, STATE
from rlzoo.jobs.ranks import agreed, is_main, world_size
from rlzoo.jobs.sharing import CARD
from rlzoo.jobs.sources import data_files, kind_of_file, path_of
from rlzoo.registry import one_line

PACKAGES = ("rlzoo", "torch", "transformers", "datasets", "accelerate", "numpy", "scipy", "math-verify")
WORTH_KEEPING = 60.0
"""Work of at least this many seconds is kept even if it failed because of a mistake."""
_CODE = {".py", ".yaml", ".yml"}
_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}
"""Errors of the operating system that come from writing, wherever they are raised."""


@dataclass
class Run:
    """A command's output, locked for this process."""

    folder: Path
    """The output: a folder, or a file."""
    state: Path
    """The folder of checkpoints and cached results."""
    finished: bool = False
    """Whether the results exist already."""
    resumed: bool = False
    """Whether it continues an interrupted run."""
    to_be_continued: bool = False
    """Set by the caller if some of the work failed: the same command then retries it."""


@contextmanager
def run_in(
    path: Path, command: str, settings: Mapping[str, Any], kind: Literal["folder", "whole"] = "folder"
) -> Iterator[Run]:
    """Lock ``path`` for the results of ``command`` with these settings (plain data).

    ``kind`` is "folder" for files in a folder, and "whole" for a single file or folder that is written at the end. An
    unfinished run with the same settings is resumed; for a finished folder, ``finished`` is true. If the work fails
    before anything is stored under ``state``, or early and because of a mistake, nothing is left behind; otherwise a
    note on the exception says how to resume. Raises UserError if the path holds anything else, is in use, or cannot be
    written.
    """
    if not is_main():
        yield agreed(Run(path, path))
        return
    state = path / STATE if kind == "folder" else path.parent / f".{path.name}{STATE}"
    identity = _identity(command, settings, path)
    if (record := _read(path / RECORD)) is not None:
        _check_same(path, record, identity, "finished")
        remove(state)  # the process may have been killed while removing it
        yield agreed(Run(path, state, finished=True))
        return
    missing = _made(path, state, kind)
    with _locked(state / LOCK, path):
        record = _read(state / RECORD) if _holds_work(state) else None
        resumed = record is not None
        if record is not None:
            _check_same(path, record, identity, "unfinished")
        else:
            _clear(state)
            write_atomically(state / RECORD, json.dumps(identity, indent=1))
        remove_partial(path)
        remove(state / JOURNAL / ENDED)
        started = time.monotonic()
        try:
            # the output exists if the process was killed between the last write and the clean-up
            run = agreed(Run(path, state, kind == "whole" and _is_taken(path), resumed))
            yield run
            if run.to_be_continued:
                return
            if path.is_dir():
                finished = {**identity, "finished": datetime.now(UTC).isoformat(timespec="seconds")}
                write_atomically(path / RECORD, json.dumps(finished, indent=1))
            remove(state)
        except BaseException as error:
            reason = _of_the_system(error, path)
            # with several processes, anything but a UserError may be a consequence of what happened to another one
            wrong = UserError if world_size() > 1 else Exception
            mistake = isinstance(error, wrong) and reason is None and not isinstance(error, TryAgainError)
            if _holds_work(state) and not (mistake and time.monotonic() - started < WORTH_KEEPING):
                error.add_note(f"finished work is kept: the same command with --out {path} resumes there")
                _record_end(state, error, reason)
            else:
                _undo(path, state, missing)
            if reason is not None:
                raise UserError("; ".join([reason, *getattr(error, "__notes__", [])])) from error
            raise


def _record_end(state: Path, error: BaseException, reason: str | None) -> None:
    """Record why a run whose work is kept is not running, for those who look on; null: it was interrupted."""
    told = reason or (str(error) if isinstance(error, UserError) else one_line(error))
    with suppress(OSError):
        why = None if isinstance(error, KeyboardInterrupt) else told
        write_atomically(state / JOURNAL / ENDED, json.dumps({"error": why}))


def _of_the_system(error: BaseException, path: Path) -> str | None:
    """An error of the operating system in one line, such as that the disk of ``path`` is full; None for any other."""
    if isinstance(error, OSError):
        names = [name for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
        if error.errno not in _OF_WRITING and not any(_is_of(Path(os.fsdecode(name)), path) for name in names):
            return one_line(error)  # of a server, or of a file that a plug-in reads
        reason = error.strerror or str(error)
    elif isinstance(error, Exception) and (number := re.search(r"\(os error (\d+)\)", str(error))):  # safetensors
        reason = os.strerror(int(number[1]))
    else:
        return None
    return f"--out {str(path)!r} cannot be written ({reason})"


def _is_of(file: Path, path: Path) -> bool:
    """Whether a file is in the output ``path``, or is written beside it for the time being."""
    whole = file.absolute()
    return whole.is_relative_to(path.absolute()) or any(part.startswith(f".{path.name}.") for part in whole.parts)


def unfinished(folder: Path, prefix: str, command: str, settings: Mapping[str, Any]) -> Path | None:
    """The newest folder ``folder``/``prefix``-… with an unfinished run of this command that is not in use, or None."""
    for path in sorted(folder.glob(f"{prefix}-*"), reverse=True):
        if _read(path / STATE / RECORD) == _identity(command, settings, path):
            with suppress(InUseError), _locked(path / STATE / LOCK, path):
                return path
    return None


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class InUseError(UserError):
    """Another process holds the lock."""


def _identity(command: str, settings: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Everything that must be unchanged for a run to resume. A word of the settings may be the name of its output."""
    plain = json.loads(json.dumps(settings))
    files = {
        name: found for name, found in _files(plain).items() if not Path(name).absolute().is_relative_to(out.absolute())
    }
    return {"command": command, "settings": plain, "files": files, "versions": versions()}


def _files(value: Any) -> dict[str, list[Any]]:
    """The sizes and modification times of the data, models and modules that the settings name."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return {name: found for part in value for name, found in _files(part).items()}
    if not isinstance(value, str) or len(value) > 4096 or "\0" in value:
        return {}
    of_code = re.match(r"(?:\w+:)?(.+\.py)[:@]", value)  # file.py:Name, inspect:file.py@name
    path = path_of(of_code[1] if of_code else value)
    try:
        if path.suffix in _CODE and path.is_file():
            files = [path]
        elif (path / "config.json").is_file() or (path / "state.json").is_file():
            files = sorted(p for p in path.iterdir() if p.is_file() and p.name != CARD)  # which anybody may edit
        else:
            files = data_files(value) if value and (kind_of_file(path) or path.is_dir()) else []
        return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    except OSError:
        return {}


def _check_same(path: Path, record: Mapping[str, Any], identity: Mapping[str, Any], what: str) -> None:
    for part in ("command", "settings", "files", "versions"):
        if told := difference(record.get(part), identity[part], part):
            raise UserError(
                f"--out {str(path)!r} already holds another run, {what} ({told}): give another name, or remove it"
            )


def changed_file(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """A file that settings name and that has changed since the run of ``folder``; None without one, or a record."""
    there = (_read(folder / RECORD) or {}).get("files", {})
    here = {name: found for name, found in _files(json.loads(json.dumps(settings))).items() if name in there}
    return next((f"{name} has changed since" for name, found in here.items() if found != there[name]), None)


def difference(there: Any, here: Any, name: str) -> str | None:
    """A description of the first difference between two trees of plain data; None if they are equal."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in [*here, *(k for k in there if k not in here)]:
            inner = key if name in ("settings", "files", "versions") else f"{name}.{key}"
            if found := difference(there.get(key), here.get(key), inner):
                return found
        return None
    return None if there == here else f"{name}: {there!r:.60} there, {here!r:.60} here"


def _made(path: Path, state: Path, kind: str) -> list[Path]:
    """Make the folders of a run, and return the new ones. Raises UserError if ``path`` is taken or not writable."""
    try:
        if _is_taken(path) and not state.exists():
            raise UserError(f"--out {str(path)!r} exists already: give another name, or remove it")
        whole = state.absolute()
        missing = [p for p in (*reversed(whole.parents), whole) if not p.exists()]
        state.mkdir(parents=True, exist_ok=True)
        probe = path / ".probe" if kind == "folder" else path.parent / f".{path.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {str(path)!r} cannot be written ({error.strerror}): give another place") from None
    return missing


def _undo(path: Path, state: Path, missing: list[Path]) -> None:
    """Restore the previous state of ``path``: an existing empty folder stays, as do other runs in folders made here."""
    whole = path.absolute()
    remove(state)
    for place in [path] if whole in missing or not path.is_dir() else list(path.iterdir()):
        remove(place)
    for parent in reversed([p for p in missing if p in whole.parents]):
        with suppress(OSError):
            parent.rmdir()


def _clear(state: Path) -> None:
    for place in state.iterdir():
        if place.name != LOCK:
            remove(place)


def _is_taken(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _holds_work(state: Path) -> bool:
    return state.is_dir() and any(p.name not in (RECORD, LOCK, JOURNAL) for p in state.iterdir())


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def _locked(file: Path, path: Path) -> Iterator[None]:
    """Hold the lock of a run, which the system releases when a process dies. Raises InUseError if it is taken."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
                os.close(descriptor)
                raise InUseError(
                    f"--out {str(path)!r} is in use by {holder}: wait for it, or give another name"
                ) from None
            # the file system has no locks: the user must not start two runs there
        with suppress(OSError):
            if file.stat().st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # the run that held it has removed it: make a new one
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {now}".encode())
    try:
        yield
    finally:
        os.close(descriptor)


def place(prefix: str, command: str, settings: Mapping[str, Any]) -> Path:
    """The newest folder runs/<prefix>-<time> in which this command was interrupted, or else a new one."""
    found = unfinished(Path("runs"), prefix, command, settings) if is_main() else None
    fresh = Path("runs") / f"{prefix}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    names = (fresh.with_name(f"{fresh.name}-{number}") if number > 1 else fresh for number in itertools.count(1))
    return agreed(found or next(path for path in names if not path.exists()))
