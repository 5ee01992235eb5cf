"""Lines in the log, and periodic ones, so that long work does not seem to hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console

EVERY = 20.0
"""Seconds between two lines."""


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print one line verbatim; a terminal may wrap it, but a log keeps it whole."""
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


class Heartbeat:
    """Logs the current activity every `EVERY` seconds, unless the console is a terminal, which has a live view."""

    def __init__(self, console: Console, doing: str) -> None:
        self.doing: Callable[[], str] = lambda: doing
        """The current activity, or nothing; called from another thread."""
        self._console, self._ended = console, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def report(self, share: float, detail: str) -> None:
        """Set the current activity; the signature is that of a task's reporter."""
        self.doing = lambda: detail

    def __enter__(self) -> Heartbeat:
        if not self._console.is_terminal:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _beat(self) -> None:
        started = time.monotonic()
        while not self._ended.wait(EVERY):
            elapsed = timedelta(seconds=round(time.monotonic() - started))
            if doing := self.doing():  # between two stages there may be nothing to say
                say(self._console, f"  {elapsed} {doing}")
