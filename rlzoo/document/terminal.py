"""Tables of a report for the terminal."""

from __future__ import annotations

import re

import rich.box
import rich.table
from rich.text import Text

from rlzoo.document.blocks import Table


def plain_table(table: Table, title: str) -> rich.table.Table:
    """A table for the terminal."""
    # narrow enough for 80 columns: an interval on two lines is unreadable
    out = rich.table.Table(
        title=Text(title),
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    for index, name in enumerate(table.header):
        longest = max((len(row[index].text) for row in table.rows), default=0)
        if len(name) > longest:  # a header in two lines leaves room for the numbers of other columns
            name = re.sub(r"(?<=,) | (?=\()", "\n", name)
        out.add_column(Text(name), justify="right" if table.is_number(index) else "left")
    for row in table.rows:
        out.add_row(*(Text(entry.text, style="bold" if entry.best else "") for entry in row))
    return out
