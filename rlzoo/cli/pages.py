"""Tables and figures of studies in pages of one's own, which `rlzoo results refresh` makes again.

A page is Markdown with markers, each above the table, or the image, that it stands for:

    <!-- table: arithmetic results-chain-sums; rows: base, sft, dft; columns: avg@4, greedy -->
    <!-- figure: arithmetic training-loss -->
    <!-- comparison: dft sft; rows: arithmetic, facts -->

A table or figure is a study, or a folder of a finished comparison or analysis, and a part of its report, by the name
that `rlzoo results export` gives to its file; other studies have their tables as NAME.csv, and figures as NAME.svg. A
comparison is that of `rlzoo results compare`, a row per study and benchmark. ``rows`` and ``columns`` leave out the
others; ``baseline`` is that of differences.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from rlzoo.comparison.report.contents import contents
from rlzoo.comparison.report.differences import across_table
from rlzoo.comparison.studies import STUDIES, compare_studies, read_study, study_folder
from rlzoo.document import Block, Entry, Figure, Table, render_markdown
from rlzoo.document.drawing import standalone
from rlzoo.document.exports import named
from rlzoo.errors import UserError, unknown
from rlzoo.jobs.outputs import write_atomically
from rlzoo.variance.report import is_analysis, read_report

MARKER = re.compile(r"^<!-- (table|figure|comparison): (.+?) -->\n((?:\|.*\n)+|!\[.*\n|)", re.M)
"""The kind, the part with its options, and what is below: the lines of a table, an image, or nothing."""
OPTIONS = ("rows", "columns", "baseline")


@dataclass
class Parts:
    """The tables and figures of a report by name, made as far as they are asked for."""

    study: str
    made: Iterator[tuple[str, Table | Figure]]
    known: dict[tuple[type, str], Table | Figure] = field(default_factory=dict)

    def find(self, kind: type[Table] | type[Figure], name: str) -> Table | Figure:
        """The part of a name. Raises UserError for an unknown one."""
        while (kind, name) not in self.known:
            if (one := next(self.made, None)) is None:
                raise unknown(f"{kind.__name__.lower()} of {self.study}", name, [n for k, n in self.known if k is kind])
            self.known[type(one[1]), one[0]] = one[1]
        return self.known[kind, name]


@cache
def parts_of(study: str, baseline: str | None = None) -> Parts:
    """The parts of a study's report. Raises UserError for an unknown study."""
    return Parts(study, named(blocks_of(study, baseline)))


def blocks_of(study: str, baseline: str | None = None) -> Iterable[Block]:
    """The report of a study, or of a folder of a comparison or an analysis. Raises UserError for an unknown study."""
    folder = study_folder(study)
    return read_report(folder)[1] if is_analysis(folder) else contents(read_study(study), baseline)


@cache
def _compared(one: str, other: str) -> Table:
    return across_table(compare_studies(one, other))


def refreshed(text: str, folder: Path) -> tuple[str, dict[Path, str]]:
    """A page in ``folder`` with its tables made again, and its figures, as SVG: file → content.

    Raises UserError, naming the line, for a marker that names no part, or a figure without an image below it.
    """
    figures: dict[Path, str] = {}

    def again(found: re.Match[str]) -> str:
        line = text.count("\n", 0, found.start()) + 1
        try:
            return _below(found, folder, figures)
        except UserError as error:
            raise UserError(f"line {line}: {error}") from None

    return MARKER.sub(again, text), figures


def refresh(page: Path) -> tuple[int, int]:
    """Make the tables and figures of a page again, in place. Returns how many it has, and how many files changed.

    Raises UserError for a page that cannot be read, or without a marker, and as `refreshed` does.
    """
    try:
        before = page.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{str(page)!r} cannot be read ({error}): name a Markdown page") from None
    if not (markers := len(MARKER.findall(before))):
        raise UserError(f"{str(page)!r} has no marker, such as <!-- table: arithmetic results-chain-sums -->")
    try:
        after, files = refreshed(before, page.parent)
    except UserError as error:
        raise UserError(f"{str(page)!r} {error}") from None
    changed = [
        file
        for file, content in {**files, page: after}.items()
        if not file.is_file() or file.read_text(encoding="utf-8") != content
    ]
    for file in changed:
        write_atomically(file, {**files, page: after}[file])
    return markers, len(changed)


def _below(found: re.Match[str], folder: Path, figures: dict[Path, str]) -> str:
    """A marker with what stands below it, made again."""
    kind, told, below = found.groups()
    place, *given = told.split("; ")
    study, _, name = place.partition(" ")
    options = dict(_option(one) for one in given)
    part: Table | Figure | str
    if kind == "comparison":
        part = _compared(study, name)
    elif kind == "table" and (file := STUDIES / study / f"{name}.csv").is_file():
        header, *rows = csv.reader(file.read_text(encoding="utf-8").splitlines())
        part = Table(header, [[Entry(text) for text in row] for row in rows])
    elif kind == "figure" and (file := STUDIES / study / f"{name}.svg").is_file():
        part = file.read_text(encoding="utf-8")
    else:
        part = parts_of(study, options.pop("baseline", None)).find(Table if kind == "table" else Figure, name)
    head = found[0].partition("\n")[0] + "\n"
    if isinstance(part, Table):
        if below.startswith("!"):
            raise UserError(f"an image is below the marker of {told!r}: write `figure`, or remove the image")
        return head + render_markdown([_chosen(part, options)])
    image = re.fullmatch(r"!\[[^\]]*\]\(([^)]+\.svg)\)\n", below)
    if image is None:
        raise UserError(f"the figure {name!r} needs an image below its marker, such as ![...](figures/{name}.svg)")
    figures[folder / image[1]] = part if isinstance(part, str) else standalone(part.drawing.svg)
    return head + below


def _option(text: str) -> tuple[str, str]:
    name, _, value = text.partition(": ")
    if name not in OPTIONS:
        raise unknown("option of a marker", name, OPTIONS)
    return name, value


def _chosen(table: Table, options: Mapping[str, str]) -> Table:
    """The table with the rows and columns that are asked for, in its own order. Raises UserError for unknown ones."""
    columns = [re.sub(r" \([^)]*\)$", "", name) for name in table.header]
    kept = _kept("column", columns, options.get("columns"))
    rows = _kept("row", [row[0].text for row in table.rows], options.get("rows"))
    keep = [0, *(index for index in kept if index)]
    body = [[table.rows[row][column] for column in keep] for row in rows]
    return replace(table, header=[table.header[column] for column in keep], rows=body)


def _kept(what: str, names: Sequence[str], asked: str | None) -> list[int]:
    wanted = list(names) if asked is None else asked.split(", ")
    for name in wanted:
        if name not in names:
            raise unknown(f"{what} of the table", name, names)
    return [index for index, name in enumerate(names) if name in wanted]
