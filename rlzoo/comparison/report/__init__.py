"""The report of a comparison: a run's folder as report.md, report.html and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from rlzoo.comparison.report.contents import contents
from rlzoo.comparison.report.schema import read_run
from rlzoo.comparison.report.several import contents_of_several
from rlzoo.comparison.report.terminal import report_table
from rlzoo.document import write_document
from rlzoo.errors import UserError
from rlzoo.jobs.outputs import write_atomically

__all__ = ["report_table", "write_report", "write_report_of_several"]


def write_report(directory: Path, baseline: str | None = None, out: Path | None = None) -> None:
    """Write report.md, report.html, figures/ and a missing experiment.yaml into a run's folder, or ``out``, atomically.

    ``baseline`` is the algorithm that the others are compared with: see `Results.baseline`. Raises UserError for a
    missing or broken file or an unknown baseline, before anything is written.
    """
    run, folder = read_run(directory), out or directory
    blocks = list(contents(run, baseline))
    experiment = folder / "experiment.yaml"
    if run.results.config is not None and (folder != directory or not experiment.is_file()):
        write_atomically(experiment, yaml.safe_dump(run.results.config, sort_keys=False))  # as the report says
    write_document(folder, f"{run.results.experiment} · rlzoo", blocks)


def write_report_of_several(folders: Sequence[Path], out: Path, command: str) -> None:
    """Write one report of several runs, which a command asked for; as `write_report`.

    Raises UserError for a missing or broken file, and for the same folder twice.
    """
    names = distinct(folders)
    runs = {name: read_run(folder) for name, folder in zip(names, folders, strict=True)}
    write_document(out, f"{', '.join(names)} · rlzoo", list(contents_of_several(runs, command)))


def distinct(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart. Raises UserError for the same folder twice."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{', '.join(map(str, folders))}: the same run twice; name different runs")
