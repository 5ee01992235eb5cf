"""The figures of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.ticker import MaxNLocator

from rlzoo.comparison.outcomes import METRICS
from rlzoo.comparison.report.schema import CellResult, Results
from rlzoo.comparison.report.tables import amount
from rlzoo.comparison.statistics import SIGNIFICANT
from rlzoo.config import BASE
from rlzoo.document.drawing import (
    GREY,
    INK,
    MARKERS,
    PALETTE,
    PAPER,
    STYLE,
    Drawing,
    axes_grid,
    axes_row,
    legend,
    log_scale,
    short,
)


def colours(results: Results) -> dict[str, str]:
    """One colour per algorithm, the same in every figure; grey for the base model."""
    return {BASE: GREY} | {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(results.algorithms)}


def result_bars(results: Results, benchmark: str) -> Drawing:
    """Bars with 95 % intervals, one panel per metric; a dashed line marks the base model."""
    names = [BASE, *results.algorithms]
    palette = colours(results)
    with mpl.rc_context(STYLE):
        figure, panels = axes_row(len(METRICS), 0.9 + 0.3 * len(names), sharey=True)
        for axes, metric in zip(panels, METRICS, strict=True):
            for place, name in enumerate(names):
                row = results.row(name, benchmark, metric)
                if row is None:
                    continue
                axes.barh(place, 100 * row.mean, height=0.68, color=palette[name], alpha=0.85)
                if np.isfinite(row.ci_low):
                    _whisker(axes, place, row.ci_low, row.ci_high, INK)
                if name == BASE:
                    axes.axvline(100 * row.mean, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
            axes.set(title=results.label(metric, benchmark), xlabel="correct, %")
            axes.set_xlim(left=0)
            _name_rows(axes, names)
        return Drawing(figure)


def differences(rows: Sequence[Mapping[str, Any]], results: Results, benchmark: str) -> Drawing:
    """Paired differences with 95 % intervals, one panel per metric; filled where distinguishable from zero."""
    here = [row for row in rows if row["benchmark"] == benchmark]
    names = list(dict.fromkeys(row["algorithm"] for row in here))
    palette = colours(results)
    with mpl.rc_context(STYLE):
        figure, panels = axes_row(len(METRICS), 0.95 + 0.3 * len(names), sharey=True)
        for axes, metric in zip(panels, METRICS, strict=True):
            axes.axvline(0, color=GREY, linewidth=1.2)
            for row in here:
                if row["metric"] == metric:
                    place, colour = names.index(row["algorithm"]), palette.get(row["algorithm"], GREY)
                    _whisker(axes, place, row["ci_low"], row["ci_high"], colour)
                    face = colour if row["p"] < SIGNIFICANT else PAPER
                    axes.plot(100 * row["difference"], place, marker="o", markersize=6.5, color=colour, mfc=face)
            axes.set(title=results.label(metric, benchmark), xlabel="difference, points")
            _name_rows(axes, names)
        return Drawing(figure)


def results_of_runs(runs: Mapping[str, Results], benchmark: str) -> Drawing:
    """Results with 95 % intervals of each algorithm in each run, one panel per metric and one marker per run."""
    names = list(dict.fromkeys(name for results in runs.values() for name in (BASE, *results.algorithms)))
    step = 0.72 / len(runs)
    with mpl.rc_context(STYLE):
        figure, panels = axes_row(len(METRICS), 1.1 + 0.16 * len(names) * (1 + len(runs)), sharey=True)
        for axes, metric in zip(panels, METRICS, strict=True):
            for turn, (run, results) in enumerate(runs.items()):
                colour, marker = PALETTE[turn % len(PALETTE)], MARKERS[turn % len(MARKERS)]
                for place, name in enumerate(names):
                    row, y = results.row(name, benchmark, metric), place + step * (turn - (len(runs) - 1) / 2)
                    if row is not None:
                        if np.isfinite(row.ci_low):
                            _whisker(axes, y, row.ci_low, row.ci_high, colour)
                        axes.plot(100 * row.mean, y, marker, color=colour)
                axes.plot([], [], marker, color=colour, label=short(run))
            axes.set(title={"avg_at_k": "avg@k", "pass_at_k": "pass@k"}.get(metric, metric), xlabel="correct, %")
            _name_rows(axes, names)
        legend(figure, panels[0], 6, handlelength=2.0)
        return Drawing(figure)


Curve = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Steps or costs, and the mean, lowest and highest value over seeds at each."""
AXES = {"step": "optimizer step", "gradient_tokens": "gradient tokens", "flops": "FLOPs"}
"""What learning curves are drawn against."""
WIDE = 10.0
"""Costs are on a logarithmic axis if algorithms differ by this factor."""


