"""The pool of worker processes: how an interrupt reaches it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from rlzoo.comparison.pool import pool


def nap(seconds: float, report: Callable[[float, str], None]) -> float:
    report(0.0, "asleep")
    time.sleep(seconds)
    return seconds


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_a_safe_place_and_for_nothing_else(number: signal.Signals) -> None:
    """An exception in the midst of the executor's own calls would leave its locks held, and the end would hang."""
    before, started, reached = signal.getsignal(number), time.monotonic(), False
    with pytest.raises(KeyboardInterrupt), pool(1, 1, Console(quiet=True)) as processes:
        futures = {processes.submit("long", nap, 600.0): "long"}
        signal.raise_signal(number)
        reached = True
        list(processes.gather(futures))
    assert reached, "raised where it fell"
    assert time.monotonic() - started < 120, "the piece of work was waited for"
    assert signal.getsignal(number) is before


def test_an_interrupt_after_the_last_piece_of_work_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), pool(1, 1, Console(quiet=True)) as processes:
        found = list(processes.gather({processes.submit("short", nap, 0.0): "short"}))
        signal.raise_signal(signal.SIGINT)
    assert [name for name, _ in found] == ["short"]


def test_a_second_interrupt_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), pool(1, 1, Console(quiet=True)):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it waited")
