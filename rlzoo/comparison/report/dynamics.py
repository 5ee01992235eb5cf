"""How training went: whether curves were still rising at its end, and what clipping left of the gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

from rlzoo.comparison.report.plots import colours
from rlzoo.comparison.report.schema import CellResult, CurvePoint, Results
from rlzoo.comparison.report.tables import NONE, percent, points
from rlzoo.comparison.statistics import Interval, crossed_interval
from rlzoo.document import Block, Entry, Figure, Heading, Paragraph, Table
from rlzoo.document.drawing import STYLE, axes_row, short, to_svg

CLIPPED = "clipped"
SHOWN = {
    CLIPPED: ("clipped, %", 100.0),
    "ratio_deviation": ("mean |ρ − 1|", 1.0),
    "zero_advantage": ("zero advantage, %", 100.0),
}
"""Metrics of training steps in the figure: their label, and the factor that they are shown with."""
BINS = 20
"""The number of averages over steps that a line of the figure consists of."""


def dynamics(results: Results) -> Iterator[Block]:
    """The blocks of the report on the course of training."""
    yield from _endings(results)
    yield from _clipping(results)


def last_rises(results: Results) -> dict[str, Interval]:
    """The rise of each algorithm's learning curve between its last two points, with its 95 % interval, as fractions.

    It is measured on the problems of the curve: of validation where the curve has them, else of all benchmarks, with
    equal weights. Algorithms with fewer than two points are left out, as are those with one seed and no results per
    problem.
    """
    found = {}
    for name in results.algorithms:
        pairs = [pair for cell in results.cells if cell.algorithm == name if (pair := _last_two(results, cell))]
        if (interval := _rise(pairs)) is not None:
            found[name] = interval
    return found


def still_rising(results: Results) -> list[str]:
    """The algorithms whose curve rises by more than its noise between its last two points."""
    return [name for name, rise in last_rises(results).items() if rise.low > 0]


def _last_two(results: Results, cell: CellResult) -> tuple[CurvePoint, CurvePoint] | None:
    curve = cell.curve or []
    base = [results.base_curve] if results.base_curve and curve and curve[0].step > 0 else []
    last = [*base, *curve][-2:]
    return (last[0], last[1]) if len(last) == 2 else None


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


def _endings(results: Results) -> Iterator[Block]:
    """Where training ended, and which rows might gain from more of it."""
    rises = last_rises(results)
    if not rises:
        return
    yield Heading("The end of training")
    rising = still_rising(results)
    if rising:
        verb = "was" if len(rising) == 1 else "were"
        yield Paragraph(
            f"{_listed(rising)} {verb} still rising at the end: between the last two points of the learning curve, the "
            "gain exceeds its noise. More training may raise the result further, so a result behind another here does "
            "not show that the algorithm is worse."
        )
    else:
        yield Paragraph(
            "No curve rises by more than its noise between its last two points. The intervals show how large a rise "
            "this noise could hide."
        )
    rows = []
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
        "The last rise is the difference in avg@k between the last two points of the learning curve, with its 95 % "
        "interval over further seeds and problems. Steps and reasons are those of all seeds: flat means that the "
        "validation curve had stopped rising (evaluation.until_flat)."
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


def _clipping(results: Results) -> Iterator[Block]:
    """What objectives with ratios report: clipped tokens, the ratio's deviation from 1, groups without a gradient."""
    series = {name: _series([c for c in results.cells if c.algorithm == name]) for name in results.algorithms}
    series = {name: found for name, found in series.items() if CLIPPED in found}
    if not series:
        return
    modes = _modes(results)
    yield Heading("Ratios and clipping")
    yield Paragraph(
        "The ratio ρ of a token is its probability under the policy in training divided by that under the policy that "
        "sampled it. A clipped token has no gradient (in CISPO, one of bounded weight), and neither has a group with "
        "equal rewards, whose advantage is zero. On a fixed buffer ρ starts at 1 and keeps departing from it as the "
        "policy moves; online, every batch starts at 1 again."
    )
    yield Paragraph(" ".join(_told(results, name, found, modes.get(name)) for name, found in series.items()))
    header = [
        "algorithm",
        "data",
        "clipped, first quarter (%)",
        "last quarter (%)",
        "|ρ − 1|",
        "KL",
        "zero advantage (%)",
    ]
    rows = []
    for name, found in series.items():
        first, last = _quarters(found[CLIPPED])
        mean = {key: _quarters(found[key])[1] if key in found else None for key in ("ratio_deviation", "kl")}
        silent = float(np.mean(found["zero_advantage"])) if "zero_advantage" in found else None
        shown = [NONE if value is None else f"{value:.3g}" for value in mean.values()]
        entries = [name, modes.get(name, NONE), percent(first), percent(last), *shown, percent(silent)]
        rows.append([Entry(entry) for entry in entries])
    yield Table(header, rows, prose="data")
    yield Figure(
        "clipping",
        _figure(results, series),
        "Fraction of clipped tokens, mean deviation of the ratio from 1, and fraction of groups with zero advantage in "
        "the course of training, one line per algorithm.",
        "Means over seeds and neighbouring steps, for the algorithms that report them. |ρ − 1| and KL (to the reference "
        "policy) in the table are means over the last quarter of training.",
        "It does not show how much of the gradient clipping removes: tokens that the policy is sure of are rarely "
        "clipped and have little gradient to lose.",
    )


