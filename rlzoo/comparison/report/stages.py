"""The parts of a report about training in stages: the warm-up, and results before and after the later stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rlzoo.comparison.outcomes import METRICS, ResultKey, ResultMatrix, difference_of, result_matrices
from rlzoo.comparison.report.schema import FinishedRun, Results
from rlzoo.comparison.report.tables import amount, on, percent, points, seconds, significance, size
from rlzoo.comparison.statistics import SIGNIFICANT, crossed_interval, detectable_difference, holm, p_value
from rlzoo.document import Block, Entry, Heading, Paragraph, Table

Matrices = Mapping[ResultKey, ResultMatrix]


def start(results: Results) -> str:
    """A sentence about the model that every cell started from."""
    if (warm := results.warm_up) is None:
        return "Every algorithm started from the base model."
    config = results.settings
    own = (config.get("warm_up") or {}).get("train") or config.get("train") or {}
    learned = f" on {own['source']}" if "source" in own else ""
    model = config.get("model", "the model")
    return (
        f"The base model, from which every algorithm started, is {model} after a warm-up that all cells share: "
        f"{warm.steps} steps of {warm.objective}{learned}, with {amount(warm.costs.gradient_tokens)} gradient tokens, "
        f"{amount(warm.costs.flops)} FLOPs and {seconds(warm.costs.wall_seconds)}, which are not part of any cell's "
        "costs."
    )


def before_and_after(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """What the later stages change, for rows that differ in their first stage: whether they change the ranking."""
    groups = groups_of(run.results)
    if not groups:
        return
    matrices = result_matrices(run.outcomes, run.results.k)
    yield Heading("Before and after")
    yield Paragraph(
        "Rows with the same later stages differ in what came first. Before: the result of the first stage as a row of "
        "its own, trained in the same way. After: the result once the later stages have been trained on top. "
        "Differences are paired, in percentage points, with 95 % intervals; p-values are corrected for the number of "
        "rows in the table (Holm), and those below 0.05 are bold. Ranks are among the rows of the table; rows whose "
        "ranks differ need not be distinguishable. The last column is the smallest difference in points that would be "
        "detected with 80 % power as a single planned one."
    )
    for later, rows in groups.items():
        for benchmark in run.results.overall:
            table = _table(run.results, matrices, rows, benchmark)
            if table is None:
                continue
            yield Heading(f"{', then '.join(later)}: {benchmark}", level=3)
            if ranking := _ranking(matrices, rows, benchmark):
                yield Paragraph(f"By {run.results.label('avg_at_k', benchmark)} {on(benchmark)}, {ranking}.")
            yield table


def groups_of(results: Results) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows with stages that have results: later stages → first stage → row."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for name, row in (results.settings.get("algorithms") or {}).items():
        if (stages := row.get("stages")) and name in results.algorithms and stages[0] in results.algorithms:
            found.setdefault(tuple(stages[1:]), {})[stages[0]] = name
    return found


@dataclass(frozen=True)
class _Change:
    """The results of a first stage and of the row that continues it, on their common seeds; fractions."""

    before: float
    after: float
    difference: ResultMatrix


def _changes(matrices: Matrices, rows: Mapping[str, str], benchmark: str, metric: str) -> dict[str, _Change]:
    """First stage → what the later stages change."""
    found = {}
    for first, row in rows.items():
        before, after = matrices.get((first, benchmark, metric)), matrices.get((row, benchmark, metric))
        if before is None or after is None or (difference := difference_of(after, before)) is None:
            continue
        means = [float(one.values[np.isin(one.seeds, difference.seeds)].mean()) for one in (before, after)]
        found[first] = _Change(means[0], means[1], difference)
    return found


def _table(results: Results, matrices: Matrices, rows: Mapping[str, str], benchmark: str) -> Table | None:
    """One line per metric and first stage; None without any."""
    lines = []
    for metric in METRICS:
        changes = _changes(matrices, rows, benchmark, metric)
        before, after = ([getattr(one, when) for one in changes.values()] for when in ("before", "after"))
        for first, one in changes.items():
            ranks = _rank(one.before, before), _rank(one.after, after)
            lines.append((results.label(metric, benchmark), first, one, ranks))
    corrected = holm([p_value(one.difference.values, one.difference.benchmarks) for _, _, one, _ in lines])
    body = []
    for (label, first, one, ranks), p in zip(lines, corrected, strict=True):
        mean, low, high = crossed_interval(one.difference.values, benchmarks=one.difference.benchmarks)
        text = f"{points(mean)} [{points(low)}, {points(high)}], {significance(p)}"
        numbers = [percent(one.before), percent(one.after)]
        entries = [Entry(value) for value in (label, first, *numbers)], [Entry(str(rank)) for rank in ranks]
        found = detectable_difference(one.difference.values, benchmarks=one.difference.benchmarks)
        body.append([*entries[0], Entry(text, p < SIGNIFICANT), *entries[1], Entry(size(found))])
    header = ["metric", "first stage", "before (%)", "after (%)", "difference (points)", "rank before", "rank after"]
    return Table([*header, "detectable"], body, words=["first stage"]) if body else None


def _rank(value: float, among: Sequence[float]) -> int:
    """The rank of a value, the largest first; equal ones share a rank."""
    return 1 + sum(other > value for other in among)


def _ranking(matrices: Matrices, rows: Mapping[str, str], benchmark: str) -> str:
    """The order of the first stages before and after, in words; empty for fewer than two."""
    changes = _changes(matrices, rows, benchmark, "avg_at_k")
    if len(changes) < 2:
        return ""
    before, after = (_ordered({f: getattr(one, when) for f, one in changes.items()}) for when in ("before", "after"))
    if before == after:
        return f"the ranking is the same before and after: {before}"
    return f"the ranking is {before} before and {after} after"


def _ordered(means: Mapping[str, float]) -> str:
    """The names from the largest mean to the smallest, as in ``dft > sft = rft``."""
    names = sorted(means, key=lambda name: -means[name])
    signs = ["", *(" = " if means[a] == means[b] else " > " for a, b in pairwise(names))]
    return "".join(sign + name for sign, name in zip(signs, names, strict=True))
