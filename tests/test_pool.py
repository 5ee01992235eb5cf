"""The pool of worker processes: how an interrupt reaches it."""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparisons import Copy
from rich.console import Console

from rlzoo.jobs import heartbeat, interrupts, progress
from rlzoo.jobs.interrupts import insisted, raise_deferred, signals_deferred
from rlzoo.jobs.outputs import write_atomically
from rlzoo.jobs.pool import GRACE, THREAD_VARIABLES, OutOfMemoryError, Pool, WorkerDiedError, pool

pytestmark = pytest.mark.usefixtures("copied")


def nap(seconds: float, report: Callable[[float, str], None]) -> float:
    report(0.0, "asleep")
    time.sleep(seconds)
    return seconds


@pytest.mark.slow
@pytest.mark.usefixtures("hears_interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_a_safe_place_and_for_nothing_else(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in the midst of the executor's own calls would leave its locks held, and the end would hang."""
    monkeypatch.setattr("rlzoo.jobs.pool.START", "spawn")  # a copy begins with the handlers of this process
    before, started, reached = signal.getsignal(number), time.monotonic(), False
    with pytest.raises(KeyboardInterrupt), pool(1, 1, Console(quiet=True)) as processes:
        futures = {processes.submit("long", nap, 600.0): "long"}
        signal.raise_signal(number)
        reached = True
        list(processes.gather(futures))
    assert reached, "raised where it fell"
    assert time.monotonic() - started < 120, "the task was waited for"
    assert signal.getsignal(number) is before


def deaf_nap(report: Callable[[float, str], None]) -> None:
    """As in code that swallows what a signal raises."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report(0.0, "deaf")
    time.sleep(600)


@pytest.mark.slow
@pytest.mark.usefixtures("hears_interrupts")
def test_a_process_that_does_not_end_in_its_time_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlzoo.jobs.pool.GRACE", 0.2)
    monkeypatch.setattr("rlzoo.jobs.pool.QUICK", 0.1)
    lines, started, others = io.StringIO(), time.monotonic(), multiprocessing.active_children()
    with pytest.raises(KeyboardInterrupt), pool(1, 1, Console(file=lines)) as processes:
        futures = {processes.submit("deaf", deaf_nap): "deaf"}
        threading.Thread(target=interrupt_when, args=(lambda: processes.doing().endswith("deaf: deaf"),)).start()
        list(processes.gather(futures))
    assert "stopping after saving checkpoints" in lines.getvalue()
    assert time.monotonic() - started < 120
    assert not set(multiprocessing.active_children()) - set(others)


@pytest.mark.slow
@pytest.mark.usefixtures("hears_interrupts")
def test_a_process_that_is_suspended_delays_nothing_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees no signal but SIGKILL, which it gets at the second Ctrl-C."""
    monkeypatch.setattr("rlzoo.jobs.pool.QUICK", 0.1)
    lines, started, others = io.StringIO(), time.monotonic(), set(multiprocessing.active_children())

    def suspend(doing: Callable[[], str]) -> None:
        interrupt_when(lambda: doing().endswith("asleep") and _suspended(others))
        interrupt_when(lambda: "press Ctrl-C again to stop at once" in lines.getvalue())

    with pytest.raises(KeyboardInterrupt), pool(1, 1, Console(file=lines)) as processes:
        futures = {processes.submit("long", nap, 600.0): "long"}
        threading.Thread(target=suspend, args=(processes.doing,)).start()
        list(processes.gather(futures))
    assert time.monotonic() - started < GRACE
    assert not set(multiprocessing.active_children()) - others


def _suspended(others: set[Any]) -> bool:
    """Whether there are processes besides ``others``, which are now suspended."""
    own = [process.pid for process in set(multiprocessing.active_children()) - others if process.pid is not None]
    for number in own:
        os.kill(number, signal.SIGSTOP)
    return bool(own)


@pytest.mark.usefixtures("hears_interrupts")
def test_a_deferred_interrupt_that_waits_long_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interrupts, "PATIENCE", 0.2)
    told = ""
    with pytest.raises(KeyboardInterrupt), signals_deferred():
        signal.raise_signal(signal.SIGTERM)  # of a scheduler, which reads nothing
        raise_deferred()
    with pytest.raises(KeyboardInterrupt), signals_deferred():
        signal.raise_signal(signal.SIGINT)
        until = time.monotonic() + 30
        while not told and time.monotonic() < until:
            time.sleep(0.02)
            told += capsys.readouterr().err
        assert told == "stopping at the next safe point; press Ctrl-C again to stop at once\n" and not insisted()
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second is raised at once")
    assert insisted()
    with pytest.raises(KeyboardInterrupt), signals_deferred():
        signal.raise_signal(signal.SIGINT)
        raise_deferred()
    assert capsys.readouterr().err == "" and not insisted()


