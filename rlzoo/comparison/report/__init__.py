"""The report of a comparison: a run directory's data as report.md, report.html and figures."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rlzoo.comparison.report.contents import contents
from rlzoo.comparison.report.document import Figure
from rlzoo.comparison.report.markdown import FIGURES, render_markdown
from rlzoo.comparison.report.page import render_html
from rlzoo.comparison.report.plots import standalone
from rlzoo.comparison.report.schema import read_run
from rlzoo.comparison.report.tables import report_table

__all__ = ["report_table", "write_report"]


def write_report(directory: Path, baseline: str | None = None) -> None:
    """Write report.md, report.html and figures/ into a run directory, each file whole or not at all.

    ``baseline`` is the algorithm that the others are compared to: by default the first one, or the base model
    if there is only one. Raises UserError for a missing or broken file or unknown baseline, before writing.
    """
    run = read_run(directory)
    blocks = list(contents(run, baseline))
    files = {
        directory / FIGURES / f"{block.name}.svg": standalone(block.svg)
        for block in blocks
        if isinstance(block, Figure)
    }
    files[directory / "report.md"] = render_markdown(blocks)
    files[directory / "report.html"] = render_html(f"{run.results.experiment} · rlzoo", blocks)
    for path, content in files.items():
        write_atomically(path, content)


def write_atomically(path: Path, content: str) -> None:
    """Write a text file through a temporary one in the same folder, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", errors="replace", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
        except BaseException:
            temporary.unlink()
            raise
    temporary.chmod(0o644)
    temporary.replace(path)
