"""``rlzoo report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def report(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Folder that rlzoo compare or rlzoo variance wrote.")],
    baseline: Annotated[
        str | None,
        Option(metavar="NAME", help="Algorithm to compare the others with. Default: the experiment's baseline."),
    ] = None,
) -> int:
    """Write report.md and report.html again from the results in a folder.

    Examples:
      rlzoo report runs/arithmetic
      rlzoo report runs/arithmetic --baseline dft
    """
    if (folder / "variance.json").is_file():
        from rlzoo.variance.report import write_report as write_variance_report

        write_variance_report(folder)
    else:
        from rlzoo.comparison.report import write_report

        write_report(folder, baseline)
    print(f"wrote {folder / 'report.html'}")
    return 0
