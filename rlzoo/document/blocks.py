"""The blocks of a report. Their text is plain; the renderers for HTML and Markdown escape it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rlzoo.document.drawing import Drawing


class Entry(NamedTuple):
    """One entry of a table."""

    text: str
    best: bool = False
    """Whether it is shown in bold."""


@dataclass(frozen=True)
class Heading:
    """A heading; the title of the page has level 1."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph."""

    text: str
    lead: bool = False
    """Whether it answers the question of the report, and stands out."""


@dataclass(frozen=True)
class Table:
    """A table. Its first column, the one named ``prose`` and those named ``words`` contain text, the others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    prose: str | None = None
    """A column of sentences, which is wide."""
    words: Collection[str] = ()
    """Columns of names."""

    def is_number(self, column: int) -> bool:
        """Whether a column contains numbers, which are aligned to the right."""
        return column > 0 and self.header[column] not in (self.prose, *self.words)

    def is_prose(self, column: int) -> bool:
        """Whether a column contains sentences, which are broken into lines."""
        return column > 0 and self.header[column] == self.prose


FACTORS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def sort_value(text: str) -> float | None:
    """The number that an entry is sorted by: its value without its interval, unit and p-value; None if it has none.

    As tables show numbers: with a typographic minus, thousands separators, SI prefixes, durations such as 2 h 5 min,
    powers such as 10^300, and bounds such as < 0.001, which come before the bound itself.
    """
    found = re.match(r"([<>]?) ?([+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(\^-?\d+)?", text.replace("−", "-"))
    if found is None:
        return None
    value, rest = float(found[2].replace(",", "")), text[found.end() :]
    if found[3]:
        return value ** float(found[3][1:]) if abs(float(found[3][1:])) < 300 else math.inf
    if parts := re.findall(r"(\d+(?:\.\d+)?) (s|min|h)\b", text.partition("[")[0]):
        value = sum(float(number) * SECONDS[unit] for number, unit in parts)
    elif unit := re.match(r" ([kMGTPE]?)B?(?: |$)", rest):
        value *= FACTORS[unit[1]]
    return value + {"<": -1e-9, "": 0.0, ">": 1e-9}[found[1]] * abs(value)


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption."""

    name: str
    """The name of its file, without the ending."""
    drawing: Drawing
    alt: str
    """What a reader who cannot see the drawing should know."""
    shows: str
    """The caption: what the drawing shows."""
    hides: str
    """The caption: what the drawing does not show."""


@dataclass(frozen=True)
class Code:
    """Text written by a program or a model, shown verbatim."""

    text: str
    language: str = "text"


@dataclass(frozen=True)
class Answer:
    """What one model answered."""

    name: str
    correct: bool
    text: str
    note: str = ""


@dataclass(frozen=True)
class Answers:
    """A problem and several models' answers to it, side by side, each marked as right or wrong."""

    name: str
    prompt: str
    answers: Sequence[Answer]


Block = Heading | Paragraph | Table | Figure | Code | Answers
