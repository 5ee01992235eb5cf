"""The blocks of a report. Their text is plain; the renderers for HTML and Markdown escape it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple


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


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption."""

    name: str
    """The name of its file, without the ending."""
    svg: str
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


Block = Heading | Paragraph | Table | Figure | Code
