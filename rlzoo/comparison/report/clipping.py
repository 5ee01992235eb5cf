"""What clipping and equal rewards left of the gradient, for objectives with ratios."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

from rlzoo.comparison.report.plots import colours
from rlzoo.comparison.report.schema import CellResult, FinishedRun, Results
from rlzoo.comparison.report.tables import percent, points
from rlzoo.config import BASE
from rlzoo.document import Block, Entry, Figure, Heading, Paragraph, Table
from rlzoo.document.drawing import STYLE, Drawing, axes_row, legend, short
from rlzoo.document.estimates import NONE

CLIPPED, LOST = "clipped", "signal_clipped/signal"
SHOWN = {
    CLIPPED: ("tokens clipped, %", 100.0),
    LOST: ("gradient clipped, %", 100.0),
    "ratio_deviation": ("mean |ρ − 1|", 1.0),
    "zero_advantage": ("zero advantage, %", 100.0),
}
"""Metrics of training steps in the figure (or quotients of two): their label, and the factor they are shown with."""
BINS = 20
"""The number of averages over steps that a line of the figure consists of."""


def clipping(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """What objectives with ratios report: clipped tokens, the ratio's deviation from 1, groups without a gradient."""
    results = run.results
    series = {name: _series([c for c in results.cells if c.algorithm == name]) for name in results.algorithms}
    series = {name: found for name, found in series.items() if CLIPPED in found}
    if not series:
        return
    modes = _modes(results)
    yield Heading("Ratios and clipping")
    yield Paragraph(
        "The ratio ρ of a token is its probability under the policy in training divided by that under the policy that "
        "sampled it. A clipped token has no gradient from its reward (in CISPO, one of bounded weight), and neither "
        "has a group of equal rewards, whose advantage is zero. On a fixed buffer ρ starts at 1 and keeps departing "
        "from it as the policy moves; online, every batch starts at 1 again. Most tokens are nearly certain and have "
        "hardly any gradient to lose, so the part of the gradient that clipping removes says more than the part of the "
        "tokens: it is taken per token as |ρA| (1 − π), with respect to the token's logit."
    )
    yield Paragraph(" ".join(_told(results, name, found, modes.get(name)) for name, found in series.items()))
    rows = []
    for name, found in series.items():
        first, last = _quarters(found[CLIPPED])
        lost = _quarters(found[LOST]) if LOST in found else (None, None)
        mean = {key: _quarters(found[key])[1] if key in found else None for key in ("ratio_deviation", "kl")}
        silent = float(np.mean(found["zero_advantage"])) if "zero_advantage" in found else None
        shown = [NONE if value is None else f"{value:.3g}" for value in mean.values()]
        clipped = [f"{percent(one)} → {percent(other)}" for one, other in ((first, last), lost)]
        entries = [name, modes.get(name, NONE), *clipped, *shown, percent(silent)]
        rows.append([Entry(entry) for entry in entries])
    header = ["tokens clipped (%)", "gradient clipped (%)", "|ρ − 1|", "KL", "zero advantage (%)"]
    yield Table(["algorithm", "data", *header], rows, prose="data")
    yield Figure(
        "clipping",
        _figure(results, series),
        "Fractions of tokens and of the gradient that are clipped, mean deviation of the ratio from 1, and fraction of "
        "groups with zero advantage in the course of training, one line per algorithm.",
        "Means over seeds and neighbouring steps, for the algorithms that report them. The table has means over the "
        "first → the last quarter of training, and for |ρ − 1| and KL (to the reference policy) over the last.",
        "It does not show whether a policy would have improved without clipping: for that, raise the objective's clip.",
    )


def _series(cells: Sequence[CellResult]) -> dict[str, np.ndarray]:
    """Metric → its mean over cells at each step that all of them took; metrics that a step lacks are left out."""
    found = {}
    for metric in ("signal", "signal_clipped", *SHOWN, "kl"):
        runs = [[_value(step, metric) for step in _last_stage(cell)] for cell in cells]
        length = min(map(len, runs), default=0)
        values = [value for run in runs for value in run[:length]]
        if length and None not in values:
            found[metric] = np.reshape(np.array(values, float), (len(runs), length)).mean(0)
    if "signal" in found and "signal_clipped" in found:
        found[LOST] = found["signal_clipped"] / np.maximum(found["signal"], np.finfo(float).tiny)
    return found


def _last_stage(cell: CellResult) -> list[dict[str, Any]]:
    """The steps of a cell; of several stages, those of the last."""
    return [step for step in cell.training if step.get("stage") == cell.training[-1].get("stage")]


def _value(step: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a step; of a composite objective, the mean over the components that report it."""
    known = [v for key, v in step.items() if key.rpartition("/")[2] == metric and v is not None]
    return sum(known) / len(known) if known else None


def _quarters(series: np.ndarray) -> tuple[float, float]:
    """The mean over the first and over the last quarter of the steps."""
    quarter = max(1, len(series) // 4)
    return float(series[:quarter].mean()), float(series[-quarter:].mean())


def _modes(results: Results) -> dict[str, str]:
    """Whether each algorithm learned offline or online, in its last stage, as far as the configuration says."""
    found = results.settings.get("algorithms")
    rows = found if isinstance(found, dict) else {}
    own = {name: rows.get(row["stages"][-1], {}) if row.get("stages") else row for name, row in rows.items()}
    return {name: str(row["mode"]) for name, row in own.items() if "mode" in row}


def _told(results: Results, name: str, found: Mapping[str, np.ndarray], mode: str | None) -> str:
    """What the data shows about one algorithm, in a sentence."""
    first, last = _quarters(found[CLIPPED])
    learns = {"offline": " learns from the fixed buffer:", "online": " samples every batch anew:"}.get(mode or "", ":")
    text = f"{name}{learns} {percent(first)} % of its tokens are clipped in the first quarter of training, "
    text += f"{percent(last)} % in the last"
    if LOST in found:
        text += f", and with them {percent(_quarters(found[LOST])[1])} % of the gradient"
    if "ratio_deviation" in found:
        text += f", where ratios deviate from 1 by {_quarters(found['ratio_deviation'])[1]:.2g} on average"
    if "zero_advantage" in found and (silent := float(np.mean(found["zero_advantage"]))) > 0:
        text += f"; {percent(silent)} % of its groups have zero advantage"
    benchmark = results.benchmarks[0]
    base, row = results.row(BASE, benchmark, "avg_at_k"), results.row(name, benchmark, "avg_at_k")
    if base is not None and row is not None:
        text += f". It ends {points(row.mean - base.mean)} points from the base model on {benchmark}"
    return f"{text}."


def _figure(results: Results, series: Mapping[str, Mapping[str, np.ndarray]]) -> Drawing:
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
        legend(figure, panels[0], 8)
        return Drawing(figure)
