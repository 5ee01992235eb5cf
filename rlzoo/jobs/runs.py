"""A run and its folder: one runner at a time, gone on with where it stopped, and whole when it is called finished.

While a run is under way the folder ``.state`` in it holds what it has done so far, and says what it is. The same
command resumes there. At the end the results lie in the folder, and ``.state`` is gone.
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

from rlzoo.errors import UserError
from rlzoo.jobs.outputs import remove, remove_partial, write_atomically
from rlzoo.jobs.ranks import agreed, is_main
from rlzoo.jobs.sources import data_files, kind_of_file

PACKAGES = ("rlzoo", "torch", "transformers", "datasets", "accelerate", "numpy", "scipy", "math-verify")
WORTH_KEEPING = 60.0
"""Seconds of work that are kept even if it failed on something that has to be fixed."""
_RECORD, _STATE, _LOCK = "run.json", ".state", "lock"
_CODE = {".py", ".yaml", ".yml"}


@dataclass
class Run:
    """A claimed place for a command's results."""

    folder: Path
    """What was asked for: a folder, or a file."""
    state: Path
    """Where to keep what would have to be done again."""
    finished: bool = False
    """Whether the results are there already."""
    resumed: bool = False
    to_be_continued: bool = False
    """Set by the work where some of it failed: the same command then tries that again."""


@contextmanager
def run_in(
    path: Path, command: str, settings: Mapping[str, Any], kind: Literal["folder", "whole"] = "folder"
) -> Iterator[Run]:
    """Claim a place for the results of ``command`` with these settings (plain data).

    They are files in a folder, or the ``whole`` is one file or one folder that is put there at the end.
    An unfinished run of the same is resumed; of a finished one ``finished`` is true. If the work raises before
    it kept anything under ``state``, or soon and for something that has to be fixed, nothing is left behind; else a
    note on the exception tells how to go on. Raises UserError for a place that holds anything else, is in use, or
    cannot be written.
    """
    if not is_main():
        yield agreed(Run(path, path))
        return
    state = path / _STATE if kind == "folder" else path.parent / f".{path.name}{_STATE}"
    identity = _identity(command, settings)
    if kind == "folder" and (record := _read(path / _RECORD)) is not None:
        _check_same(path, record, identity, "finished")
        remove(state)  # it was killed while it removed that
        yield agreed(Run(path, state, finished=True))
        return
    missing = _made(path, state, kind)
    with _locked(state / _LOCK, path):
        record = _read(state / _RECORD) if _holds_work(state) else None
        resumed = record is not None
        if record is not None:
            _check_same(path, record, identity, "unfinished")
        else:
            _clear(state)
            write_atomically(state / _RECORD, json.dumps(identity, indent=1))
        remove_partial(path)
        started = time.monotonic()
        try:
            # the whole may be there: killed between the last write and the clean-up
            run = agreed(Run(path, state, kind == "whole" and _is_taken(path), resumed))
            yield run
            if run.to_be_continued:
                return
            if kind == "folder":
                finished = {**identity, "finished": datetime.now(UTC).isoformat(timespec="seconds")}
                write_atomically(path / _RECORD, json.dumps(finished, indent=1))
            remove(state)
        except BaseException as error:
            reason = _of_the_system(error)
            mistake = isinstance(error, Exception) and reason is None
            if _holds_work(state) and not (mistake and time.monotonic() - started < WORTH_KEEPING):
                error.add_note(f"what was done is kept, and the same command with --out {path} resumes there")
            else:
                _undo(path, state, missing)
            if reason is not None:
                told = f"--out {str(path)!r} cannot be written ({reason})"
                raise UserError("; ".join([told, *getattr(error, "__notes__", [])])) from error
            raise


