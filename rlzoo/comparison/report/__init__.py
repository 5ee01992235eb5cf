"""The report of a comparison: a run directory's data as report.md, report.html and figures."""

from __future__ import annotations

from pathlib import Path

from rlzoo.comparison.report.contents import contents
from rlzoo.comparison.report.schema import read_run
from rlzoo.comparison.report.tables import report_table
from rlzoo.document import write_document

__all__ = ["report_table", "write_report"]


def write_report(directory: Path, baseline: str | None = None) -> None:
    """Write report.md, report.html and figures/ into a run directory, each file whole or not at all.

    ``baseline`` is the algorithm that the others are compared to: by default the first one, or the base model
    if there is only one. Raises UserError for a missing or broken file or unknown baseline, before writing.
    """
    run = read_run(directory)
    write_document(directory, f"{run.results.experiment} · rlzoo", list(contents(run, baseline)))
