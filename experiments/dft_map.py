"""When does DFT win? DFT - SFT over the base's competence × the styles demonstrated × the number of terms.

    python -m rlzoo.worlds.recipe --out bases --save-at 1200,1600,2400
    python -m rlzoo.experiments.dft_map --bases bases --runs runs/dft-map --out experiments/results/dft-map

Each field of the map is a comparison of its own, the experiment ``dft-map`` with another base and other chain sums, in
a folder of its own under ``--runs``: the same command resumes. ``--out`` gets map.json, the outcomes of all fields, of
which each is a benchmark, the figure map.svg, and the tables differences.csv and effects.csv. Fields that it has
already are not run again. Corners come first, and ``--fields 8`` stops after so many.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.figure import Figure

import rlzoo
from rlzoo.comparison.outcomes import ResultKey, ResultMatrix, difference_of, result_matrices, tested
from rlzoo.comparison.report.schema import read_run
from rlzoo.comparison.report.tables import p_number, percent, points
from rlzoo.comparison.statistics import SIGNIFICANT, holm
from rlzoo.config import BASE, Experiment, load_experiment
from rlzoo.document import Entry, Table
from rlzoo.document.drawing import STYLE, WIDTH, Drawing, standalone
from rlzoo.document.exports import to_csv
from rlzoo.jobs.outputs import replacing, write_atomically
from rlzoo.worlds.arithmetic import STYLES

STEPS = (1200, 1600, 2400, 3200)
"""Steps of the base's recipe; the last is the embedded base itself."""
NUMBERS = {1: ("running",), 3: STYLES}
"""The styles among the demonstrations, by their number."""
TERMS = (2, 3, 4)
METRICS = {"avg_at_k": "avg@4", "greedy": "greedy"}
COLUMNS = ("algorithm", "seed", "benchmark", "problem_id", "decoding", "sample", "correct")
"""The columns of outcomes that are kept."""


@dataclass(frozen=True)
class Field:
    """One field of the map."""

    steps: int
    """Steps of the base's recipe."""
    styles: int
    """The number of styles among the demonstrations, of which each problem has one."""
    terms: int
    """The number of terms of the chain sums, in training and test."""

    @property
    def name(self) -> str:
        """Its folder, and its benchmark in the outcomes of the map."""
        return f"steps-{self.steps}-styles-{self.styles}-terms-{self.terms}"

    def experiment(self, bases: Path) -> Experiment:
        """The comparison of the field."""
        where = f"world:arithmetic/{{}}?terms={self.terms}"
        changes = {
            "name": self.name,
            "model": "embedded" if self.steps == STEPS[-1] else str(bases / f"step-{self.steps}"),
            "train.source": f"{where.format('train')}&solutions=1&styles={','.join(NUMBERS[self.styles])}",
            "validation.source": where.format("validation"),
            "benchmarks": {self.name: {"source": where.format("test")}},
        }
        return load_experiment("dft-map", changes)


def fields() -> list[Field]:
    """All fields of the map: the corners first, then the edges, then the middle."""
    inside = {*STEPS[1:-1], *TERMS[1:-1]}
    every = [Field(*place) for place in product(STEPS, NUMBERS, TERMS)]
    return sorted(every, key=lambda field: (field.steps in inside) + (field.terms in inside))


def gain(matrices: Mapping[ResultKey, ResultMatrix], field: Field, metric: str) -> ResultMatrix:
    """DFT - SFT in a field, for each seed and problem."""
    difference = difference_of(*(matrices[name, field.name, metric] for name in ("dft", "sft")))
    assert difference is not None
    return difference


def differences(outcomes: pa.Table) -> list[dict[str, Any]]:
    """DFT - SFT per field and metric, as in `tested`, with p corrected for all of them (`holm`).

    Also the results of base, SFT and DFT. All are fractions.
    """
    matrices = result_matrices(outcomes, 4)
    rows: list[dict[str, Any]] = []
    for field, metric in product(_finished(outcomes), METRICS):
        means = {name: float(matrices[name, field.name, metric].values.mean()) for name in (BASE, "sft", "dft")}
        rows.append({**asdict(field), "metric": metric, **means, **tested(gain(matrices, field, metric))})
    return _corrected(rows)


def effects(outcomes: pa.Table) -> list[dict[str, Any]]:
    """How DFT - SFT changes from one style to three and from the weakest base to the strongest, as in `differences`.

    The mean over the pairs of fields that differ in nothing else, which share seeds and problems.
    """
    matrices, done = result_matrices(outcomes, 4), _finished(outcomes)
    rows: list[dict[str, Any]] = []
    for (axis, low, high), metric in product((("styles", 1, 3), ("steps", STEPS[0], STEPS[-1])), METRICS):
        pairs = [(field, replace(field, **{axis: high})) for field in done if getattr(field, axis) == low]
        both = [[gain(matrices, one, metric) for one in pair] for pair in pairs if pair[1] in done]
        if both:
            values = np.concatenate([more.values - less.values for less, more in both], axis=1)
            problems = tuple(f"{i}/{problem}" for i, (one, _) in enumerate(both) for problem in one.problems)
            benchmarks = np.repeat(np.arange(len(both)), [len(one.problems) for one, _ in both])
            change = ResultMatrix(values, both[0][0].seeds, problems, benchmarks)
            row = {"axis": axis, "from": low, "to": high, "metric": metric, "pairs": len(both)}
            rows.append(row | tested(change))
    return _corrected(rows)


def _corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p"] = p
    return rows


