"""Rewards in separate processes: a reward that hangs, crashes or exhausts memory costs bounded time and a single row.

`python -m rlzoo.reward.isolation` runs such a process, which reads JSON requests from standard input and replies in
JSON.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, TypeVar

from rlzoo.errors import UserError
from rlzoo.reward import CompositeReward, OnError, Reward, Score, failed, get_reward, one_by_one
from rlzoo.reward.calling import TrainerState

START_SECONDS = 300.0
"""The time limit for importing and building a reward."""
T = TypeVar("T")
_LENGTH = 8
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


@dataclass(frozen=True)
class Limits:
    """The limits of a reward; None: no limit."""

    seconds: float | None = 60.0
    """The time limit of a call."""
    memory_gb: float | None = 4.0
    """The memory limit of the process, in 2³⁰ bytes."""


class RewardProcess(CompositeReward):
    """A reward that is called in a separate process, by one thread at a time."""

    def __init__(self, spec: Any, limits: Limits) -> None:
        self._spec, self._limits = spec, limits
        self._process: subprocess.Popen[bytes] | None = None
        self._over = False
        self._rows: Sequence[int] | None = None
        self.name, self._components = "", tuple[str, ...]()
        atexit.register(self._end)

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the components, as the process reported them."""
        return self._components

    @property
    def pid(self) -> int | None:
        """The id of the process; None if none is running."""
        return None if self._process is None else self._process.pid

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        on_error: OnError = "fail",
    ) -> list[Score]:
        """One `Score` per completion. A call that exceeds a limit, or ends the process, is repeated row by row.

        Raises UserError as `Reward.score` does and, with ``on_error="fail"``, for a row on which this happens again.
        """
        arguments = {**columns, "prompts": prompts, "completions": completions}
        arguments |= {} if completion_ids is None else {"completion_ids": completion_ids}
        rows = range(len(completions)) if self._rows is None else self._rows
        try:
            return self._ask(arguments, on_error, rows)
        except _EndedError:
            return list(self._each(arguments, on_error, rows))

    def answers(self, completions: Sequence[Any]) -> list[str | None]:
        """See `Reward.answers`; all None if a limit is exceeded."""
        try:
            answer = self._exchange({"answers_in": list(completions)}, self._limits.seconds)
        except _EndedError:
            return [None] * len(completions)
        if "error" in answer:
            raise UserError(answer["error"])
        found: list[str | None] = answer["answers"]
        return found

    def _each(self, arguments: Mapping[str, Any], on_error: OnError, rows: Sequence[int]) -> Iterator[Score]:
        for row, alone in zip(rows, one_by_one(arguments, len(rows)), strict=True):
            try:
                yield from self._ask(alone, on_error, [row])
            except _EndedError as ended:
                failed(f"reward {self.name!r} {ended} on row {row}", on_error)
                yield Score(None, dict.fromkeys(self.components))

    @contextmanager
    def numbering(self, rows: Sequence[int]) -> Iterator[None]:
        """In this context, errors refer to completions by ``rows`` instead of their indices."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def close(self) -> None:
        """End the process; the next call starts a new one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
            self._process = None

    def _end(self) -> None:
        """End the process for good, when this one ends."""
        self._over = True
        self.close()

    def _ask(self, arguments: Mapping[str, Any], on_error: OnError, rows: Sequence[int]) -> list[Score]:
        plain = dict(arguments)
        state = vars(plain.pop("trainer_state", TrainerState()))
        answer = self._exchange({"arguments": plain, "state": state, "on_error": on_error}, self._limits.seconds)
        for message in answer["warnings"]:
            warnings.warn(renumbered(message, rows), RuntimeWarning, stacklevel=4)
        if "error" in answer:
            raise UserError(renumbered(answer["error"], rows))
        return [Score(*score) for score in answer["scores"]]

    def _exchange(self, message: Any, seconds: float | None) -> Any:
        process = self._process or self.start()
        assert process.stdin is not None and process.stdout is not None
        try:
            _write(process.stdin, message)
            return _read(process.stdout, None if seconds is None else time.monotonic() + seconds)
        except TimeoutError:
            self.close()
            raise _EndedError(f"took more than {seconds:g} s") from None
        except (EOFError, OSError):
            status = process.wait()
            self.close()
            raise _EndedError(f"ended its process with status {status}") from None

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process and build the reward in it. Raises UserError as `get_reward` does, and if that fails."""
        if self._over:
            raise _EndedError("ended with the run")
        command = [sys.executable, "-m", "rlzoo.reward.isolation"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": _path()},
            start_new_session=True,  # Ctrl-C goes to the parent only
        )
        self._process = process
        assert process.stdin is not None and process.stdout is not None
        try:
            _write(process.stdin, {"spec": self._spec, "memory_gb": self._limits.memory_gb})
            answer = _read(process.stdout, time.monotonic() + START_SECONDS)
        except (EOFError, OSError, TimeoutError):
            self.close()
            raise UserError(f"the process of the reward {self._spec!r:.200} did not start") from None
        if "error" in answer:
            self.close()
            raise UserError(answer["error"])
        self.name, self._components = answer["name"], tuple(answer["components"])
        return process


class RewardProcesses(CompositeReward):
    """A reward that is called in separate processes, each with a thread that starts it and awaits its replies."""

    def __init__(self, spec: Any, limits: Limits, number: int = 1) -> None:
        """Start the first of ``number`` processes. Raises UserError as `get_reward` does."""
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[RewardProcess], Any]]] = SimpleQueue()
        self.processes = [RewardProcess(spec, limits) for _ in range(number)]
        self._serve(self.processes[0])
        self.submit(lambda process: process.start()).result()
        self.name, self._components = self.processes[0].name, self.processes[0].components
        for process in self.processes[1:]:
            self._serve(process)

    @property
    def components(self) -> tuple[str, ...]:
        """See `RewardProcess.components`."""
        return self._components

    def submit(self, work: Callable[[RewardProcess], T]) -> Future[T]:
        """The future result of ``work`` on one of the processes; tasks start in the order of submission."""
        future: Future[T] = Future()
        self._queue.put((future, work))
        return future

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        on_error: OnError = "fail",
    ) -> list[Score]:
        """See `RewardProcess.score`."""
        arguments = prompts, completions, columns, completion_ids, on_error
        return self.submit(lambda process: process.score(*arguments)).result()

    def answers(self, completions: Sequence[Any]) -> list[str | None]:
        """See `RewardProcess.answers`."""
        return self.submit(lambda process: process.answers(completions)).result()

    def close(self) -> None:
        """End the processes; later calls start new ones."""
        for process in self.processes:
            process.close()

    def _serve(self, process: RewardProcess) -> None:
        """Serve a process from a daemon thread."""
        threading.Thread(target=_work, args=(self._queue, process), name="rewards", daemon=True).start()


def _work(queue: SimpleQueue[tuple[Future[Any], Callable[[RewardProcess], Any]]], process: RewardProcess) -> None:
    while True:
        future, work = queue.get()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work(process))
            except BaseException as error:
                future.set_exception(error)
        del future, work  # they keep completions alive


_processes: dict[str, RewardProcesses] = {}


def isolated(spec: Any, limits: Limits, on_error: OnError = "fail", number: int = 1) -> Reward:
    """`get_reward` for a reward that is built and called in ``number`` separate processes.

    All users of the same spec share them. Without limits, the reward is called in this process. Raises UserError as
    `get_reward` does, and for a spec that is not plain data.
    """
    if limits.seconds is None and limits.memory_gb is None:
        return get_reward(spec, on_error)
    try:
        key = json.dumps([spec, astuple(limits), number, str(Path.cwd()), os.getpid()])  # a fork has no threads
    except TypeError:
        raise UserError(
            "a reward with limits must be given by name: use its name, module:Name, or path/to/file.py:Name"
        ) from None
    if key not in _processes:
        _processes[key] = RewardProcesses(spec, limits, number)
    return Reward(_processes[key].name, _processes[key], on_error)


def renumbered(message: str, rows: Sequence[int]) -> str:
    """A message about a row, with the row's index replaced by its number in ``rows``."""
    number = re.search(r"(?<=\bon row )\d+", message)
    if number is None or int(number[0]) >= len(rows):  # a number from the reward's own message
        return message
    return f"{message[: number.start()]}{rows[int(number[0])]}{message[number.end() :]}"


