"""Worker processes with one thread each, and a live view of what they do."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.queues import Queue
from queue import Empty
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_events: Queue[tuple[str, float, str]] | None = None
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """Runs functions of `rlzoo.comparison.work` in processes; a function's last argument becomes its reporter."""

    def __init__(self, executor: ProcessPoolExecutor, events: Queue[Any], progress: Progress) -> None:
        self._executor, self._events, self._progress = executor, events, progress
        self._bars: dict[str, TaskID] = {}

    def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Queue ``function(*arguments, report)``; ``name`` is what the live view calls it."""
        self._bars[name] = self._progress.add_task(name, total=1.0, visible=False, detail="")
        return self._executor.submit(_run, name, function, arguments)

    def gather(self, futures: Mapping[Future[Any], str]) -> Iterator[tuple[str, Future[Any]]]:
        """The futures with their names as they finish, while the live view goes on."""
        waiting = set(futures)
        while waiting:
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
            self._progress.update(self._bars[name], completed=share, detail=detail, visible=True)


@contextmanager
def pool(workers: int, threads: int, console: Console) -> Iterator[Pool]:
    """A pool whose processes start fresh (spawned), so that a GPU and thread counts are theirs to set."""
    context = multiprocessing.get_context("spawn")
    events: Queue[Any] = context.Queue()
    saved = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update({name: str(threads) for name in THREAD_VARIABLES})  # read when a process starts
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
    ]
    executor = ProcessPoolExecutor(workers, context, _start, (events, threads))
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            yield Pool(executor, events, progress)
    except BaseException:
        for process in list((executor._processes or {}).values()):  # a cell may run for hours: do not wait for it
            process.terminate()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _start(events: Queue[tuple[str, float, str]], threads: int) -> None:
    global _events
    _events = events
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    import datasets

    datasets.disable_progress_bars()


def _run(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments, lambda share, detail: _report(name, share, detail))


def _report(name: str, share: float, detail: str) -> None:
    if _events is not None:
        _events.put((name, share, detail))
