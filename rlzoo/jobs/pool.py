"""A pool of worker processes, and a live view of their work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from logging import ERROR, getLogger
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, cast

from rich.console import Console
from rich.progress import Progress, TaskID

from rlzoo.errors import UserError
from rlzoo.jobs.heartbeat import say
from rlzoo.jobs.interrupts import insisted, raise_deferred, signals_deferred
from rlzoo.jobs.memory import is_out_of_memory
from rlzoo.jobs.progress import Together, bars
from rlzoo.registry import one_line

RETRIES = 1
"""The number of retries of a task after its process died."""
GRACE = 60.0
"""Seconds that training has to save a checkpoint when it must stop."""
QUICK = 2.0
"""Seconds of waiting for processes to end before the user is informed."""
START = "spawn"  # a process starts afresh: neither CUDA nor the threads of this one survive in a copy
GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """The default number of processes: one per GPU if there are GPUs, else one per core."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else available_cores()


class WorkError(RuntimeError):
    """An exception of a worker other than UserError: its type and message, in one line."""


class OutOfMemoryError(WorkError):
    """A worker ran out of memory; smaller micro-batches may help."""


def why(error: BaseException) -> str:
    """Why a task failed, in one line."""
    return str(error) if isinstance(error, (UserError, WorkError)) else one_line(error)


class WorkerDiedError(WorkError):
    """A process ended in the middle of a task."""

    def __init__(self, status: int | None) -> None:
        killed = status is not None and status < 0
        how = f"was killed by {signal.Signals(-(status or 0)).name}" if killed else f"ended with status {status}"
        super().__init__(
            f"its worker process {how}: if memory ran out, use fewer workers or a smaller training.token_budget; "
            'a script of your own must call compare under `if __name__ == "__main__":`'
        )


class Workers(Protocol):
    """The interface for running the tasks of a comparison."""

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Run ``function(*arguments, report)``; ``name`` is its name in the live view.

        The function may call ``report(share, detail)`` with the fraction of its work that is done and a description.
        """
        ...

    def gather(self, futures: Mapping[Future[Any], str]) -> Iterator[tuple[str, Future[Any]]]:
        """The futures with their names, in the order in which they finish."""
        ...

    def doing(self) -> str:
        """A description of what is running; may be called from another thread."""
        ...


class InThisProcess:
    """`Workers` that run each task at once in this process; the processes of a distributed run do so in step."""

    def __init__(self) -> None:
        self._doing = "starting"

    def doing(self) -> str:
        """See `Workers.doing`."""
        return self._doing

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """See `Workers.submit`."""

        def report(share: float, detail: str) -> None:
            self._doing = f"{name}: {detail}"

        future: Future[Any] = Future()
        try:
            future.set_result(_run(function, arguments, report))
        except Exception as error:
            future.set_exception(error)
        return future

    def gather(self, futures: Mapping[Future[Any], str]) -> Iterator[tuple[str, Future[Any]]]:
        """See `Workers.gather`."""
        for future, name in futures.items():
            yield name, future


@contextmanager
def in_this_process() -> Iterator[Workers]:
    """`Workers` without worker processes."""
    silence()
    yield InThisProcess()


@dataclass
class _Task:
    future: Future[Any]
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    deaths: int = 0


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    place: int
    task: _Task | None = None


class Pool:
    """`Workers` that run functions in processes of their own.

    Each process has its own pipe, so that a process that dies loses only its own task, which is retried in a new one.
    """

    def __init__(self, workers: int, threads: int, progress: Progress) -> None:
        self._most, self._threads, self._progress = workers, threads, progress
        self._workers: list[_Worker] = []
        self._waiting: deque[_Task] = deque()
        self._bars: dict[str, TaskID] = {}
        self._together, self._details = Together(), dict[str, str]()
        self._starting = progress.add_task(
            f"starting {counted(workers, 'process', 'processes')}", total=None, detail=""
        )
        self._all = progress.add_task("all", total=1.0, visible=False, start=False, detail="")

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """See `Workers.submit`; tasks start in the order in which they are submitted."""
        self._bars[name] = self._progress.add_task(name, total=1.0, visible=False, start=False, detail="")
        task = _Task(Future(), name, function, arguments)
        self._waiting.append(task)
        self._assign()
        return task.future

    def gather(self, futures: Mapping[Future[Any], str]) -> Iterator[tuple[str, Future[Any]]]:
        """See `Workers.gather`; updates the live view, and raises a deferred Ctrl-C."""
        waiting = set(futures)
        self._together.begin(futures.values())
        self._progress.reset(self._all, visible=len(waiting) > 1)
        while waiting:
            self._progress.update(self._all, completed=self._together.share, detail=self._together.done)
            raise_deferred()
            for future in [future for future in waiting if future.done()]:
                waiting.remove(future)
                self._together.report(futures[future], 1)
                self._progress.update(self._bars[futures[future]], visible=False)
                yield futures[future], future
            busy = {worker.pipe: worker for worker in self._workers if worker.task is not None}
            for pipe in connection.wait(busy, timeout=0.2):
                self._receive(busy[cast(Connection, pipe)])
            self._assign()

    def doing(self) -> str:
        """See `Workers.doing`."""
        tasks = [worker.task for worker in list(self._workers)]  # once each: another thread gives and takes them
        running = [task.name for task in tasks if task is not None]
        details = ", ".join(f"{name}: {self._details.get(name, 'starting')}" for name in running)
        return "; ".join(part for part in (str(self._together), details) if part)

    def stop(self, grace: float) -> None:
        """End the processes; training has ``grace`` seconds to save a checkpoint first."""
        try:
            for worker in self._workers:
                worker.process.terminate()
            if not self._ended(min(grace, QUICK)) and grace:
                message = "stopping after saving checkpoints; press Ctrl-C again to stop at once"
                say(self._progress.console, message)
                self._ended(grace)
        finally:
            for worker in self._workers:
                worker.process.kill()
                worker.process.join()
                worker.pipe.close()
            self._workers.clear()

    def _ended(self, seconds: float) -> bool:
        """Whether all processes end within this number of seconds."""
        until = time.monotonic() + seconds
        for worker in self._workers:
            worker.process.join(max(0.0, until - time.monotonic()))
        return not any(worker.process.is_alive() for worker in self._workers)

    def _assign(self) -> None:
        """Assign waiting tasks to idle processes, starting more up to the limit."""
        while self._waiting:
            idle = next((worker for worker in self._workers if worker.task is None), None)
            if idle is None and len(self._workers) < self._most:
                idle = self._started()
            if idle is None:
                return
            idle.task = self._waiting.popleft()
            with suppress(OSError):  # it died while idle: `gather` sees it on its pipe
                idle.pipe.send((idle.task.function, idle.task.arguments))

    def _started(self) -> _Worker:
        context: Any = multiprocessing.get_context(START)
        place = min(set(range(self._most)) - {worker.place for worker in self._workers})
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._threads))
        with _interrupts_held(), _environment(self._threads, place):
            process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours, place))
        return self._workers[-1]

    def _receive(self, worker: _Worker) -> None:
        assert worker.task is not None
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):  # it died, maybe in the middle of a message
            self._bury(worker)
            return
        self._progress.update(self._starting, visible=False)
        bar = self._bars[worker.task.name]
        if kind == "progress":
            share, detail = content
            self._details[worker.task.name] = detail
            self._together.report(worker.task.name, min(share, 0.99))  # its result is yet to come
            if not self._progress.tasks[bar].started:
                self._progress.start_task(bar)  # start its clock: a cell may have waited long
            self._progress.update(bar, completed=share, detail=detail, visible=True)
            return
        task, worker.task = worker.task, None
        if kind == "result":
            task.future.set_result(content)
        else:
            task.future.set_exception(content)

    def _bury(self, worker: _Worker) -> None:
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)
        task, died = worker.task, WorkerDiedError(worker.process.exitcode)
        assert task is not None
        task.deaths += 1
        if task.deaths > RETRIES:
            task.future.set_exception(died)
            return
        say(self._progress.console, f"  {task.name}: {died}; retrying", style="red")
        self._waiting.appendleft(task)


@contextmanager
def pool(workers: int, threads: int, console: Console) -> Iterator[Workers]:
    """A `Pool` of spawned processes, each with its own GPU and number of threads."""
    with signals_deferred(), bars(console) as progress:
        running = Pool(workers, threads, progress)
        grace = 0.0
        try:
            yield running
        except KeyboardInterrupt:
            grace = 0.0 if insisted() else GRACE
            raise
        finally:
            running.stop(grace)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as in CUDA_VISIBLE_DEVICES: numbers, UUIDs, or MIG instances.

    As in CUDA, an invalid entry ends the list.
    """
    import torch

    asked = os.environ.get(GPU_VARIABLE)
    if asked is None:
        return list(map(str, range(torch.cuda.device_count())))
    names = [name.strip() for name in asked.split(",")]
    return list(takewhile(lambda name: name and not name.startswith("-"), names))


