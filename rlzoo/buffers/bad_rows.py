"""Counts of bad rows, which cannot be used, and notes on good ones, with the messages about both."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rlzoo.config import OnBadRow
from rlzoo.errors import UserError

KEPT = 10
"""How many reasons are recorded."""
SHOWN = 3
"""How many reasons are printed."""


class BadRows:
    """What happens to bad rows: ``reject`` raises an error that names the row; ``drop`` leaves it out and counts it.

    Notes on good rows, such as completions that were cut, are counted as well (`note`).
    """

    def __init__(self, mode: OnBadRow = "reject") -> None:
        self.mode = mode
        self.rows = 0
        """The number of rows read, including bad ones."""
        self._places: dict[str, None] = {}
        self.first: list[str] = []
        """The first reasons, with their places."""
        self._noted: dict[str, tuple[set[str], str]] = {}

    @property
    def places(self) -> list[str]:
        """The rows that were dropped, in their order."""
        return list(self._places)

    @property
    def dropped(self) -> int:
        """The number of rows that were dropped."""
        return len(self._places)

    @property
    def untouched(self) -> bool:
        """Whether nothing has been read or noted yet."""
        return not (self.rows or self._places or self._noted)

    def to_json(self) -> dict[str, Any]:
        """All counts and notes, as plain data."""
        noted = {kind: [sorted(places), first] for kind, (places, first) in self._noted.items()}
        return {"rows": self.rows, "places": sorted(self._places), "first": self.first, "noted": noted}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from what `to_json` returned."""
        self.rows, self._places, self.first = state["rows"], dict.fromkeys(state["places"]), list(state["first"])
        self._noted = {kind: (set(places), first) for kind, (places, first) in state["noted"].items()}

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """A context in which a UserError means that the row at ``place`` is bad."""
        try:
            yield
        except UserError as error:
            self.refuse(place, error)

    def refuse(self, place: str, error: UserError) -> None:
        """Record a bad row and its error. Raises UserError, which names the place, unless bad rows are dropped."""
        reason = located(place, error)
        if self.mode == "reject":
            hint = "" if self.rows < 2 else " (or drop and count such rows: bad_rows: drop)"
            raise UserError(reason + hint) from None
        if place not in self._places:
            self._places[place] = None
            self.first = [*self.first, reason][:KEPT]

    def note(self, place: str, notes: Mapping[str, str]) -> None:
        """Record ``notes`` on a good row: what happened to it → an example. A row counts once per kind of note."""
        for kind, example in notes.items():
            places, _ = self._noted.setdefault(kind, (set(), f"{place}: {example}"))
            places.add(place)

    def events(self) -> list[str]:
        """The notes on good rows: one line per kind, with its count and first row."""
        return [f"{kind}: {len(places):,} in all ({first})" for kind, (places, first) in self._noted.items()]

    def lines(self) -> list[str]:
        """All lines to print: the dropped rows, then the notes."""
        dropped = dropped_line(self.summary())
        return [*([dropped] if dropped else []), *self.events()]

    def require_some(self, left: int) -> None:
        """Raise UserError if rows were dropped and none are ``left``."""
        if not left and self.dropped:
            raise UserError(f"all {self.dropped:,} rows are bad and were dropped; the first, {self.first[0]}")

    def summary(self) -> dict[str, Any] | None:
        """The number of dropped rows, of all rows, and the first reasons, as plain data; None if none were dropped."""
        return {"count": self.dropped, "of": self.rows, "first": list(self.first)} if self.dropped else None


@contextmanager
def collecting(bad: BadRows | None) -> Iterator[BadRows]:
    """The caller's ``bad``, for the caller to report; without one, bad rows are errors and notes become warnings."""
    if bad is not None:
        yield bad
        return
    own = BadRows()
    yield own
    for event in own.events():
        warnings.warn(event, stacklevel=4)


def located(place: str, error: UserError) -> str:
    """The message of an error, with the place that it is about."""
    return f"{place} {error}" if str(error).startswith(("is ", "has ", "holds ")) else f"{place}: {error}"


def dropped_line(summary: dict[str, Any] | None) -> str | None:
    """A `BadRows.summary` in one line."""
    if summary is None:
        return None
    reasons = "; ".join(summary["first"][:SHOWN])
    more = "; …" if summary["count"] > SHOWN else ""
    return f"dropped {summary['count']:,} of {summary['of']:,} rows (bad_rows: drop): {reasons}{more}"
