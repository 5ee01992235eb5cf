"""Parts of a document as files of their own: tables as CSV, LaTeX or Markdown, figures as PDF or SVG."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from rlzoo.document.blocks import Block, Entry, Figure, Heading, Table
from rlzoo.document.drawing import Drawing, standalone
from rlzoo.document.markdown import render_markdown
from rlzoo.jobs.outputs import write_atomically


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


TABLE_FORMATS: Mapping[str, tuple[str, Callable[[Table], str]]] = {
    "csv": ("csv", to_csv),
    "latex": ("tex", to_latex),
    "markdown": ("md", lambda table: render_markdown([table])),
}
"""Name → the suffix of its files, and a function of a table."""
FIGURE_FORMATS: Mapping[str, Callable[[Drawing], str | bytes]] = {
    "pdf": lambda drawing: drawing.pdf(),
    "svg": lambda drawing: standalone(drawing.svg),
}
"""Name, and suffix, → a function of a drawing."""


def named(blocks: Iterable[Block]) -> Iterator[tuple[str, Table | Figure]]:
    """The tables of a document, named after its headings, and its figures, with their names, in order."""
    above: dict[int, str] = {}
    taken: set[str] = set()
    for block in blocks:
        if isinstance(block, Heading):
            above = {level: text for level, text in above.items() if level < block.level} | {block.level: block.text}
        elif isinstance(block, Table):
            words = " ".join(text for level, text in above.items() if level > 1)
            name = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
            names = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
            own = next(one for one in names if one not in taken)
            taken.add(own)
            yield own, block
        elif isinstance(block, Figure):
            yield block.name, block


def export(blocks: Iterable[Block], folder: Path, form: str) -> list[Path]:
    """Write every table of a document, named after its headings, or every figure, to a file of its own.

    ``form`` is a key of `TABLE_FORMATS` or of `FIGURE_FORMATS`. Returns the files.
    """
    files: dict[Path, str | bytes] = {}
    for name, block in named(blocks):
        if isinstance(block, Table) and form in TABLE_FORMATS:
            suffix, write = TABLE_FORMATS[form]
            files[folder / f"{name}.{suffix}"] = write(block)
        elif isinstance(block, Figure) and form in FIGURE_FORMATS:
            files[folder / f"{name}.{form}"] = FIGURE_FORMATS[form](block.drawing)
    for file, content in files.items():
        write_atomically(file, content)
    return list(files)