def interrupt_when(ready: Callable[[], bool]) -> None:
    while not ready():
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_that_the_shell_ignores_stays_ignored() -> None:
    """As it does for a command in the background: another's Ctrl-C is not for it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pool(1, 1, Console(quiet=True)):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_processes_end_with_one_that_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "pid"

    def naps() -> None:
        with pool(1, 1, Console(quiet=True)) as processes:
            list(processes.gather({processes.submit("nap", mark_and_nap, mark): "nap"}))

    run = Copy(naps)
    until = time.monotonic() + 120
    while not mark.exists():
        assert time.monotonic() < until, run.errors()
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGKILL)
    assert run.ended().status == -signal.SIGKILL
    worker = int(mark.read_text())
    for _ in range(1200):
        if not alive(worker):
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker goes on without the process that started it")


def mark_and_nap(mark: Path, report: Callable[[float, str], None]) -> None:
    write_atomically(mark, str(os.getpid()))
    time.sleep(600)


def alive(process: int) -> bool:
    """Whether it runs; one that has ended may wait for somebody to ask how."""
    try:
        return "(zombie)" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.usefixtures("hears_interrupts")
def test_an_interrupt_after_the_last_piece_of_work_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), pool(1, 1, Console(quiet=True)) as processes:
        found = list(processes.gather({processes.submit("short", nap, 0.0): "short"}))
        signal.raise_signal(signal.SIGINT)
    assert [name for name, _ in found] == ["short"]


@pytest.mark.usefixtures("hears_interrupts")
def test_a_second_interrupt_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), pool(1, 1, Console(quiet=True)):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it waited")


def die_once(mark: Path, report: Callable[[float, str], None]) -> str:
    """End this process the first time, as the system does where memory runs out."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def die(report: Callable[[float, str], None]) -> None:
    report(0.5, "about to")
    os.kill(os.getpid(), signal.SIGKILL)


def fail(report: Callable[[float, str], None]) -> None:
    raise ZeroDivisionError("a bug")


