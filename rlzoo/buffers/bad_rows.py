"""What a run tells of the rows that it reads: those that cannot be used, and what was done to those that can."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rlzoo.config import OnBadRow
from rlzoo.errors import UserError

KEPT = 10
"""Reasons that are kept with a run."""
SHOWN = 3
"""Reasons that are printed."""


class BadRows:
    """``reject`` raises a bad row's error with its place; ``drop`` leaves the row out, and counts it.

    What is to be known of good rows is counted as well (`note`), such as completions that were cut.
    """

    def __init__(self, mode: OnBadRow = "reject") -> None:
        self.mode = mode
        self.rows = 0
        """Rows that were read, bad ones included."""
        self._places: set[str] = set()
        self._first: list[str] = []
        self._noted: dict[str, tuple[set[str], str]] = {}

    @property
    def dropped(self) -> int:
        """Rows that were dropped."""
        return len(self._places)

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Work on one row: a UserError in it is that row's."""
        try:
            yield
        except UserError as error:
            self.refuse(place, error)

    def refuse(self, place: str, error: UserError) -> None:
        """A row that cannot be used, and why. Raises UserError unless such rows are dropped."""
        reason = located(place, error)
        if self.mode == "reject":
            hint = "" if self.rows < 2 else " (or drop and count such rows: bad_rows: drop)"
            raise UserError(reason + hint) from None
        if place not in self._places:
            self._places.add(place)
            self._first = [*self._first, reason][:KEPT]

    def note(self, place: str, notes: Mapping[str, str]) -> None:
        """What is to be known of a good row: what happened → an example. A row is counted once for each."""
        for kind, example in notes.items():
            places, _ = self._noted.setdefault(kind, (set(), f"{place}: {example}"))
            places.add(place)

    def events(self) -> list[str]:
        """What is to be known of good rows: one line for each kind, with its count and its first row."""
        return [f"{kind}: {len(places):,} in all ({first})" for kind, (places, first) in self._noted.items()]

    def lines(self) -> list[str]:
        """All that is to be told."""
        dropped = told(self.summary())
        return [*([dropped] if dropped else []), *self.events()]

    def require_some(self, left: int) -> None:
        """Raises UserError if rows were dropped and none is ``left``."""
        if not left and self.dropped:
            raise UserError(f"all {self.dropped:,} rows are bad and were dropped; the first, {self._first[0]}")

    def summary(self) -> dict[str, Any] | None:
        """How many rows were dropped, of how many, and the first reasons, as plain data; None if none were."""
        return {"count": self.dropped, "of": self.rows, "first": list(self._first)} if self.dropped else None


@contextmanager
def told_of(bad: BadRows | None) -> Iterator[BadRows]:
    """The caller's ``bad``, who tells of it; without one, bad rows are refused and events become warnings."""
    if bad is not None:
        yield bad
        return
    own = BadRows()
    yield own
    for event in own.events():
        warnings.warn(event, stacklevel=4)


def located(place: str, error: UserError) -> str:
    """An error with its place: of a row as a whole, in one sentence."""
    return f"{place} {error}" if str(error).startswith(("is ", "has ", "holds ")) else f"{place}: {error}"


def told(summary: dict[str, Any] | None) -> str | None:
    """A `BadRows.summary` in one line."""
    if summary is None:
        return None
    reasons = "; ".join(summary["first"][:SHOWN])
    more = "; …" if summary["count"] > SHOWN else ""
    return f"dropped {summary['count']:,} of {summary['of']:,} rows (bad_rows: drop): {reasons}{more}"