def _finished(outcomes: pa.Table) -> list[Field]:
    names = set(outcomes["benchmark"].unique().to_pylist())
    return [field for field in fields() if field.name in names]


def difference_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """DFT - SFT of each field in points, with the results of all three models: see `differences`."""
    body = [
        [f"{row['steps']} steps", str(row["styles"]), str(row["terms"]), METRICS[row["metric"]]]
        + [percent(row[name]) for name in (BASE, "sft", "dft")]
        + _estimate(row)
        for row in rows
    ]
    return _table(["base", "styles", "terms", "metric", "base (%)", "sft (%)", "dft (%)"], body)


def effect_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """How DFT - SFT changes along each axis, in points: see `effects`."""
    names = {"styles": "styles demonstrated", "steps": "steps of the base"}
    body = []
    for row in rows:
        change = f"{names[row['axis']]}: {row['from']} to {row['to']}"
        body.append([change, METRICS[row["metric"]], str(row["pairs"]), *_estimate(row)])
    return _table(["change", "metric", "pairs of fields"], body)


def _estimate(row: Mapping[str, Any]) -> list[str]:
    return [f"{points(row['difference'])} [{points(row['ci_low'])}, {points(row['ci_high'])}]", p_number(row["p"])]


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> Table:
    return Table([*header, "difference (points)", "p"], [[Entry(text) for text in row] for row in body])


def drawn(rows: Sequence[Mapping[str, Any]]) -> str:
    """The map: a panel per metric and number of styles; differences in bold are distinguishable from zero."""
    most = max(abs(row["difference"]) for row in rows)
    steps, terms = (sorted({row[axis] for row in rows}) for axis in ("steps", "terms"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.6 + 1.4 * len(steps)), layout="constrained")
        panels = figure.subplots(len(METRICS), len(NUMBERS), sharex=True, sharey=True, squeeze=False)
        for (line, metric), (column, styles) in product(enumerate(METRICS), enumerate(NUMBERS)):
            axes = panels[line, column]
            here = [row for row in rows if (row["metric"], row["styles"]) == (metric, styles)]
            grid = np.full((len(steps), len(terms)), np.nan)
            for row in here:
                place = steps.index(row["steps"]), terms.index(row["terms"])
                grid[place] = row["difference"]
                mean, low, high, base = (100 * row[key] for key in ("difference", "ci_low", "ci_high", BASE))
                text = f"{mean:+.1f}\n[{low:.1f}, {high:.1f}]\nbase {base:.0f}"
                weight = "bold" if row["p"] < SIGNIFICANT else "normal"
                words = text.replace("-", "−")
                axes.text(*place[::-1], words, ha="center", va="center", fontsize=8.5, fontweight=weight, color="black")
            axes.imshow(grid, cmap="PuOr_r", vmin=-1.6 * most, vmax=1.6 * most, aspect="auto", origin="lower")
            axes.set(title=f"{METRICS[metric]}, demonstrations in {styles} style{'s' * (styles > 1)}")
            axes.set_xticks(range(len(terms)), [f"{number} terms" for number in terms])
            axes.set_yticks(range(len(steps)), [f"base: {number} steps" for number in steps])
        return Drawing(figure).svg


def collected(runs: Path, field: Field) -> tuple[pa.Table, Any]:
    """The outcomes of a finished field, and its avg@4 on validation by algorithm and learning rate."""
    results = json.loads((runs / field.name / "results.json").read_text(encoding="utf-8"))
    return read_run(runs / field.name).outcomes.select(COLUMNS), results["learning_rates"]


def written(out: Path) -> tuple[list[pa.Table], dict[str, Any]]:
    """What a map that was written before has: its outcomes, and the results on validation by field."""
    if not (out / "map.json").is_file():
        return [], {}
    validation = json.loads((out / "map.json").read_text(encoding="utf-8"))["validation"]
    outcomes = pq.read_table(out / "outcomes.parquet")  # written before map.json, so it may have one field more
    return [outcomes.filter(pc.is_in(outcomes["benchmark"], pa.array(validation)))], validation


def write(out: Path, outcomes: pa.Table, validation: Mapping[str, Any]) -> None:
    """Write the map of finished fields."""
    rows, changes = differences(outcomes), effects(outcomes)
    with replacing(out / "outcomes.parquet") as beside:
        pq.write_table(outcomes, beside, compression="zstd")
    write_atomically(out / "differences.csv", to_csv(difference_table(rows)))
    write_atomically(out / "effects.csv", to_csv(effect_table(changes)))
    write_atomically(out / "map.svg", standalone(drawn(rows)))
    found = {"differences": rows, "effects": changes, "validation": validation}
    write_atomically(out / "map.json", json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Run the fields that have no results yet, and write the map of all finished ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=Path, required=True, help="where the recipe wrote its models")
    parser.add_argument("--runs", type=Path, required=True, help="the folder of the fields' comparisons")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the map")
    parser.add_argument("--fields", type=int, help="how many fields, the corners first (all)")
    parser.add_argument("--workers", type=int, help="how many cells run at a time (the number of cores)")
    given = parser.parse_args()
    tables, validation = written(given.out)
    for field in fields()[: given.fields]:
        if field.name not in validation:
            rlzoo.compare(field.experiment(given.bases), given.runs / field.name, given.workers)
            outcomes, validation[field.name] = collected(given.runs, field)
            tables.append(outcomes)
        write(given.out, pa.concat_tables(tables), validation)


if __name__ == "__main__":
    main()