def starve(kind: str, report: Callable[[float, str], None]) -> None:
    said = {"gpu": torch.OutOfMemoryError("CUDA out of memory"), "cublas": RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")}
    raise said.get(kind, MemoryError(kind))


def threads(report: Callable[[float, str], None]) -> tuple[int, list[str]]:
    return torch.get_num_threads(), [os.environ[name] for name in THREAD_VARIABLES]


@pytest.mark.slow
def test_a_process_that_dies_takes_nothing_with_it(tmp_path: Path) -> None:
    lines, before = io.StringIO(), {name: os.environ.get(name) for name in THREAD_VARIABLES}
    with pool(2, 2, Console(file=lines)) as processes:
        futures = {
            processes.submit("once", die_once, tmp_path / "mark"): "once",
            processes.submit("always", die): "always",
            processes.submit("bug", fail): "bug",
            processes.submit("threads", threads): "threads",
            **{processes.submit(f"nap {i}", nap, 0.1): f"nap {i}" for i in range(3)},
            **{processes.submit(kind, starve, kind): kind for kind in ("gpu", "cublas", "plain")},
        }
        done = dict(processes.gather(futures))
    assert done["once"].result() == "alive"
    assert [done[f"nap {i}"].result() for i in range(3)] == [0.1] * 3
    assert isinstance(done["always"].exception(), WorkerDiedError)
    assert "killed by SIGKILL: if memory ran out" in str(done["always"].exception())
    assert str(done["bug"].exception()).startswith("ZeroDivisionError: a bug (test_pool.py line ")
    assert {type(done[kind].exception()) for kind in ("gpu", "cublas", "plain")} == {OutOfMemoryError}
    assert "CUDA out of memory" in str(done["gpu"].exception())
    told = lines.getvalue().replace("\n", " ")
    assert told.count("; retrying") == 2
    assert "stopping" not in told, "nobody waits for a checkpoint"
    assert done["threads"].result() == (2, ["2"] * 3)
    assert {name: os.environ.get(name) for name in THREAD_VARIABLES} == before


def test_a_line_says_how_long_and_what_until_the_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "EVERY", 0.01)
    lines, details = io.StringIO(), "[red]" + " a long piece of work" * 9
    before = set(threading.enumerate())
    asked = threading.Semaphore(0)

    def nothing() -> str:
        asked.release()
        return ""

    with heartbeat.Heartbeat(Console(file=lines), "reading") as beat:
        for told in ("reading", details):
            until = time.monotonic() + 20
            while told not in lines.getvalue() and time.monotonic() < until:
                time.sleep(0.005)
            beat.report(0.5, details)
        beat.doing = nothing
        assert asked.acquire(timeout=20) and asked.acquire(timeout=20), "between two stages: no line"
    assert not set(threading.enumerate()) - before
    first, *_, last = lines.getvalue().splitlines()
    assert re.fullmatch(r"  0:0[01]:\d\d reading", first)
    assert re.fullmatch(r"  0:0[01]:\d\d " + re.escape(details), last)


def test_the_rest_takes_as_long_as_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done before does not count: a fifth that an interrupted run had done took no time here."""
    now = 100.0
    monkeypatch.setattr("rlzoo.jobs.progress.time", SimpleNamespace(monotonic=lambda: now))
    remaining = progress.Remaining()
    assert remaining.after(0.2) == ""
    now += 10
    assert remaining.after(0.2) == "" and remaining.after(0.4) == ", 0:00:30 left" and remaining.after(1.0) == ""
    assert remaining.after(0.1) == "", "other work has begun"
    now += 100
    assert remaining.after(0.2) == ", 0:13:20 left"


def test_work_in_this_process_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines in a log; on a terminal a bar, which leaves nothing behind, and takes nothing from standard output."""
    monkeypatch.setattr(heartbeat, "EVERY", 0.01)
    log, terminal = io.StringIO(), io.StringIO()
    with (
        progress.reporting(Console(file=log), "loading") as one,
        progress.reporting(Console(file=terminal, force_terminal=True, width=200), "loading") as other,
    ):
        for report in (one, other):
            advance = progress.counting(8, "sampling", report)
            advance(2)
            advance(2)
        print("a result")
        until = time.monotonic() + 20
        while not re.search(r"sampling 4/8, 0:00:0\d left", log.getvalue()) and time.monotonic() < until:
            time.sleep(0.005)
        while "sampling 4/8" not in terminal.getvalue() and time.monotonic() < until:
            time.sleep(0.005)
    assert re.search(r"^  0:00:0\d sampling 4/8, 0:00:0\d left$", log.getvalue(), re.MULTILINE)
    assert "\x1b" not in log.getvalue() and "sampling 4/8" in terminal.getvalue()
    assert "" not in log.getvalue().splitlines(), "a bar that nobody sees leaves no empty line"
    assert terminal.getvalue().endswith("\x1b[2K"), "the bar is gone"
    assert capsys.readouterr().out == "a result\n"