def _series(cells: Sequence[CellResult]) -> dict[str, np.ndarray]:
    """Metric → its mean over cells at each step that all of them took; metrics that a step lacks are left out."""
    found = {}
    for metric in (*SHOWN, "kl"):
        runs = [[_value(step, metric) for step in cell.training] for cell in cells]
        length = min(map(len, runs), default=0)
        values = [value for run in runs for value in run[:length]]
        if length and None not in values:
            found[metric] = np.reshape(np.array(values, float), (len(runs), length)).mean(0)
    return found


def _value(step: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a step; of a composite objective, the mean over the components that report it."""
    known = [v for key, v in step.items() if key.rpartition("/")[2] == metric and v is not None]
    return sum(known) / len(known) if known else None


def _quarters(series: np.ndarray) -> tuple[float, float]:
    """The mean over the first and over the last quarter of the steps."""
    quarter = max(1, len(series) // 4)
    return float(series[:quarter].mean()), float(series[-quarter:].mean())


def _modes(results: Results) -> dict[str, str]:
    """Whether each algorithm learned offline or online, as far as the configuration says."""
    rows = results.config.get("algorithms") if isinstance(results.config, dict) else None
    known = rows.items() if isinstance(rows, dict) else ()
    return {name: str(row["mode"]) for name, row in known if isinstance(row, dict) and "mode" in row}


def _told(results: Results, name: str, found: Mapping[str, np.ndarray], mode: str | None) -> str:
    """What the data shows about one algorithm, in a sentence."""
    first, last = _quarters(found[CLIPPED])
    learns = {"offline": " learns from the fixed buffer:", "online": " samples every batch anew:"}.get(mode or "", ":")
    text = f"{name}{learns} {percent(first)} % of its tokens are clipped in the first quarter of training, "
    text += f"{percent(last)} % in the last"
    if "ratio_deviation" in found:
        text += f", where ratios deviate from 1 by {_quarters(found['ratio_deviation'])[1]:.2g} on average"
    if "zero_advantage" in found and (silent := float(np.mean(found["zero_advantage"]))) > 0:
        text += f"; {percent(silent)} % of its groups have zero advantage"
    benchmark = results.benchmarks[0]
    base, row = results.row("base", benchmark, "avg_at_k"), results.row(name, benchmark, "avg_at_k")
    if base is not None and row is not None:
        text += f". It ends {points(row.mean - base.mean)} points from the base model on {benchmark}"
    return f"{text}."


def _figure(results: Results, series: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    shown = [metric for metric in SHOWN if any(metric in found for found in series.values())]
    palette = colours(results)
    with mpl.rc_context(STYLE):
        figure, panels = axes_row(len(shown), 2.9)
        for axes, metric in zip(panels, shown, strict=True):
            label, factor = SHOWN[metric]
            for name, found in series.items():
                if metric in found:
                    parts = np.array_split(found[metric], min(BINS, len(found[metric])))
                    ends = np.cumsum([len(part) for part in parts])
                    middle = [end - (len(part) - 1) / 2 for end, part in zip(ends, parts, strict=True)]
                    means = [factor * part.mean() for part in parts]
                    axes.plot(middle, means, color=palette[name], label=short(name))
            axes.set(title=label, xlabel="optimizer step")
            axes.set_ylim(bottom=0)
            axes.grid(True)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 8), handlelength=1.6)
        return to_svg(figure)


def _listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
