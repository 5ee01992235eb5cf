"""Numbers and estimates as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NONE = "–"


def number(value: float | None, digits: int = 3) -> str:
    """A number to a few significant digits, with thousands separators."""
    if value is None:
        return NONE
    text = f"{value:,.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:.{digits}g}"
    return text.replace("-", "−")


def estimate(found: Mapping[str, Any] | None, digits: int = 2) -> str:
    """A value with its interval in brackets: ∞ where it has no upper end, no brackets where it has no width."""
    if found is None or found["value"] is None:
        return NONE
    value, low, high = number(found["value"]), found["ci_low"], found["ci_high"]
    if low is None and high is None:
        return value
    ends = NONE if low is None else number(low, digits), "∞" if high is None else number(high, digits)
    return value if ends[0] == ends[1] else f"{value} [{ends[0]}, {ends[1]}]"


def bound(found: Mapping[str, Any] | None) -> str:
    """An estimate; where there is none, as noise hides the value, its lower bound."""
    if found is not None and found["value"] is None and found["ci_low"] is not None:
        return f"> {number(found['ci_low'], 2)}"
    return estimate(found)
