"""The section of a report on what was learned of the problems that the base gets wrong, and kept of the others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rlzoo.comparison.outcomes import ResultMatrix
from rlzoo.comparison.report.schema import FinishedRun
from rlzoo.comparison.report.tables import percent
from rlzoo.comparison.statistics import result_interval
from rlzoo.config import BASE
from rlzoo.document import Block, Entry, Heading, Paragraph, Table
from rlzoo.document.estimates import NONE


def learned_and_kept(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """Greedy accuracy on the problems that the base gets wrong, and on those that it gets right, per benchmark."""
    tables = {benchmark: _table(run, benchmark) for benchmark in run.results.benchmarks}
    if not any(tables.values()):
        return
    yield Heading("Learned and kept")
    yield Paragraph(
        "Accuracy in greedy decoding on two kinds of problems: those that the base model gets wrong in greedy decoding "
        "(learned) and those that it gets right (kept), with 95 % intervals over further seeds and problems of the "
        "kind. A model that does not change has 0 and 100."
    )
    for benchmark, table in tables.items():
        if table is not None:
            yield Heading(benchmark, level=3)
            yield table


def _table(run: FinishedRun, benchmark: str) -> Table | None:
    base = run.matrices.get((BASE, benchmark, "greedy"))
    if base is None:
        return None
    right = base.values.mean(0) > 0.5
    kinds = [tuple(np.array(base.problems)[kind]) for kind in (~right, right)]
    rows = [
        [Entry(name), *(Entry(_accuracy(matrix, problems)) for problems in kinds)]
        for name in run.results.algorithms
        if (matrix := run.matrices.get((name, benchmark, "greedy"))) is not None
    ]
    labels = [f"{what} of {len(kind)} (%)" for what, kind in zip(("learned", "kept"), kinds, strict=True)]
    return Table(["algorithm", *labels], rows) if rows else None


def _accuracy(matrix: ResultMatrix, problems: tuple[str, ...]) -> str:
    if not problems:
        return NONE
    mean, low, high = result_interval(matrix.on(problems).values)
    return percent(mean) if np.isnan(low) else f"{percent(mean)} [{percent(low)}, {percent(high)}]"
