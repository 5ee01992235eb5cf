"""Tables of a document in other forms: CSV, LaTeX, Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping

from rlzoo.document.blocks import Entry, Table
from rlzoo.document.markdown import render_markdown


def to_csv(table: Table) -> str:
    """Comma-separated values, with a header; the best entries are not marked."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows([entry.text for entry in row] for row in table.rows)
    return out.getvalue()


def to_latex(table: Table) -> str:
    """A ``tabular`` for the package booktabs; the best entries are in bold."""
    columns = "".join("r" if table.is_number(column) else "l" for column in range(len(table.header)))

    def line(entries: list[Entry]) -> str:
        return " & ".join(rf"\textbf{{{_latex(e.text)}}}" if e.best else _latex(e.text) for e in entries) + r" \\"

    rows = [line(list(row)) for row in table.rows]
    head = line([Entry(name) for name in table.header])
    parts = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(parts) + "\n"


SIGNS = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "–": "--",
    "×": r"$\times$",
    "<": "$<$",
    ">": "$>$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def _latex(text: str) -> str:
    return re.sub("|".join(map(re.escape, SIGNS)), lambda found: SIGNS[found[0]], text)


FORMATS: Mapping[str, tuple[str, Callable[[Table], str]]] = {
    "csv": ("csv", to_csv),
    "latex": ("tex", to_latex),
    "markdown": ("md", lambda table: render_markdown([table])),
}
"""Name → the suffix of its files, and a function of a table."""
