"""The section of a report on retention: what fine-tuning kept and lost, and gain against forgetting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib as mpl

from rlzoo.comparison.outcomes import compare_to
from rlzoo.comparison.report.plots import colours
from rlzoo.comparison.report.schema import FinishedRun, Results, SummaryRow
from rlzoo.comparison.report.tables import interval, on, points
from rlzoo.comparison.retention import CHANGE, KL
from rlzoo.config import BASE
from rlzoo.document import Block, Entry, Figure, Heading, Paragraph, Table
from rlzoo.document.drawing import GREY, MARKERS, STYLE, Drawing, axes_row, short
from rlzoo.document.estimates import NONE

PANELS = {CHANGE: ("change in accuracy, points", 100.0), KL: ("KL from the base, nats per token", 1.0)}
"""The measures of forgetting: metric → label of the axis, and its factor."""


def retention(run: FinishedRun, _: str) -> Iterator[Block]:
    """What fine-tuning kept and lost; nothing for a run without retention sets. Raises UserError for bad outcomes."""
    results = run.results
    if results.retention is None or not results.retention.summary:
        return
    yield Heading("Retention")
    yield Paragraph(
        "What fine-tuning cost, on problem sets from before it: accuracy, its difference from the base model's on the "
        "same problems, and the KL divergence of each policy from the base model, estimated on the base model's own "
        "samples (log-prob under the base minus log-prob under the policy, per token; 0: nothing changed). Intervals "
        "are 95 % intervals of a single number, over further seeds and problems, without a correction for their "
        "number. These sets are not part of any other table."
    )
    rows = {(row.algorithm, row.benchmark, row.metric): row for row in results.retention.summary}
    gains = _gains(run)
    for index, name in enumerate(results.retention.base):
        yield Heading(name, level=3)
        yield retention_table(results, name)
        drawn = {metric for _, of, metric in rows if of == name} & PANELS.keys()
        if not gains or not drawn:
            continue
        points_of = ", ".join(_in_words(rows, algorithm, name) for algorithm in results.algorithms)
        yield Figure(
            f"retention-{index}",
            gain_against_forgetting(results, rows, gains, name),
            f"Gain {on(results.benchmarks[0])} against forgetting on {name}: {points_of}.",
            f"Each algorithm's gain in {results.label('avg_at_k', results.benchmarks[0])} over the base model "
            f"{on(results.benchmarks[0])}, against what it lost on {name}; bars are 95 % intervals. Higher is a larger "
            "gain; a change in accuracy further right and a KL divergence further left mean less forgetting.",
            "One setting of each algorithm says little about its trade-off: a lower learning rate or fewer steps move "
            "most of them towards the base model, at the origin.",
        )


def retention_table(results: Results, name: str) -> Table:
    """Accuracy on a retention set, its difference from the base's, and the KL divergence; the base comes first."""
    assert results.retention is not None
    rows = {(row.algorithm, row.metric): row for row in results.retention.summary if row.benchmark == name}
    found = results.retention.base[name]
    scored = "samples" in found
    header = [f"avg@{found['samples']:.0f} (%)", "difference from base (points)"] if scored else []
    body = []
    for algorithm in (BASE, *results.algorithms):
        own = {metric: rows.get((algorithm, metric)) for metric in ("avg_at_k", CHANGE, KL)}
        accuracy = [Entry(interval(own["avg_at_k"])), Entry(_bounds(own[CHANGE], points))] if scored else []
        seeds = max((row.seeds for row in own.values() if row), default=0)
        entries = [Entry(algorithm), *accuracy, Entry(_bounds(own[KL], nats))]
        body.append([*entries, Entry(NONE if algorithm == BASE else str(seeds))])
    return Table(["algorithm", *header, "KL from base (nats per token)", "seeds"], body)


def nats(value: float) -> str:
    """A quantity in nats, with three decimals and a typographic minus."""
    text = f"{value:.3f}".replace("-", "−")
    return "0.000" if text == "−0.000" else text


def _bounds(row: SummaryRow | None, show: Any) -> str:
    return NONE if row is None else f"{show(row.mean)} [{show(row.ci_low)}, {show(row.ci_high)}]"


Rows = Mapping[tuple[str, str, str], SummaryRow]
"""The summary of retention, by algorithm, retention set and metric."""


def _in_words(rows: Rows, algorithm: str, name: str) -> str:
    change, divergence = (rows.get((algorithm, name, metric)) for metric in (CHANGE, KL))
    words = [f"{points(change.mean)} points"] if change else []
    words += [f"KL {nats(divergence.mean)}"] if divergence else []
    return f"{algorithm} {' and '.join(words) or NONE}"


def _gains(run: FinishedRun) -> dict[str, Mapping[str, Any]]:
    """Each algorithm's difference in avg@k from the base model, on the first benchmark."""
    rows = compare_to(run.outcomes, BASE, run.results.k)
    main = run.results.benchmarks[0]
    return {row["algorithm"]: row for row in rows if (row["benchmark"], row["metric"]) == (main, "avg_at_k")}


def gain_against_forgetting(results: Results, rows: Rows, gains: Mapping[str, Mapping[str, Any]], name: str) -> Drawing:
    """A point per algorithm with 95 % intervals: its gain, against each of `PANELS` that the retention set has."""
    there = {metric for _, of, metric in rows if of == name}
    panels_of = {metric: how for metric, how in PANELS.items() if metric in there}
    palette = colours(results)
    with mpl.rc_context(STYLE):
        figure, panels = axes_row(len(panels_of), 3.6, sharey=True)
        for axes, (metric, (label, factor)) in zip(panels, panels_of.items(), strict=True):
            axes.axhline(0, color=GREY, linewidth=1)
            axes.axvline(0, color=GREY, linewidth=1)
            for place, algorithm in enumerate(results.algorithms):
                row, gain = rows.get((algorithm, name, metric)), gains.get(algorithm)
                if row is None or gain is None:
                    continue
                x, y = factor * row.mean, 100 * gain["difference"]
                across = [[x - factor * row.ci_low], [factor * row.ci_high - x]]
                up = [[y - 100 * gain["ci_low"]], [100 * gain["ci_high"] - y]]
                colour, marker = palette[algorithm], MARKERS[place % len(MARKERS)]
                spread = {"elinewidth": 1, "capsize": 2, "alpha": 0.85, "linestyle": "none"}
                axes.errorbar([x], [y], xerr=across, yerr=up, color=colour, marker=marker, **spread)
                axes.annotate(short(algorithm), (x, y), (5, 5), textcoords="offset points", color=colour, fontsize=9)
            axes.set(title=name, xlabel=label)
            axes.grid(True)
        benchmark = short(results.benchmarks[0])
        panels[0].set_ylabel(f"gain on {benchmark}, points")
        return Drawing(figure)
