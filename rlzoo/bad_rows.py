"""What happens to a row of a table that cannot be used: it stops the run, or it is dropped and counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rlzoo.errors import UserError

OnBadRow = Literal["reject", "drop"]
KEPT = 10
"""Reasons that are kept with a run."""
SHOWN = 3
"""Reasons that are printed."""


class BadRows:
    """``reject`` raises a bad row's error with its place; ``drop`` leaves the row out, and counts it."""

    def __init__(self, mode: OnBadRow = "reject") -> None:
        self.mode = mode
        self.rows = 0
        """Rows that were read, bad ones included."""
        self._places: set[str] = set()
        self._first: list[str] = []

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

    def require_some(self, left: int) -> None:
        """Raises UserError if rows were dropped and none is ``left``."""
        if not left and self.dropped:
            raise UserError(f"all {self.dropped:,} rows are bad and were dropped; the first, {self._first[0]}")

    def summary(self) -> dict[str, Any] | None:
        """How many rows were dropped, of how many, and the first reasons, as plain data; None if none were."""
        return {"count": self.dropped, "of": self.rows, "first": list(self._first)} if self.dropped else None


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
