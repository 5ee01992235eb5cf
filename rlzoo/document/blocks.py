"""A report as a list of blocks. Their text is plain: the renderers know HTML and Markdown, and escape it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Entry(NamedTuple):
    """One entry of a table."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading; the page's title has level 1."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; the one that answers the reader's question leads."""

    text: str
    lead: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column, and the one named ``prose``, hold text; the others hold numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    prose: str | None = None

    def is_number(self, column: int) -> bool:
        return column > 0 and self.header[column] != self.prose


@dataclass(frozen=True)
class Figure:
    """A drawing, what a reader who cannot see it should know, and what it shows and does not show."""

    name: str
    svg: str
    alt: str
    shows: str
    hides: str


@dataclass(frozen=True)
class Code:
    """Text that a program or a model wrote, shown as it is."""

    text: str
    language: str = "text"


Block = Heading | Paragraph | Table | Figure | Code
