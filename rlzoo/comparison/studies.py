"""Studies: finished comparisons and analyses in files small enough to commit, and differences across them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlzoo.comparison.outcomes import METRICS, ResultMatrix, difference_of, flipped, summarise, tested
from rlzoo.comparison.plan import Cell
from rlzoo.comparison.report.schema import CELLS, VARIANCE, FinishedRun, read_run, variance_file
from rlzoo.comparison.retention import summarise_retention
from rlzoo.comparison.statistics import holm
from rlzoo.config import BASE
from rlzoo.config.files import EXPERIMENTS
from rlzoo.errors import UserError, unknown
from rlzoo.jobs.outputs import replacing
from rlzoo.jobs.sources import path_of

STUDIES = EXPERIMENTS / "results"
"""The folder of the studies that are included in rlzoo."""
DIGITS = 6
"""The number of significant digits that are kept of metrics per training step."""


def list_studies() -> list[str]:
    """The names of the comparisons that are included in rlzoo."""
    return sorted(path.parent.name for path in STUDIES.glob("*/results.json"))


def list_analyses() -> list[str]:
    """The names of the analyses of `rlzoo variance` that are included in rlzoo by themselves, without a comparison."""
    return sorted({path.parent.name for path in STUDIES.glob(f"*/{VARIANCE}")} - set(list_studies()))


def study_folder(name: str) -> Path:
    """The folder of a study, given its name, or that of a finished run. Raises UserError for an unknown name."""
    if (folder := path_of(name)).is_dir():
        return folder
    if name not in (known := [*list_studies(), *list_analyses()]):
        raise unknown("study", name, known)
    return STUDIES / name


def read_study(name: str) -> FinishedRun:
    """A study, or a finished comparison, by name or folder. Raises UserError for an unknown name and broken files."""
    return read_run(study_folder(name))


def save_study(run: Path, into: Path = STUDIES, name: str | None = None) -> Path:
    """Save a finished comparison as a study: results.json, a JSON file per cell, and outcomes.parquet.

    Also what `rlzoo variance` measured for it, or an analysis by itself. Weights, buffers and reports are not saved;
    variances and metrics per training step are rounded to `DIGITS` digits. Raises UserError for a run with failed
    cells, and for a name that is taken. Returns the study's folder.
    """
    alone = (run / VARIANCE).is_file() and not (run / "results.json").is_file()
    results = {} if alone else _results(run)
    variance = variance_file(run)
    measured = None if variance is None else _rounded(json.loads(variance.read_text(encoding="utf-8")))
    study = into / (name or (results or measured or {})["experiment"])
    if study.exists():
        raise UserError(f"{str(study)!r} exists already: remove it first, or save to another folder (--to)")
    with replacing(study) as beside:
        beside.mkdir(parents=True)
        if not alone:
            _write_comparison(results, run / "outcomes.parquet", beside)
        if measured is not None:
            (beside / VARIANCE).write_text(json.dumps(measured) + "\n", encoding="utf-8")
    return study


def _results(run: Path) -> dict[str, Any]:
    """What results.json holds, with the statistics of this version. Raises UserError for a run with failed cells."""
    found = read_run(run)
    results: dict[str, Any] = json.loads((run / "results.json").read_text(encoding="utf-8"))
    if failed := results.get("failed"):
        raise UserError(f"{str(run)!r} has {len(failed)} failed cells: repeat the same `rlzoo compare` first")
    rows = summarise(found.outcomes, found.results.k)
    results["summary"] = [row for row in rows if row["algorithm"] != BASE]
    results["base_summary"] = [row for row in rows if row["algorithm"] == BASE]
    if found.results.retention is not None:
        k = {name: int(one.get("k", 1)) for name, one in found.results.retention.base.items()}
        results["retention"]["summary"] = summarise_retention(found.outcomes, k)
    return results


def _write_comparison(results: dict[str, Any], outcomes: Path, folder: Path) -> None:
    """Write results.json, a file per cell, and outcomes.parquet into a folder."""
    (folder / CELLS).mkdir()
    names = []
    for cell in results["cells"]:
        names.append(Cell(cell["algorithm"], cell["seed"], cell["learning_rate"]).id)
        kept = cell | {"training": _rounded(cell.get("training"))}
        (folder / CELLS / f"{names[-1]}.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")
    others = {key: value for key, value in results.items() if key != "cells"}  # names of cells are last
    (folder / "results.json").write_text(json.dumps(others | {"cells": names}, indent=1) + "\n", encoding="utf-8")
    (folder / "outcomes.parquet").write_bytes(outcomes.read_bytes())


def _rounded(value: Any) -> Any:
    """Plain data with numbers rounded to `DIGITS` digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def _content(matrix: ResultMatrix) -> tuple[object, ...]:
    """What is equal for results of the same cells."""
    return matrix.seeds, matrix.problems, matrix.values.tobytes()


def compare_studies(one: str, other: str, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The paired differences ``one`` - ``other`` of two algorithms in each study that has both, on every benchmark.

    Rows have the keys study, benchmark and metric and those of `tested` and `flipped`; differences are fractions, with
    95 % intervals. All p-values are corrected with `holm` for all rows, because they answer one question together;
    cells that two studies share, with the same results on the same problems, count once. Raises UserError for an
    unknown algorithm, and if no study has both.
    """
    names = list_studies() if names is None else names
    rows: list[dict[str, Any]] = []
    known: dict[str, None] = {}
    seen: set[tuple[object, ...]] = set()
    for name in names:
        run = read_study(name)
        matrices = run.matrices
        known |= dict.fromkeys(algorithm for algorithm, _, _ in matrices)
        for benchmark in run.results.overall:
            for metric in METRICS:
                pair = [matrices.get((algorithm, benchmark, metric)) for algorithm in (one, other)]
                if pair[0] is None or pair[1] is None:
                    continue
                difference = difference_of(pair[0], pair[1])
                if difference is None or (same := (metric, *_content(difference))) in seen:
                    continue
                seen.add(same)
                row: dict[str, Any] = {"study": name, "benchmark": benchmark, "metric": metric}
                rows.append(row | tested(difference) | flipped(pair[0], pair[1]))
    for algorithm in (one, other):
        if algorithm not in known:
            raise unknown("algorithm", algorithm, known)
    if not rows:
        raise UserError(f"no study has both {one!r} and {other!r}: see `rlzoo results list`")
    for key in ("p", "p_problems", "p_seeds"):
        for row, corrected in zip(rows, holm([row[key] for row in rows]), strict=True):
            row[key] = corrected
    return rows