@contextmanager
def _environment(threads: int, place: int) -> Iterator[None]:
    """In this context, a new process gets its thread counts and the only GPU that is visible in it.

    If it saw several, an engine in it would use the first one. Workers use the GPUs in turn.
    """
    own = {name: str(threads) for name in THREAD_VARIABLES}
    if gpus := visible_gpus():
        own[GPU_VARIABLE] = gpus[place % len(gpus)]
    saved = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """In this context, Ctrl-C is blocked; processes started here never receive it, because the parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # starting it with the first process would unblock signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, threads: int) -> None:
    """The main loop of a worker process: one task after the other."""
    # an exception could be raised where it is swallowed; training defers the signal, and saves a checkpoint first
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        import torch
        from tqdm import tqdm  # type: ignore[import-untyped]

        tqdm.set_lock(threading.RLock())  # tqdm's default is a system semaphore, which a killed process leaks
        torch.set_num_threads(threads)
        silence()
        while True:
            function, arguments = pipe.recv()
            try:
                result = _run(function, arguments, lambda share, detail: pipe.send(("progress", (share, detail))))
            except (UserError, WorkError) as error:
                pipe.send(("error", error))
            else:
                pipe.send(("result", result))
    except (EOFError, OSError, KeyboardInterrupt):
        os._exit(1)  # told to stop, or the parent is gone


def silence() -> None:
    """Switch off progress bars and notices of other libraries in this process."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)  # it logs every retry
    datasets.disable_progress_bars()


def _end_with_parent() -> None:
    """End this worker when its parent ends; otherwise it would wait for tasks forever."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], report: Callable[[float, str], None]) -> Any:
    """Run a task; any exception is raised as UserError or WorkError, which can be sent between processes."""
    try:
        return function(*arguments, report)
    except UserError as error:
        raise UserError(str(error)) from error
    except Exception as error:
        raise (OutOfMemoryError if is_out_of_memory(error) else WorkError)(one_line(error)) from error


def counted(number: int, thing: str, things: str | None = None) -> str:
    """A number with its noun, as in ``1 run`` and ``2 runs``."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"
