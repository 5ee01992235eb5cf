"""Where training ended, and whether learning curves were still rising there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from rlzoo.comparison.report.schema import CellResult, CurvePoint, FinishedRun, Results
from rlzoo.comparison.report.tables import points
from rlzoo.comparison.statistics import Interval, crossed_interval
from rlzoo.document import Block, Entry, Heading, Paragraph, Table
from rlzoo.document.estimates import NONE


def last_rises(results: Results) -> dict[str, Interval]:
    """The rise of each algorithm's learning curve over the last quarter of its steps, with its 95 % interval.

    It is a fraction, from the last point in the first three quarters to the end, and measured on the problems of the
    curve: of validation where the curve has them, else of all benchmarks, with equal weights. Algorithms without two
    such points are left out, as are those with one seed and no results per problem.
    """
    found = {}
    for name in results.algorithms:
        pairs = [pair for cell in results.cells if cell.algorithm == name if (pair := _last_quarter(results, cell))]
        if (interval := _rise(pairs)) is not None:
            found[name] = interval
    return found


def still_rising(results: Results) -> list[str]:
    """The algorithms whose curve rises by more than its noise over the last quarter of training."""
    return [name for name, rise in last_rises(results).items() if rise.low > 0]


def _last_quarter(results: Results, cell: CellResult) -> tuple[CurvePoint, CurvePoint] | None:
    curve = cell.curve or []
    base = [results.base_curve] if results.base_curve and curve and curve[0].step > 0 else []
    before = [point for point in (*base, *curve) if point.step <= 0.75 * curve[-1].step]
    return (before[-1], curve[-1]) if before else None


def _rise(pairs: Sequence[tuple[CurvePoint, CurvePoint]]) -> Interval | None:
    """The mean difference of pairs of points, one pair per seed, over problems of equally weighted sets."""
    by_problem = [_by_set(pair, "by_problem") for pair in pairs]
    shapes = {tuple(len(one) for one in row) for row in by_problem}
    if len(shapes) == 1 and (sizes := shapes.pop()) and min(sizes) > 1:
        matrix = np.array([np.concatenate(row) for row in by_problem])
        return crossed_interval(matrix, benchmarks=np.repeat(np.arange(len(sizes)), sizes) if len(sizes) > 1 else None)
    means = [[np.mean(row)] for pair in pairs if (row := _by_set(pair, "avg_at_k"))]
    return crossed_interval(np.array(means)) if len(means) > 1 else None


def _by_set(pair: tuple[CurvePoint, CurvePoint], key: str) -> list[np.ndarray]:
    """The differences of two points on each problem set that both have: of validation alone, if it is measured."""
    before, after = (
        {"validation": point.validation} if point.validation is not None else point.metrics for point in pair
    )
    values = [(before[name].get(key), after[name].get(key)) for name in before if name in after]
    both = [(np.atleast_1d(old), np.atleast_1d(new)) for old, new in values if old is not None and new is not None]
    return [new - old for old, new in both if old.shape == new.shape]


def rising_at_the_end(results: Results) -> str | None:
    """A warning that names the algorithms whose curve was still rising; None if there are none."""
    if not (rising := still_rising(results)):
        return None
    names = rising[0] if len(rising) == 1 else f"{', '.join(rising[:-1])} and {rising[-1]}"
    were = "was" if len(rising) == 1 else "were"
    return (
        f"{names} {were} still rising at the end of training: the learning curve gains more than its noise over the "
        "last quarter. More training may raise the result further, so being behind at this budget does not show that "
        "an algorithm is worse."
    )


def endings(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """Where training ended, and which rows might gain from more of it."""
    results = run.results
    rises = last_rises(results)
    if not rises:
        return
    yield Heading("The end of training")
    if (warning := rising_at_the_end(results)) is not None:
        yield Paragraph(warning)
    else:
        yield Paragraph(
            "No curve rises by more than its noise over the last quarter of training. The intervals show how large a "
            "rise this noise could hide."
        )
    rows, rising = [], still_rising(results)
    for name in results.algorithms:
        cells = [cell for cell in results.cells if cell.algorithm == name]
        rise = rises.get(name)
        text = NONE if rise is None else f"{points(rise.mean)} [{points(rise.low)}, {points(rise.high)}]"
        verdict = NONE if rise is None else "still rising" if name in rising else "no rise beyond noise"
        steps = [len(cell.training) for cell in cells]
        row = [name, _range(steps) if all(steps) else NONE, _reasons(cells), text, verdict]
        rows.append([Entry(entry, entry == "still rising") for entry in row])
    yield Table(["algorithm", "steps", "ended by", "last rise (points)", "verdict"], rows, prose="verdict")
    yield Paragraph(
        "The last rise is the difference in avg@k between the end of the learning curve and its last point in the "
        "first three quarters of the steps, with its 95 % interval over further seeds and problems. Steps and reasons "
        "are those of all seeds: flat means that the validation curve had stopped rising (evaluation.until_flat)."
    )


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _reasons(cells: Sequence[CellResult]) -> str:
    """Why cells ended; with the number of cells, if they differ."""
    counts = Counter(cell.ended for cell in cells if cell.ended is not None)
    if len(counts) < 2:
        return next(iter(counts), NONE)
    return ", ".join(f"{reason} ({number})" for reason, number in counts.items())
