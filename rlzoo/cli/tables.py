"""Tables on standard output."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import Box
from rich.console import Console
from rich.table import Table

from rlzoo.cli.help import is_rich

PLAIN = Box("\n".join(["    ", "    ", " -- ", *["    "] * 5]) + "\n", ascii=True)
"""A line of dashes under the header, and no others."""
WIDE = 1000


def show(console: Console, tables: Iterable[Table]) -> None:
    """Print tables, without box-drawing characters unless standard output is a terminal (see `is_rich`).

    In a file or a pipe they are as wide as their entries: there nothing is cut.
    """
    if not console.is_terminal:
        console.width = WIDE
    for table in tables:
        if not is_rich():
            table.box = PLAIN
        console.print(table)
