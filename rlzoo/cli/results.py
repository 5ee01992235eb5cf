"""``rlzoo results``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Option

from rlzoo.errors import UserError


def results(
    action: Annotated[
        Literal["list", "show", "compare", "export", "save", "refresh"],
        Argument(metavar="ACTION", help="list, show STUDY, compare A B, export STUDY, save RUN, or refresh PAGE..."),
    ] = "list",
    names: Annotated[
        list[str] | None,
        Argument(
            metavar="NAME...",
            help="A study, or a folder of rlzoo compare (to export or save, also of rlzoo variance), two algorithms, or"
            " pages.",
        ),
    ] = None,
    form: Annotated[
        Literal["csv", "latex", "markdown", "pdf", "svg", "lm-eval"],
        Option(
            "--format",
            metavar="FORMAT",
            help="Export every table as csv, latex or markdown, every figure as pdf or svg, or every sample as lm-eval "
            "logs samples.",
        ),
    ] = "markdown",
    to: Annotated[
        Path | None,
        Option(
            metavar="FOLDER",
            help="Folder for exported files (default: NAME-tables, NAME-figures or NAME-samples) or saved studies "
            "(default: rlzoo's own).",
        ),
    ] = None,
    as_json: Annotated[bool, Option("--json", help="list, show and compare: print the numbers as JSON.")] = False,
) -> int:
    """Show, compare and export the included studies: finished comparisons with all their outcomes, and analyses.

    refresh makes the tables and figures of Markdown pages again, where a marker names them, such as
    <!-- table: arithmetic results-chain-sums -->; names of tables and figures are those of exported files.

    Examples:
      rlzoo results
      rlzoo results show arithmetic
      rlzoo results compare dft sft
      rlzoo results show runs/arithmetic --json
      rlzoo results export arithmetic --format latex
      rlzoo results export arithmetic --format pdf
      rlzoo results export runs/variance --format pdf
      rlzoo results export arithmetic --format lm-eval
      rlzoo results save runs/arithmetic-20260101-120000 --to my-studies
      rlzoo results refresh docs/results.md
    """
    given = names or []
    wanted = {"list": 0, "show": 1, "compare": 2, "export": 1, "save": 1, "refresh": max(len(given), 1)}[action]
    if len(given) != wanted:
        what = "pages" if action == "refresh" else {0: "no name", 1: "one name", 2: "two algorithms"}[wanted]
        raise UserError(f"rlzoo results {action} takes {what}, not {len(given)}: see `rlzoo results --help`")
    if as_json and action not in ("list", "show", "compare"):
        raise UserError(f"rlzoo results {action} writes files: --json is for list, show and compare")
    from rich.console import Console

    from rlzoo.cli.tables import show
    from rlzoo.jobs.progress import counting, loading, reporting

    with loading():
        from rlzoo.cli.pages import blocks_of, refresh
        from rlzoo.comparison import studies
        from rlzoo.comparison.lm_eval import export_samples
        from rlzoo.comparison.report import report_table
        from rlzoo.comparison.report.differences import (
            CHECKS,
            across_tables,
            checks_explained,
            numbers_of,
            tables_of_tests,
        )
        from rlzoo.comparison.report.tables import facts_of, studies_table
        from rlzoo.document.exports import TABLE_FORMATS, export
        from rlzoo.document.terminal import plain_table

    def explained(seeds: int) -> str:
        return "\n".join(checks_explained(seeds)[: len(CHECKS)])

    console, log = Console(highlight=False, markup=False), Console(stderr=True)
    if action == "list":
        with reporting(log, "reading the studies"):
            found = {name: studies.read_study(name).results for name in studies.list_studies()}
        if as_json:
            return _print_json([facts_of(name, one) for name, one in found.items()])
        show(console, [plain_table(studies_table(found), "studies")])
    elif action == "show":
        with reporting(log, f"testing the differences of {given[0]}"):
            run = studies.read_study(given[0])
            if as_json:
                return _print_json(numbers_of(run))
            tables = [*report_table(run.results), *tables_of_tests(run)]
        show(console, tables)
        console.print(explained(len({cell.seed for cell in run.results.cells})), soft_wrap=True)
    elif action == "compare":
        with reporting(log, f"testing the differences of {given[0]} and {given[1]}"):
            rows = studies.compare_studies(given[0], given[1])
        if as_json:
            return _print_json(rows)
        pair = f"{given[0]} minus {given[1]}"
        show(console, [plain_table(table, f"{name}: {pair}") for name, table in across_tables(rows).items()])
        console.print(explained(max(row["seeds"] for row in rows)), soft_wrap=True)
        told = "Intervals are for single differences; p-values are corrected for all of them. detectable: the smallest "
        told += "difference in points that would be detected with 80 % power as a single planned one."
        console.print(told, soft_wrap=True)
    elif action == "export" and form == "lm-eval":
        for file in export_samples(given[0], to or Path(f"{Path(given[0]).name}-samples")):
            print(file)
    elif action == "export":
        kind = "tables" if form in TABLE_FORMATS else "figures"
        with reporting(log, f"making the {kind}"):
            files = export(blocks_of(given[0]), to or Path(f"{Path(given[0]).name}-{kind}"), form)
        for file in files:
            print(file)
    elif action == "refresh":
        with reporting(log, "reading the studies") as report:
            done = counting(len(given), "pages", report)
            for page in given:
                markers, changed = refresh(Path(page))
                done(1)
                print(f"{page}: {markers} tables and figures, {changed} files changed", flush=True)
    else:
        print(f"saved {studies.save_study(Path(given[0]), to or studies.STUDIES)}")
    return 0


def _print_json(found: Any) -> int:
    print(json.dumps(_plain(found), indent=1))
    return 0


def _plain(found: Any) -> Any:
    """The same for JSON, which has no NaN: an interval that does not exist has null ends."""
    if isinstance(found, dict):
        return {key: _plain(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_plain(value) for value in found]
    if isinstance(found, bool | int | str | None):
        return found
    return float(found) if math.isfinite(found) else None
