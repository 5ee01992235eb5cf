"""Times of the day and dates, as people write them."""

from __future__ import annotations

import re
from typing import NamedTuple

_CLOCK = re.compile(
    r"(\d{1,2})(?::([0-5]\d)(?::([0-5]\d))?)?(?: ?\(?(?:\\text\{)? ?([ap])\.? ?m\b\.?\}?\)?)?", re.IGNORECASE
)


def clock(text: str) -> tuple[tuple[int, int, int], str] | None:
    """A time of the day, 5:30 or 5 pm: hours, minutes and seconds as written, and "a", "p" or nothing."""
    match = _CLOCK.fullmatch(text)
    if match is None or int(match[1]) > 24 or not (match[2] or match[4]):
        return None
    return (int(match[1]), int(match[2] or 0), int(match[3] or 0)), (match[4] or "").lower()


def same_time(one: tuple[tuple[int, int, int], str], other: tuple[tuple[int, int, int], str]) -> bool:
    """Whether two times are the same, where both say so with am or pm in the same half of the day."""
    (_, *one_rest), (_, *other_rest) = one[0], other[0]
    return one_rest == other_rest and not _hours(*one).isdisjoint(_hours(*other))


def _hours(time: tuple[int, int, int], half: str) -> set[int]:
    """The hours of the day, 0 to 23, that a time may stand for: two if it is from 1 to 12 without am or pm."""
    if not 1 <= time[0] <= 12:
        return {time[0] % 24}
    hour = time[0] % 12
    return {hour + 12 * (half == "p")} if half else {hour, hour + 12}


class Date(NamedTuple):
    """A date; what it leaves out is None."""

    year: int | None
    month: int
    day: int | None


_MONTHS = ["january", "february", "march", "april", "may", "june"]
_MONTHS += ["july", "august", "september", "october", "november", "december"]
_MONTH = rf"(?P<name>{'|'.join(f'{month[:3]}(?:{month[3:]})?' for month in _MONTHS)}|sept)\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_DATES = tuple(
    re.compile(rf"(?:[a-z]+day,? )?(?:the )?{pattern}", re.IGNORECASE)
    for pattern in (
        rf"{_MONTH} {_DAY}(?:,? (?P<year>\d{{4}}))?",
        rf"{_DAY}(?: of)? {_MONTH}(?:,? (?P<year>\d{{4}}))?",
        rf"{_MONTH},? (?P<year>\d{{4}})",
        r"(?P<year>\d{4})(?P<sign>[-/.])(?P<month>\d{1,2})(?P=sign)(?P<day>\d{1,2})",
        r"(?:(?P<year>\d{4})年)?(?P<month>\d{1,2})月(?:(?P<day>\d{1,2})日)?",
    )
)
"""1/5/2024 is none of them: it is the first of May to some, and the fifth of January to others."""


def date(text: str) -> Date | None:
    """The date that a clean text is: January 5, 2024; 5 Jan 2024; 2024-01-05."""
    match = next((found for pattern in _DATES if (found := pattern.fullmatch(text))), None)
    if match is None:
        return None
    part = match.groupdict()
    year, day = (int(part[name]) if part.get(name) else None for name in ("year", "day"))
    month = part.get("month") or [name[:3] for name in _MONTHS].index(part["name"][:3].lower()) + 1
    return Date(year, int(month), day)


def same_date(date: Date, gold: Date) -> bool:
    """Whether a date is the one that is asked for, of any year if that names none."""
    return date[1:] == gold[1:] and gold.year in (None, date.year)