def curves_of(results: Results, benchmark: str, metric: str, over: str = "step") -> dict[str, Curve]:
    """The learning curve of each algorithm that has one: mean and range over seeds, as fractions.

    The i-th point is the mean over the i-th points of all seeds, whose costs may differ, while all of them have one.
    Seeds without costs are left out where ``over`` is a cost.
    """
    found: dict[str, list[list[tuple[float, float]]]] = {}
    for cell in results.cells:
        own = [(getattr(point, over), point.metrics.get(benchmark, {}).get(metric)) for point in cell.curve or ()]
        if cell.curve and results.base_curve and cell.curve[0].step > 0:
            start = 0 if over == "step" else cell.start.get(over)
            own = [(start, results.base_curve.metrics.get(benchmark, {}).get(metric)), *own]
        pairs = [(float(x), float(value)) for x, value in own if value is not None and x is not None]
        if len(pairs) == sum(value is not None for _, value in own) > 0:
            found.setdefault(cell.algorithm, []).append(pairs)
    return {name: _curve(seeds) for name, seeds in found.items()}


def _curve(seeds: Sequence[Sequence[tuple[float, float]]]) -> Curve:
    shared = np.array([pairs[: min(map(len, seeds))] for pairs in seeds])
    values = shared[:, :, 1]
    return shared[:, :, 0].mean(0), values.mean(0), values.min(0), values.max(0)


def learning_curves(results: Results, benchmark: str) -> Drawing | None:
    """avg@k in the course of training, against steps and against the costs that all curves record.

    Each line is the mean over seeds, in a band from the lowest to the highest.
    """
    panels_of = {over: curves_of(results, benchmark, "avg_at_k", over) for over in AXES}
    panels_of = {over: curves for over, curves in panels_of.items() if curves and set(curves) == set(panels_of["step"])}
    if not panels_of:
        return None
    palette, order = colours(results), list(results.algorithms)
    with mpl.rc_context(STYLE):
        figure, panels = axes_row(len(panels_of), 3.3, sharey=True)
        for axes, (over, curves) in zip(panels, panels_of.items(), strict=True):
            ends = [costs[-1] for costs, *_ in curves.values()]
            wide = over != "step" and max(ends) >= WIDE * min(ends)
            for name, (costs, mean, low, high) in curves.items():
                shown = costs > 0 if wide else costs >= 0
                band = 100 * low[shown], 100 * high[shown]
                axes.fill_between(costs[shown], *band, color=palette[name], alpha=0.13, linewidth=0)
                marker = MARKERS[order.index(name) % len(MARKERS)]
                axes.plot(costs[shown], 100 * mean[shown], color=palette[name], marker=marker, label=short(name))
            axes.set(xlabel=AXES[over])
            if wide:
                log_scale(axes, "x")
            else:
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=over == "step", steps=[1, 2, 2.5, 5, 10]))
            if over != "step":
                axes.xaxis.set_major_formatter(lambda value, _: amount(value))
            axes.grid(True)
        panels[0].set(ylabel="avg@k: correct, %")
        legend(figure, panels[0], 8)
        return Drawing(figure)


SAME = 1e-3
"""The relative difference up to which two log-probs of the first batch are those of the same batch."""


def loss_curves(results: Results, baseline: str) -> dict[str, Float[np.ndarray, "2 steps"]]:
    """The loss and −log π per token at each step, as means over seeds, of rows that learn from the baseline's batches.

    Only these can be compared: in each seed, the policy that they start from has the same log-prob on the first batch.
    """
    first = {cell.seed: _recorded(cell)[1][:1] for cell in results.cells if cell.algorithm == baseline}
    found: dict[str, list[Float[np.ndarray, "2 steps"]]] = {}
    others = set[str]()
    for cell in results.cells:
        own = _recorded(cell)
        start = first.get(cell.seed)
        if start is not None and start.size and np.allclose(own[1][:1], start, rtol=SAME) and own.size:
            found.setdefault(cell.algorithm, []).append(own)
        else:
            others.add(cell.algorithm)
    return {
        name: np.mean([one[:, : min(one.shape[1] for one in seeds)] for one in seeds], axis=0)
        for name, seeds in found.items()
        if name not in others
    }


def _recorded(cell: CellResult) -> Float[np.ndarray, "2 steps"]:
    """The loss and −log π per token of a cell at the steps that have both."""
    pairs = [(step["loss"], -step["logp"]) for step in cell.training if {"loss", "logp"} <= step.keys()]
    return np.array(pairs, float).reshape(-1, 2).T


