"""Counts and messages about rows that a run reads: bad rows, and what happened to good ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rlzoo.config import OnBadRow
from rlzoo.errors import UserError

KEPT = 10
"""Reasons that are recorded."""
SHOWN = 3
"""Reasons that are printed."""


class BadRows:
    """``reject`` raises a bad row's error with its place; ``drop`` leaves the row out and counts it.

    Notes on good rows are counted as well (`note`), such as completions that were cut.
    """

    def __init__(self, mode: OnBadRow = "reject") -> None:
        self.mode = mode
        self.rows = 0
        """Rows read, including bad ones."""
        self._places: set[str] = set()
        self._first: list[str] = []
        self._noted: dict[str, tuple[set[str], str]] = {}

    @property
    def dropped(self) -> int:
        """Rows that were dropped."""
        return len(self._places)

    @property
    def untouched(self) -> bool:
        """Whether no row was read yet, and nothing noted."""
        return not (self.rows or self._places or self._noted)

    def to_json(self) -> dict[str, Any]:
        """All that was counted, as plain data."""
        noted = {kind: [sorted(places), first] for kind, (places, first) in self._noted.items()}
        return {"rows": self.rows, "places": sorted(self._places), "first": self._first, "noted": noted}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `to_json` gave."""
        self.rows, self._places, self._first = state["rows"], set(state["places"]), list(state["first"])
        self._noted = {kind: (set(places), first) for kind, (places, first) in state["noted"].items()}

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """In this context, a UserError is that of the row at ``place``."""
        try:
            yield
        except UserError as error:
            self.refuse(place, error)

    def refuse(self, place: str, error: UserError) -> None:
        """Record a bad row and its error. Raises UserError unless bad rows are dropped."""
        reason = located(place, error)
        if self.mode == "reject":
            hint = "" if self.rows < 2 else " (or drop and count such rows: bad_rows: drop)"
            raise UserError(reason + hint) from None
        if place not in self._places:
            self._places.add(place)
            self._first = [*self._first, reason][:KEPT]

    def note(self, place: str, notes: Mapping[str, str]) -> None:
        """Note what happened to a good row → an example. A row counts once per kind."""
        for kind, example in notes.items():
            places, _ = self._noted.setdefault(kind, (set(), f"{place}: {example}"))
            places.add(place)

    def events(self) -> list[str]:
        """The notes on good rows: one line per kind, with its count and first row."""
        return [f"{kind}: {len(places):,} in all ({first})" for kind, (places, first) in self._noted.items()]

    def lines(self) -> list[str]:
        """All lines to print."""
        dropped = told(self.summary())
        return [*([dropped] if dropped else []), *self.events()]

    def require_some(self, left: int) -> None:
        """Raise UserError if rows were dropped and none is ``left``."""
        if not left and self.dropped:
            raise UserError(f"all {self.dropped:,} rows are bad and were dropped; the first, {self._first[0]}")

    def summary(self) -> dict[str, Any] | None:
        """The number of dropped rows, of all rows, and the first reasons, as plain data; None if none were dropped."""
        return {"count": self.dropped, "of": self.rows, "first": list(self._first)} if self.dropped else None


@contextmanager
def told_of(bad: BadRows | None) -> Iterator[BadRows]:
    """The caller's ``bad``, who reports it; without one, bad rows are rejected and notes become warnings."""
    if bad is not None:
        yield bad
        return
    own = BadRows()
    yield own
    for event in own.events():
        warnings.warn(event, stacklevel=4)


def located(place: str, error: UserError) -> str:
    """An error with its place, in one sentence."""
    return f"{place} {error}" if str(error).startswith(("is ", "has ", "holds ")) else f"{place}: {error}"


def told(summary: dict[str, Any] | None) -> str | None:
    """A `BadRows.summary` in one line."""
    if summary is None:
        return None
    reasons = "; ".join(summary["first"][:SHOWN])
    more = "; …" if summary["count"] > SHOWN else ""
    return f"dropped {summary['count']:,} of {summary['of']:,} rows (bad_rows: drop): {reasons}{more}"
