"""The report of a comparison: a run's folder as report.md, report.html and figures."""

from __future__ import annotations

from pathlib import Path

from rlzoo.comparison.report.contents import contents
from rlzoo.comparison.report.schema import read_run
from rlzoo.comparison.report.terminal import report_table
from rlzoo.document import write_document

__all__ = ["report_table", "write_report"]


def write_report(directory: Path, baseline: str | None = None) -> None:
    """Write report.md, report.html and figures/ into a run's folder, each file atomically.

    ``baseline`` is the algorithm that the others are compared with: by default the first, or the base model if there is
    only one. Raises UserError for a missing or broken file or an unknown baseline, before anything is written.
    """
    run = read_run(directory)
    write_document(directory, f"{run.results.experiment} · rlzoo", list(contents(run, baseline)))