def test_a_bar_has_any_name() -> None:
    """As in ``[lr=1e-5]`` or ``[/odd]``, names of rows, which are no markup of rich."""
    terminal = io.StringIO()
    with progress.bars(Console(file=terminal, force_terminal=True, width=200)) as shown:
        shown.add_task("sft [lr=1e-5]", detail="[/odd]")
    assert "sft [lr=1e-5]" in terminal.getvalue() and "[/odd]" in terminal.getvalue()


def test_what_is_done_is_told_while_a_task_ends() -> None:
    """The heartbeat asks from a thread of its own."""

    class Ending:
        """A worker whose task ends once it has been seen."""

        def __init__(self) -> None:
            self._tasks = [SimpleNamespace(name="sft"), None]

        @property
        def task(self) -> SimpleNamespace | None:
            return self._tasks.pop(0)

    with progress.bars(Console(quiet=True)) as shown:
        running = Pool(1, 1, shown)
        running._workers.append(Ending())  # type: ignore[arg-type]
        assert running.doing() == "sft: starting"


def nap_until(mark: Path, report: Callable[[float, str], None]) -> None:
    report(0.0, "asleep")
    while not mark.exists():
        time.sleep(0.01)


@pytest.mark.slow
def test_a_log_shows_now_and_then_what_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At least every 30 seconds; a terminal has the live view for that."""
    assert heartbeat.EVERY <= 30
    monkeypatch.setattr(heartbeat, "EVERY", 0.05)
    log, terminal = io.StringIO(), io.StringIO()
    told = {"first": "0 of 2 done; first: asleep", "second": "1 of 2 done; second: asleep"}

    def wake() -> None:
        for name, line in told.items():
            while line not in re.sub(r", \d:\d\d:\d\d left", "", log.getvalue()):
                time.sleep(0.01)
            (tmp_path / name).touch()

    with (
        heartbeat.Heartbeat(Console(file=log, width=500), "starting") as beat,
        heartbeat.Heartbeat(Console(file=terminal, force_terminal=True, width=500), "starting") as hidden,
        pool(1, 1, Console(quiet=True)) as processes,
    ):
        beat.doing = hidden.doing = processes.doing
        threading.Thread(target=wake, daemon=True).start()
        list(processes.gather({processes.submit(name, nap_until, tmp_path / name): name for name in told}))
    lines = [re.sub(r"^  \d+:\d\d:\d\d |, \d:\d\d:\d\d left", "", line) for line in log.getvalue().splitlines()]
    assert set(told.values()) <= set(lines) and terminal.getvalue() == ""


def seen(report: Callable[[float, str], None]) -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.slow
def test_each_worker_sees_one_gpu_of_its_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers take turns: with three of them, the first and the last share one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,5")
    with pool(3, 1, Console(quiet=True)) as processes:
        futures = {processes.submit(str(n), seen): str(n) for n in range(3)}
        found = sorted(str(future.result()) for _, future in processes.gather(futures))
    assert found == ["5", "MIG-a", "MIG-a"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "MIG-a,5", "the parent keeps its own"


MASKS = """
import signal, sys
from rich.console import Console
from rlzoo.jobs.pool import pool

def mask(report):
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())

def main():
    with pool(2, 1, Console(quiet=True)) as processes:
        futures = {processes.submit(str(i), mask): str(i) for i in range(2)}
        print([future.result() for _, future in processes.gather(futures)])
"""


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_never_comes_to_a_worker(tmp_path: Path) -> None:
    """It goes to all processes of a terminal; the one that was started ends the others. The first process too."""
    (tmp_path / "masks.py").write_text(MASKS)
    script = "import masks\nif __name__ == '__main__': masks.main()"  # with processes that start afresh
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.stdout == "[True, True]\n", run.stderr
