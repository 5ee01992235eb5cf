"""Worker processes with one thread each, and a live view of what they do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from logging import ERROR, getLogger
from multiprocessing.queues import Queue, SimpleQueue
from queue import Empty
from types import FrameType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rlzoo.comparison.plan import counted
from rlzoo.errors import UserError
from rlzoo.registry import told

_events: Queue[tuple[str, float, str]] | None = None
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """One process a GPU where there are GPUs, else one a core."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else available_cores()


class WorkError(RuntimeError):
    """What another exception than UserError becomes on its way out of a worker: its kind and message, in one line."""


def why(error: BaseException) -> str:
    """What is told of a piece of work that failed, in one line."""
    if isinstance(error, BrokenProcessPool):
        return (
            "a worker process died: if memory ran out, take fewer workers or a smaller training.token_budget; "
            'a script of your own must call compare under `if __name__ == "__main__":`'
        )
    return str(error) if isinstance(error, (UserError, WorkError)) else told(error)


class Workers(Protocol):
    """Whatever runs the pieces of work of a comparison."""

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have ``function(*arguments, report)`` run; ``name`` is what a live view calls it."""
        ...

    def gather(self, futures: Mapping[Future[Any], str]) -> Iterator[tuple[str, Future[Any]]]:
        """The futures with their names as they finish."""
        ...


class InThisProcess:
    """Runs each piece at once, here: what the processes of a distributed run do, all of them in step."""

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(_run(name, function, arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def gather(self, futures: Mapping[Future[Any], str]) -> Iterator[tuple[str, Future[Any]]]:
        for future, name in futures.items():
            yield name, future


@contextmanager
def in_this_process() -> Iterator[Workers]:
    """No worker processes."""
    silence()
    yield InThisProcess()


class Pool:
    """Runs functions of `rlzoo.comparison.work` in processes; a function's last argument becomes its reporter."""

    def __init__(
        self,
        executor: ProcessPoolExecutor,
        events: Queue[Any],
        progress: Progress,
        workers: int,
        interrupted: threading.Event,
    ) -> None:
        self._executor, self._events, self._progress = executor, events, progress
        self._interrupted = interrupted
        self._bars: dict[str, TaskID] = {}
        self._starting = progress.add_task(
            f"starting {counted(workers, 'process', 'processes')}", total=None, detail=""
        )

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Queue ``function(*arguments, report)``; ``name`` is what the live view calls it."""
        self._bars[name] = self._progress.add_task(name, total=1.0, visible=False, start=False, detail="")
        try:
            with _interrupts_held():  # this may start a process, which inherits that
                return self._executor.submit(_run, name, function, arguments)
        except BrokenProcessPool as error:  # a worker died before: what it did not take with it is kept
            broken: Future[Any] = Future()
            broken.set_exception(error)
            return broken

    def gather(self, futures: Mapping[Future[Any], str]) -> Iterator[tuple[str, Future[Any]]]:
        """The futures with their names as they finish, while the live view goes on. Here Ctrl-C is heard."""
        waiting = set(futures)
        while waiting:
            if self._interrupted.is_set():
                raise KeyboardInterrupt
            finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            self._refresh()
            for future in finished:
                self._progress.update(self._bars[futures[future]], visible=False)
                yield futures[future], future

    def _refresh(self) -> None:
        while True:
            try:
                name, share, detail = self._events.get_nowait()
            except Empty:
                return
            self._progress.update(self._starting, visible=False)
            bar = self._bars[name]
            if not self._progress.tasks[bar].started:
                self._progress.start_task(bar)  # its clock: a cell may have waited long for its turn
            self._progress.update(bar, completed=share, detail=detail, visible=True)


@contextmanager
def pool(workers: int, threads: int, console: Console) -> Iterator[Workers]:
    """A pool whose processes start fresh (spawned), so that a GPU and thread counts are theirs to set."""
    context = multiprocessing.get_context("spawn")
    events: Queue[Any] = context.Queue()
    saved = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update({name: str(threads) for name in THREAD_VARIABLES})  # read when a process starts
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"), TimeElapsedColumn()]
    places = context.SimpleQueue()
    for place in range(workers):
        places.put(place)
    executor = ProcessPoolExecutor(workers, context, _start, (events, threads, places))
    try:
        with (
            _interrupts_noted() as interrupted,
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ):
            yield Pool(executor, events, progress, workers, interrupted)
    except BaseException:
        for process in list((executor._processes or {}).values()):  # a cell may run for hours: do not wait for it
            process.terminate()
        executor._result_queue._writer.close()  # type: ignore[attr-defined]  # else half a result is waited for
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _interrupts_noted() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set an event meanwhile; a second one is raised where it falls.

    An exception that falls into the middle of concurrent.futures leaves locks held that its own thread then waits for.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals come to the main thread alone
        yield interrupted
        return

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in heard:
        signal.signal(number, note)
    try:
        yield interrupted
    finally:
        for number in heard:
            signal.signal(number, before[number])
    if interrupted.is_set():  # it came after the last piece of work
        raise KeyboardInterrupt


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits meanwhile, and never comes to a process started here: its parent ends it, and says so once."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(events: Queue[tuple[str, float, str]], threads: int, places: SimpleQueue[int]) -> None:
    global _events
    _events = events
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped]

    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a process that is ended leaves there
    torch.set_num_threads(threads)
    if torch.cuda.is_available():  # each worker its own GPU, round and round
        torch.cuda.set_device(places.get() % torch.cuda.device_count())
    silence()


def silence() -> None:
    """No progress bars and notices from the libraries below in this process: rlzoo says what it does."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)  # it tells of every retry
    datasets.disable_progress_bars()


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Any exception comes back as one of two kinds that can be sent between processes."""
    try:
        return function(*arguments, lambda share, detail: _report(name, share, detail))
    except UserError as error:
        raise UserError(str(error)) from error
    except Exception as error:
        raise WorkError(told(error)) from error


def _report(name: str, share: float, detail: str) -> None:
    if _events is not None:
        _events.put((name, share, detail))
