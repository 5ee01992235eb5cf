"""The section of a report with published results beside the measured ones."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from rlzoo.comparison.report import tables
from rlzoo.comparison.report.schema import FinishedRun, Results
from rlzoo.config import BASE, Reported, validated
from rlzoo.document import Block, Entry, Heading, Paragraph, Table
from rlzoo.document.estimates import NONE

MEAN = "mean"
"""The mean over benchmarks, in published results and as a column."""


def reported(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """Published results of this experiment and what its readers should know, if it has any."""
    config = run.results.settings
    if not config.get("reported"):
        return
    found, model = validated(Reported, config["reported"], "reported"), config.get("model")
    yield Heading("Reported and measured")
    yield Paragraph(
        f"Reported: {found.source}; model {found.model}, {found.metric}. Measured: this run; model {model}, "
        f"{run.results.label('avg_at_k', run.results.overall[-1])}. Both in per cent. A gain is the distance of the "
        "mean over benchmarks from the base model's, in percentage points."
    )
    if model != found.model or set(run.results.benchmarks) != _benchmarks(found):
        yield Paragraph(
            "This run has another model or other benchmarks than the publication: compare the order of the algorithms "
            "and the signs of their gains, not the numbers."
        )
    yield reported_table(run.results, found)
    yield from map(Paragraph, found.notes)


def reported_table(results: Results, found: Reported) -> Table:
    """Reported and measured results of each algorithm: on the benchmarks that both have, their mean, and the gain."""
    shared = [name for name in results.benchmarks if name in _benchmarks(found)]
    columns = [*shared, *([MEAN] if len(shared) != 1 else [])]
    header = [f"{name}, {kind}" for name in (*columns, "gain") for kind in ("reported", "measured")]
    rows = []
    for algorithm in dict.fromkeys((BASE, *found.results, *results.algorithms)):
        pairs = [(_reported(found, algorithm, name), _measured(results, algorithm, name)) for name in columns]
        entries = [Entry(tables.percent(value)) for pair in pairs for value in pair]
        means = [(_reported(found, one, MEAN), _measured(results, one, MEAN)) for one in (algorithm, BASE)]
        gains = [None if None in pair or algorithm == BASE else pair[0] - pair[1] for pair in zip(*means, strict=True)]
        entries += [Entry(NONE if gain is None else tables.points(gain)) for gain in gains]
        rows.append([Entry(algorithm), *entries])
    return Table(["algorithm", *header], rows)


def _benchmarks(found: Reported) -> set[str]:
    """The benchmarks of the publication for which there are numbers."""
    return {name for row in found.results.values() for name in row} - {MEAN}


def _reported(found: Reported, algorithm: str, benchmark: str) -> float | None:
    """A published result as a fraction; without a published mean, that of the benchmarks."""
    row = found.results.get(algorithm, {})
    value = row.get(benchmark)
    if value is None and benchmark == MEAN and row:
        value = statistics.fmean(row.values())
    return None if value is None else value / 100


def _measured(results: Results, algorithm: str, benchmark: str) -> float | None:
    """A measured avg@k as a fraction."""
    row = results.row(algorithm, results.overall[-1] if benchmark == MEAN else benchmark, "avg_at_k")
    return None if row is None else row.mean
