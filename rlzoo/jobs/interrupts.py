"""Ctrl-C and SIGTERM: heard at once, or noted where work must come to a safe place first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_noted: int | None = None
_depth = 0


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does but for the exit status."""


@contextmanager
def noted() -> Iterator[None]:
    """Meanwhile a first signal is only noted, for `heed` to raise it; a second one is raised where it falls."""
    global _noted, _depth
    if threading.current_thread() is not threading.main_thread() or _depth:  # signals come to the main thread alone
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in heard:
        signal.signal(number, _note)
    _depth += 1
    try:
        yield
        heed()  # it came after the last safe place
    finally:
        _depth -= 1
        _noted = None
        for number in heard:
            signal.signal(number, before[number])


def pending() -> bool:
    """Whether a signal was noted."""
    return _noted is not None


def heed() -> None:
    """Raise the signal that was noted, if one was."""
    if _noted is not None:
        raise_signal(_noted)


def raise_signal(number: int, frame: FrameType | None = None) -> None:
    """A signal's handler: raises KeyboardInterrupt, or Terminated."""
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    global _noted
    if _noted is not None:
        raise_signal(number)
    _noted = number
