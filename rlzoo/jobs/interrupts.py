"""Ctrl-C and SIGTERM: raised at once, or deferred until a safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_deferred: int | None = None
_left = 0
_depth = 0


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM, which ends a command as Ctrl-C does, but with another exit status."""


@contextmanager
def signals_deferred(most: int = 1) -> Iterator[None]:
    """In this context, ``most`` signals are deferred until `raise_deferred`; the next one is raised at once."""
    global _deferred, _left, _depth
    if threading.current_thread() is not threading.main_thread() or _depth:  # only the main thread receives signals
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, _defer)
    _left = most
    _depth += 1
    try:
        yield
        raise_deferred()  # it arrived after the last safe point
    finally:
        _depth -= 1
        _deferred = None
        for number in handled:
            signal.signal(number, before[number])


def pending() -> int | None:
    """The deferred signal, if any."""
    return _deferred


def raise_deferred() -> None:
    """Raise the deferred signal, if any, as KeyboardInterrupt or Terminated."""
    if _deferred is not None:
        raise_signal(_deferred)


def raise_signal(number: int, frame: FrameType | None = None) -> None:
    """A signal handler that raises KeyboardInterrupt, or Terminated for SIGTERM."""
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _defer(number: int, frame: FrameType | None) -> None:
    global _deferred, _left
    if not _left:
        raise_signal(number)
    _left -= 1
    _deferred = _deferred or number