def training_loss(results: Results, baseline: str) -> Drawing | None:
    """The loss that each row minimises, on a logarithmic axis, and its perplexity on the same batches."""
    curves, palette, order = loss_curves(results, baseline), colours(results), list(results.algorithms)
    if len(curves) < 2:
        return None
    with mpl.rc_context(STYLE):
        figure, panels = axes_row(2, 3.3)
        for name, (loss, surprise) in curves.items():
            style = {"color": palette[name], "linewidth": 1.4}
            marker = {"marker": MARKERS[order.index(name) % len(MARKERS)], "markevery": max(1, len(loss) // 8)}
            positive = np.where(loss > 0, loss, np.nan)  # a logarithm has no place for others
            panels[0].plot(range(1, len(loss) + 1), positive, **style, **marker, label=short(name))
            panels[1].plot(range(1, len(loss) + 1), np.exp(surprise), **style, **marker)
        panels[0].set(title="loss", xlabel="optimizer step")
        panels[1].set(title="perplexity", xlabel="optimizer step")
        for axes in panels:
            log_scale(axes, "y")
            axes.grid(True)
        legend(figure, panels[0], 8)
        return Drawing(figure)


def likelihoods(results: Results, benchmark: str) -> Drawing | None:
    """Accuracy against the held-out log-likelihood: a point per algorithm, and a panel per way of decoding."""
    names = (BASE, *results.algorithms)
    known = {name: results.mean(name, benchmark, "log_likelihood") for name in names}
    places = {name: value for name, value in known.items() if value is not None}
    if len(places) < 3:
        return None
    palette = colours(results)
    with mpl.rc_context(STYLE):
        figure, panels = axes_row(2, 3.3)
        for axes, metric in zip(panels, ("avg_at_k", "greedy"), strict=True):
            for name, place in places.items():
                if (row := results.row(name, benchmark, metric)) is None:
                    continue
                colour, number = palette[name], names.index(name) - 1  # the base model has its colour alone
                face = PAPER if number >= len(PALETTE) else colour
                marker = MARKERS[number % len(MARKERS)]
                if np.isfinite(row.ci_low):
                    ends = 50 * (row.ci_low + row.ci_high), 50 * (row.ci_high - row.ci_low)
                    axes.errorbar([place], ends[:1], yerr=ends[1:], fmt="none", ecolor=colour, elinewidth=1, alpha=0.5)
                axes.plot([place], [100 * row.mean], marker, color=colour, mfc=face, label=short(name))
            axes.set(title=results.label(metric, benchmark), xlabel="held-out log-likelihood, nats per token")
            axes.grid(True)
        panels[0].set(ylabel="correct, %")
        legend(figure, panels[0], 9, handlelength=1.0)
        return Drawing(figure)


def token_probabilities(results: Results) -> Drawing | None:
    """Token probabilities of the demonstrations, before (filled) and after (line), counts on a log scale."""
    histogram = results.token_probabilities
    after = histograms_after(results)
    if histogram is None or not after:
        return None
    edges, before, palette = np.array(histogram.edges), np.array(histogram.before), colours(results)
    with mpl.rc_context(STYLE):
        figure, grid = axes_grid(len(after), 1.9, sharex=True, sharey=True)
        for axes, (name, counts) in zip(grid, after.items(), strict=True):
            axes.stairs(before, edges, fill=True, baseline=0.5, color=GREY, alpha=0.4)
            axes.stairs(np.maximum(counts, 0.5), edges, baseline=None, color=palette[name], linewidth=1.8)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: amount(value))
            axes.set_ylim(bottom=0.5)
            axes.set(title=short(name))
            axes.tick_params(labelbottom=True)
        figure.supxlabel("probability of the demonstrated token", fontsize=10)
        figure.supylabel("tokens", fontsize=10)
        return Drawing(figure)


def histograms_after(results: Results) -> dict[str, np.ndarray]:
    """The mean histogram over each algorithm's cells, where it has a count per bin."""
    histogram = results.token_probabilities
    if histogram is None or len(histogram.before) < 1 or len(histogram.edges) != len(histogram.before) + 1:
        return {}
    found: dict[str, list[list[float]]] = {}
    for cell in results.cells:
        if cell.token_probabilities and len(cell.token_probabilities) == len(histogram.before):
            found.setdefault(cell.algorithm, []).append(cell.token_probabilities)
    return {name: np.mean(counts, axis=0) for name, counts in found.items()}


def _whisker(axes: Any, place: float, low: float, high: float, colour: str) -> None:
    axes.errorbar(
        [50 * (low + high)],
        [place],
        xerr=50 * (high - low),
        fmt="none",
        ecolor=colour,
        elinewidth=1.4,
        capsize=3,
    )


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
