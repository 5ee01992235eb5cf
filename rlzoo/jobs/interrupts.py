"""Ctrl-C and SIGTERM: raised at once, or deferred until work has reached a safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_noted: int | None = None
_depth = 0


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does, with another exit status."""


@contextmanager
def noted() -> Iterator[None]:
    """In this context a first signal is deferred until `heed` raises it; a second one is raised at once."""
    global _noted, _depth
    if threading.current_thread() is not threading.main_thread() or _depth:  # only the main thread receives signals
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in heard:
        signal.signal(number, _note)
    _depth += 1
    try:
        yield
        heed()  # it came after the last safe point
    finally:
        _depth -= 1
        _noted = None
        for number in heard:
            signal.signal(number, before[number])


def pending() -> bool:
    """Whether a signal has been deferred."""
    return _noted is not None


def heed() -> None:
    """Raise the deferred signal, if there is one."""
    if _noted is not None:
        raise_signal(_noted)


def raise_signal(number: int, frame: FrameType | None = None) -> None:
    """A signal handler: raises KeyboardInterrupt, or Terminated."""
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    global _noted
    if _noted is not None:
        raise_signal(number)
    _noted = number
