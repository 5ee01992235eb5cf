"""Ctrl-C and SIGTERM: raised at once, or deferred until a safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_deferred: int | None = None
_depth = 0


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM, which ends a command as Ctrl-C does, but with another exit status."""


@contextmanager
def signals_deferred() -> Iterator[None]:
    """In this context, the first signal is deferred until `raise_deferred`; a second one is raised at once."""
    global _deferred, _depth
    if threading.current_thread() is not threading.main_thread() or _depth:  # only the main thread receives signals
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, _defer)
    _depth += 1
    try:
        yield
        raise_deferred()  # it arrived after the last safe point
    finally:
        _depth -= 1
        _deferred = None
        for number in handled:
            signal.signal(number, before[number])


def pending() -> bool:
    """Whether a signal has been deferred."""
    return _deferred is not None


def raise_deferred() -> None:
    """Raise the deferred signal, if any, as KeyboardInterrupt or Terminated."""
    if _deferred is not None:
        raise_signal(_deferred)


def raise_signal(number: int, frame: FrameType | None = None) -> None:
    """A signal handler that raises KeyboardInterrupt, or Terminated for SIGTERM."""
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _defer(number: int, frame: FrameType | None) -> None:
    global _deferred
    if _deferred is not None:
        raise_signal(number)
    _deferred = number
