"""``rlzoo report``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from rlzoo.errors import UserError


def report(
    folders: Annotated[
        list[str],
        Argument(
            metavar="FOLDER...",
            help="Folders that rlzoo compare or rlzoo variance wrote, or names of studies (see rlzoo results). Several "
            "comparisons are shown side by side in one report.",
        ),
    ],
    baseline: Annotated[
        str | None,
        Option(metavar="NAME", help="Algorithm to compare the others with. Default: the experiment's baseline."),
    ] = None,
    out: Annotated[
        Path | None,
        Option(
            metavar="FOLDER",
            help="Folder for the report. Default: the comparison's own; for studies and several comparisons, "
            "runs/report-NAME.",
        ),
    ] = None,
) -> int:
    """Write report.md and report.html from the results in a folder, or from several side by side.

    Examples:
      rlzoo report runs/arithmetic
      rlzoo report runs/arithmetic --baseline dft
      rlzoo report arithmetic zoo --out runs/both
    """
    from rich.console import Console

    from rlzoo.jobs.progress import loading, reporting

    with loading():
        from rlzoo.comparison.report import distinct, write_report, write_report_of_several
        from rlzoo.comparison.studies import list_analyses, list_studies, study_folder
        from rlzoo.variance import report as variance_report

    included = [*list_studies(), *list_analyses()]
    studies = [name for name in folders if not Path(name).is_dir() and name in included]
    paths = [study_folder(name) if name in studies else Path(name) for name in folders]
    if len(paths) > 1 and baseline is not None:
        raise UserError("--baseline is for the report of one comparison: several are compared with the first of them")
    if len(paths) > 1 or studies:
        out = out or Path("runs") / f"report-{'-'.join(name.replace('/', '-') for name in distinct(paths))}"
    with reporting(Console(stderr=True), "writing the report"):
        if len(paths) > 1:
            write_report_of_several(paths, out or paths[0], shlex.join(["rlzoo", "report", *folders]))
        elif variance_report.is_analysis(paths[0]):
            variance_report.write_report(paths[0], out)
        else:
            write_report(paths[0], baseline, out)
    print(f"wrote {(out or paths[0]) / 'report.html'}")
    return 0
