"""Cells of a finished comparison that another one has too, so that they need not be trained again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from rlzoo.comparison.plan import Cell, cells, has_choice
from rlzoo.comparison.report.schema import OUTCOMES, read_results
from rlzoo.comparison.studies import study_folder
from rlzoo.config import Experiment
from rlzoo.config.validation import validated
from rlzoo.errors import UserError
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.jobs.pool import counted
from rlzoo.jobs.runs import changed_file, difference, versions

FREE = ("name", "description", "algorithms", "seeds", "baseline", "reported")
"""The settings in which two comparisons may differ and still have cells in common."""
REUSED = "reused"
"""The key of a cell's result that says which comparison it was trained in."""


def reusable(experiment: Experiment, name: str) -> dict[str, dict[str, Any]]:
    """The results of the cells of ``experiment`` that a finished comparison, or a study, has already, by cell id.

    They are those of rows with the same settings, which include the stages that they continue from, and unchanged
    plug-in files. A row whose learning rate is chosen on validation also needs the same seeds, which the choice depends
    on. Raises UserError if the comparisons differ in anything else that results depend on, and if no cell is the same.
    """
    folder = study_folder(name)
    results = read_results(folder)
    theirs = validated(Experiment, results.get("config"), str(folder / "results.json"))
    mine, other = (one.model_dump(mode="json", exclude=set(FREE)) for one in (experiment, theirs))
    if told := difference(other, mine, "settings") or changed_file(folder, mine):
        raise UserError(f"the cells of {name!r} cannot be reused ({told}): they must differ in rows and seeds alone")
    origin = {"comparison": theirs.name, "created": results["created"], "versions": results.get("versions", {})}
    found: dict[str, dict[str, Any]] = {}
    for row in experiment.algorithms:
        definition = _definition(experiment, row)
        if definition == _definition(theirs, row) and changed_file(folder, definition) is None:
            same = _cells_of(experiment, row, results)
            found |= {cell.id: {REUSED: origin, **result} for cell, result in same.items()}
    if not found:
        raise UserError(f"{name!r} has no cell of this comparison: no row has the same settings and a seed in common")
    outcomes = pq.read_table(folder / OUTCOMES)
    for result in found.values():
        if "metrics" in result:
            own = pc.equal(outcomes["algorithm"], result["algorithm"]), pc.equal(outcomes["seed"], result["seed"])
            result["outcomes"] = outcomes.filter(pc.and_(*own)).to_pylist()
    return found


def store(found: Mapping[str, dict[str, Any]], experiment: Experiment, state: Path) -> None:
    """Cache results of `reusable` under ``state``, as if the cells had been trained in this run."""
    trained, chosen = CachedResults(state / "cells"), CachedResults(state / "chosen")
    for name, result in found.items():
        if trained.read(name) is None:
            if has_choice(experiment, result["algorithm"]) and "metrics" in result:
                chosen.write(name, result)
            trained.write(name, result)


def origins(results: Iterable[Mapping[str, Any]], number: int) -> list[str]:
    """Where reused cells come from, in lines for a report; ``number`` is that of all cells."""
    by_origin: dict[str, list[Any]] = {}
    for result in results:
        if (origin := result.get(REUSED)) is not None:
            by_origin.setdefault(json.dumps(origin), []).append(result)
    lines = []
    for text, own in by_origin.items():
        origin, here = json.loads(text), versions()
        there = {package: version for package, version in origin["versions"].items() if here.get(package) != version}
        told = ", ".join(
            f"{package} {version} (here {here.get(package, 'none')})" for package, version in there.items()
        )
        lines.append(
            f"{len(own)} of {counted(number, 'cell')} are those of the comparison {origin['comparison']} of "
            f"{origin['created'][:10]}" + (f", which ran with {told}" if told else "")
        )
    return lines


def _definition(experiment: Experiment, row: str) -> dict[str, Any]:
    """The settings of a row and of the rows that it continues from, by name; empty if there is no such row."""
    names = dict.fromkeys((row, *experiment.stages_of(row)) if row in experiment.algorithms else ())
    free = {"online_counterpart"}
    return {name: experiment.algorithms[name].model_dump(mode="json", exclude=free) for name in names}


def _cells_of(experiment: Experiment, row: str, results: Mapping[str, Any]) -> dict[Cell, dict[str, Any]]:
    """The results of a row's cells; none of a row with a choice unless all cells that it depends on are there."""
    reported = {Cell(one["algorithm"], one["seed"], one["learning_rate"]).id: one for one in results["cells"]}
    tried: dict[str, dict[str, Any]] = {}
    for rate, some in results.get("tuning", {}).get(row, {}).items():
        for one in some:
            cell = {"algorithm": row, "seed": one["seed"], "learning_rate": float(rate)}
            tried[Cell(**cell).id] = {**cell, "training": [], **one}
    wanted = [cell for cell in cells(experiment) if cell.algorithm == row]
    found = {cell: {**tried.get(cell.id, {}), **reported.get(cell.id, {})} for cell in wanted}
    if has_choice(experiment, row):
        asked, there = {cell.seed for cell in wanted}, {one["seed"] for one in tried.values()}
        best = [result for result in found.values() if "metrics" in result]
        if asked != there or len(best) < len(asked) or not all(found.values()):
            return {}
    return {cell: result for cell, result in found.items() if result}