def _of_the_system(error: BaseException) -> str | None:
    """What the system says was wrong, where that is what was: a disk that is full, say."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors tells it
    return os.strerror(int(number[1])) if number and isinstance(error, Exception) else None


def unfinished(folder: Path, prefix: str, command: str, settings: Mapping[str, Any]) -> Path | None:
    """The newest folder in ``folder`` whose name begins so with an unfinished run of the same that nobody runs."""
    identity = _identity(command, settings)
    for path in sorted(folder.glob(f"{prefix}-*"), reverse=True):
        if _read(path / _STATE / _RECORD) == identity:
            with suppress(InUseError), _locked(path / _STATE / _LOCK, path):
                return path
    return None


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class InUseError(UserError):
    """Another process holds the lock."""


def _identity(command: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to be gone on with."""
    plain = json.loads(json.dumps(settings))
    return {"command": command, "settings": plain, "files": _files(plain), "versions": versions()}


def _files(value: Any) -> dict[str, list[Any]]:
    """Size and time of change of the data, models and modules that settings name."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return {name: found for part in value for name, found in _files(part).items()}
    if not isinstance(value, str) or len(value) > 4096 or "\0" in value:
        return {}
    path = Path(value.rpartition(":")[0] if ".py:" in value else value).expanduser()
    try:
        if path.suffix in _CODE and path.is_file():
            files = [path]
        elif (path / "config.json").is_file() or (path / "state.json").is_file():
            files = sorted(p for p in path.iterdir() if p.is_file())
        else:
            files = data_files(value) if value and (kind_of_file(path) or path.is_dir()) else []
        return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    except OSError:
        return {}


def _check_same(path: Path, record: Mapping[str, Any], identity: Mapping[str, Any], what: str) -> None:
    for part in ("command", "settings", "files", "versions"):
        if difference := _difference(record.get(part), identity[part], part):
            raise UserError(
                f"--out {str(path)!r} exists already: it holds another run, {what} ({difference}); "
                "give another name, or remove it"
            )


def _difference(there: Any, here: Any, name: str) -> str | None:
    """The first place where two trees of plain data differ, in words."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in [*here, *(k for k in there if k not in here)]:
            inner = key if name in ("settings", "files", "versions") else f"{name}.{key}"
            if found := _difference(there.get(key), here.get(key), inner):
                return found
        return None
    return None if there == here else f"{name}: {there!r:.60} there, {here!r:.60} here"


def _made(path: Path, state: Path, kind: str) -> list[Path]:
    """Make the folders of a run; those that were not there. Raises UserError where there is something else."""
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
    """Leave what was there before: an empty folder of the user's stays, and others' results in new folders too."""
    whole = path.absolute()
    remove(state)
    for place in [path] if whole in missing or not path.is_dir() else list(path.iterdir()):
        remove(place)
    for parent in reversed([p for p in missing if p in whole.parents]):
        with suppress(OSError):
            parent.rmdir()


def _clear(state: Path) -> None:
    for place in state.iterdir():
        if place.name != _LOCK:
            remove(place)


def _is_taken(path: Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _holds_work(state: Path) -> bool:
    return state.is_dir() and any(p.name not in (_RECORD, _LOCK) for p in state.iterdir())


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def _locked(file: Path, path: Path) -> Iterator[None]:
    """Hold the lock of a run, which the system takes from a process that dies. Raises InUseError if one lives."""
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
            # a file system without locks: two runners there are the user's to avoid
        with suppress(OSError):
            if file.stat().st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # it was removed by the run that held it; the next try makes its own
    now = datetime.now().isoformat(sep=" ", timespec="seconds")
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {now}".encode())
    try:
        yield
    finally:
        os.close(descriptor)


def place(prefix: str, command: str, settings: Mapping[str, Any]) -> Path:
    """The newest folder runs/<prefix>-<time> in which this command was stopped, else a new one."""
    found = unfinished(Path("runs"), prefix, command, settings) if is_main() else None
    fresh = Path("runs") / f"{prefix}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    names = (fresh.with_name(f"{fresh.name}-{number}") if number > 1 else fresh for number in itertools.count(1))
    return agreed(found or next(path for path in names if not path.exists()))
