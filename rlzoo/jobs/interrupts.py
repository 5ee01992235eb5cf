"""Ctrl-C and SIGTERM: raised at once, or deferred until a safe point."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 2.0
"""Seconds that a Ctrl-C is deferred before the user is told so."""
_deferred: int | None = None
_since: float | None = None
"""When a Ctrl-C was deferred after which the next is raised at once; None: there is none, or it has been raised."""
_insisted = False
_left = 0
_depth = 0


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM, which ends a command as Ctrl-C does, but with another exit status."""


@contextmanager
def signals_deferred(most: int = 1) -> Iterator[None]:
    """In this context, ``most`` signals are deferred until `raise_deferred`; the next one is raised at once.

    A Ctrl-C that is deferred for longer than `PATIENCE` is answered by one line on standard error.
    """
    global _deferred, _insisted, _left, _depth
    if threading.current_thread() is not threading.main_thread() or _depth:  # only the main thread receives signals
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, _defer)
    _left, _insisted = most, False
    _depth += 1
    ended = threading.Event()
    teller = threading.Thread(target=_tell, args=(ended,), name="interrupts", daemon=True)
    teller.start()
    try:
        yield
        raise_deferred()  # it arrived after the last safe point
    finally:
        ended.set()
        teller.join()
        _depth -= 1
        _deferred = None
        for number in handled:
            signal.signal(number, before[number])


def pending() -> int | None:
    """The deferred signal, if any."""
    return _deferred


def insisted() -> bool:
    """Whether a signal was raised at once, because the one before it had been deferred."""
    return _insisted


def raise_deferred() -> None:
    """Raise the deferred signal, if any, as KeyboardInterrupt or Terminated."""
    if _deferred is not None:
        raise_signal(_deferred)


def raise_signal(number: int, frame: FrameType | None = None) -> None:
    """A signal handler that raises KeyboardInterrupt, or Terminated for SIGTERM."""
    global _since
    _since = None
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _defer(number: int, frame: FrameType | None) -> None:
    global _deferred, _insisted, _left, _since
    if not _left:
        _insisted = True
        raise_signal(number)
    _left -= 1
    _deferred = _deferred or number
    if number == signal.SIGINT and not _left:
        _since = time.monotonic()  # for a thread that is running: a handler may interrupt the start of one


def _tell(ended: threading.Event) -> None:
    """Say once that a Ctrl-C is deferred, if it takes long."""
    while not ended.wait(PATIENCE / 10):
        if (since := _since) is not None and time.monotonic() - since >= PATIENCE:
            print("stopping at the next safe point; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)
            return