class _EndedError(Exception):
    """A call without a reply; the message says how it ended."""


def _path() -> str:
    """The import path of this process, for a child process."""
    return os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)


def _write(pipe: IO[bytes], message: Any) -> None:
    content = json.dumps(message).encode()
    pipe.write(len(content).to_bytes(_LENGTH, "big") + content)
    pipe.flush()


def _read(pipe: IO[bytes], until: float | None) -> Any:
    size = int.from_bytes(_receive(pipe, _LENGTH, until), "big")
    return json.loads(_receive(pipe, size, until))


def _receive(pipe: IO[bytes], size: int, until: float | None) -> bytes:
    parts, left = [], size
    while left:
        wait = None if until is None else max(0.0, until - time.monotonic())
        if not select.select([pipe], [], [], wait)[0]:
            raise TimeoutError
        part = os.read(pipe.fileno(), left)
        if not part:
            raise EOFError
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _serve() -> None:
    """Build the reward that the first message names, then reply to the others."""
    asked, answers = os.fdopen(os.dup(0), "rb", 0), os.fdopen(os.dup(1), "wb", 0)
    os.dup2(2, 1)  # so that output of the reward is not taken for a reply
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    first = _read(asked, None)
    if sys.platform == "linux":  # even a hanging process does not outlive the thread that started it
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if first["memory_gb"] is not None:
        limit = int(first["memory_gb"] * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        reward = get_reward(first["spec"])
    except UserError as error:
        _write(answers, {"error": str(error)})
        return
    _write(answers, {"name": reward.name, "components": reward.components})
    while True:
        message = _read(asked, None)
        if "answers_in" in message:
            try:
                _write(answers, {"answers": reward.answers(message["answers_in"])})
            except UserError as error:
                _write(answers, {"error": str(error)})
            continue
        arguments = dict(message["arguments"])
        given = [arguments.pop(name, None) for name in ("prompts", "completions", "completion_ids")]
        answer: dict[str, Any] = {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                current = replace(reward, on_error=message["on_error"], state=TrainerState(**message["state"]))
                answer["scores"] = [astuple(score) for score in current.score(given[0], given[1], arguments, given[2])]
            except UserError as error:
                answer["error"] = str(error)
        answer["warnings"] = [str(w.message) for w in caught if w.category is RuntimeWarning]
        _write(answers, answer)


if __name__ == "__main__":
    try:
        _serve()
    except (EOFError, KeyboardInterrupt):
        sys.exit(0)
