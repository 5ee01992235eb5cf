"""The figures of an analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlzoo.document.drawing import (
    GREY,
    MARKERS,
    PALETTE,
    STYLE,
    WIDTH,
    Drawing,
    axes_grid,
    axes_row,
    legend,
    log_scale,
    short,
)

Found = Mapping[str, Any]
FEWEST_ON_CHART = 8
"""With fewer objectives, `directions` shows enough."""


def style_of(found: Found) -> dict[str, dict[str, Any]]:
    """A colour, a marker and a dash for each objective, the same in every figure."""
    names = list(dict.fromkeys([*found["objectives"], *found.get("training", {})]))
    looks = {}
    for i, name in enumerate(names):
        turn, colour = divmod(i, len(PALETTE))
        marker = MARKERS[(i + 3 * turn) % len(MARKERS)]
        looks[name] = {"color": PALETTE[colour], "marker": marker, "linestyle": ("-", "--", ":")[turn % 3]}
    return looks


def law(found: Found) -> Drawing | None:
    """Mean tr Cov per token against p: exact values as lines, Monte Carlo as points with intervals."""
    bins = found["bins"]
    if not bins:
        return None
    looks = style_of(found)
    names = list(dict.fromkeys(row["objective"] for row in bins))
    with mpl.rc_context(STYLE):
        figure, (left, right) = axes_row(2, 4.2)
        p = np.logspace(min(row["log10_p_low"] for row in bins), -0.01, 200)
        for values, text in (((1 - p) / p, "(1−p)/p, slope −1"), (p * (1 - p), "p(1−p), slope +1")):
            left.plot(p, values, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
            left.annotate(text, (p[8], values[8]), (4, 4), textcoords="offset points", fontsize=8, color=GREY)
        for name in names:
            rows = [row for row in bins if row["objective"] == name and row["predicted"] > 0]
            at = [10 ** row["log10_p"] for row in rows]
            line = {key: looks[name][key] for key in ("color", "linestyle")}
            left.plot(at, [row["predicted"] for row in rows], linewidth=1.2, label=short(name), **line)
            for axes in (left, right):
                _intervals(axes, [row for row in rows if row["comparable"]], looks[name], axes is right)
        left.set(title="variance of a token's estimate", ylabel="tr Cov, mean of a bin")
        log_scale(left, "xy")
        right.axhline(1, color=GREY, linewidth=1)
        right.set(title="Monte Carlo over exact", ylabel="ratio")
        log_scale(right, "x")
        for axes in (left, right):
            axes.set_xlabel("probability p of the expert's token")
            axes.grid(True)
        legend(figure, left, 6)
        return Drawing(figure)


def _intervals(axes: Any, rows: Sequence[Mapping[str, Any]], look: Mapping[str, Any], relative: bool) -> None:
    if not rows:
        return
    scale = np.array([row["predicted"] if relative else 1.0 for row in rows])
    middle, low, high = (np.array([row[key] for row in rows]) / scale for key in ("monte_carlo", "ci_low", "ci_high"))
    x = [10 ** row["log10_p"] for row in rows]
    axes.errorbar(
        x, middle, [np.maximum(middle - low, 0), np.maximum(high - middle, 0)],
        fmt=look["marker"], color=look["color"], markersize=3.5, elinewidth=1, capsize=2, linewidth=0,
    )  # fmt: skip


def coefficients(found: Found) -> Drawing:
    """How each objective's coefficients are distributed over tokens."""
    objectives, looks = found["objectives"], style_of(found)
    with mpl.rc_context(STYLE):
        figure, grid = axes_grid(len(objectives), 1.8)
        for axes, (name, entry) in zip(grid, objectives.items(), strict=True):
            histogram = entry["coefficient_histogram"]
            counts, edges = np.maximum(histogram["counts"], 0.5), np.array(histogram["edges"])
            axes.stairs(counts, edges, baseline=0.5, fill=True, color=looks[name]["color"], alpha=0.75)
            axes.set(title=short(name), ylim=(0.5, None))
            log_scale(axes, "y")
            axes.xaxis.set_major_locator(MaxNLocator(4))
        figure.supxlabel("coefficient", fontsize=10)
        figure.supylabel("tokens", fontsize=10)
        return Drawing(figure)


def directions(found: Found) -> Drawing | None:
    """Cosine and norm ratio of each mean gradient to the baseline's, and the noise scale, with intervals."""
    entries = found["objectives"].items()
    names = [n for n, o in entries if o.get("data_noise", {}).get("cosine_to_sft", {}).get("value") is not None]
    if not names:
        return None
    looks = style_of(found)
    with mpl.rc_context(STYLE):
        figure, panels = axes_row(3, 0.9 + 0.3 * len(names), sharey=True)
        measures = ("cosine_to_sft", "norm_ratio_to_sft", "noise_scale")
        titles = ("cosine to SFT's gradient", "norm over SFT's", "noise scale, prompts")
        for axes, key, title in zip(panels, measures, titles, strict=True):
            for place, name in enumerate(names):
                estimate = found["objectives"][name]["data_noise"][key]
                if estimate["value"] is None:
                    continue
                value, low, high = estimate["value"], estimate["ci_low"], estimate["ci_high"]
                has_low = low is not None and (low > 0 or key == "cosine_to_sft")  # the others are on a log scale
                ends = [low if has_low else value, value if high is None else high]
                axes.plot(ends, [place, place], color=looks[name]["color"])
                axes.plot(value, place, color=looks[name]["color"], marker=looks[name]["marker"])
                for arrow, offset in [("←", -15)] * (not has_low) + [("→", 5)] * (high is None):
                    axes.annotate(arrow, (value, place), (offset, -4), textcoords="offset points")
            axes.set(title=title)
            axes.set_yticks(range(len(names)), [short(name) for name in names])
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.grid(True, axis="x")
        log_scale(panels[1], "x")
        log_scale(panels[2], "x")
        return Drawing(figure)


def chart(found: Found) -> Drawing | None:
    """Each objective by the length and direction of its expected gradient, with intervals; areas show the ESS.

    Objectives whose gradient noise hides are left out.
    """
    places, reach = {}, {}
    for name, entry in found["objectives"].items():
        noise = entry.get("data_noise", {})
        cosine, ratio = (noise.get(key, {}) for key in ("cosine_to_sft", "norm_ratio_to_sft"))
        if cosine.get("value") is not None and ratio.get("value"):
            places[name] = (ratio["value"], cosine["value"])
            reach[name] = (ratio["ci_low"], ratio["ci_high"], cosine["ci_low"], cosine["ci_high"])
    if len(places) < FEWEST_ON_CHART:
        return None
    looks, ess = style_of(found), {name: found["objectives"][name]["coefficients"]["ess_fraction"] for name in places}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.4 + 0.2 * len(places)), layout="constrained")
        axes = figure.subplots()
        for name, (ratio, cosine) in places.items():
            area = 20 + 180 * (ess[name] or 0)
            axes.scatter(ratio, cosine, s=area, color=looks[name]["color"], alpha=0.65, linewidth=0)
            left, right, low, high = reach[name]
            faint = {"color": looks[name]["color"], "linewidth": 0.6, "alpha": 0.4}
            axes.plot([left or ratio, right or ratio], [cosine, cosine], **faint)
            axes.plot([ratio, ratio], [low, high], **faint)
        axes.set(xlabel="norm over SFT's", ylabel="cosine to SFT's gradient")
        log_scale(axes, "x")
        axes.grid(True)
        # names are in a column beside the chart, in order of height, so that none overlap
        ordered = sorted(places, key=lambda name: places[name][1])
        for name, height in zip(ordered, np.linspace(0, 1, len(ordered)), strict=True):
            axes.annotate(
                short(name), places[name], (1.06, height), textcoords="axes fraction", va="center", fontsize=9,
                arrowprops={"arrowstyle": "-", "color": looks[name]["color"], "linewidth": 0.7, "alpha": 0.6},
                annotation_clip=False,
            )  # fmt: skip
        return Drawing(figure)


def along_training(found: Found) -> Drawing | None:
    """tr Σ, noise scale and effective sample size in the course of each objective's training."""
    runs = {name: rows for name, rows in found.get("training", {}).items() if rows}
    if not runs:
        return None
    looks = style_of(found)

    def values(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
        picked = (row[key]["value"] if isinstance(row[key], Mapping) else row[key] for row in rows)
        return [np.nan if value is None else value for value in picked]

    with mpl.rc_context(STYLE):
        figure, panels = axes_row(3, 3.5)
        keys = (
            ("trace_cov", "tr Σ of a prompt"),
            ("noise_scale", "noise scale, prompts"),
            ("ess_fraction", "ESS over tokens"),
        )
        for axes, (key, title) in zip(panels, keys, strict=True):
            for name, rows in runs.items():
                axes.plot([row["step"] for row in rows], values(rows, key), label=short(name), **looks[name])
            axes.set(title=title, xlabel="optimizer step")
            axes.grid(True)
        log_scale(panels[0], "y")
        log_scale(panels[1], "y")
        legend(figure, panels[0], 6)
        return Drawing(figure)


def layers(found: Found) -> Drawing | None:
    """tr Σ of each layer as a share of the whole, and the cosine to the baseline by layer."""
    objectives = {n: o for n, o in found["objectives"].items() if o.get("layers")}
    if not objectives:
        return None
    looks, labels = style_of(found), found["layers"]
    with mpl.rc_context(STYLE):
        figure, panels = axes_row(2, 3.8)
        for name, entry in objectives.items():
            total = entry["data_noise"]["trace_cov"]["value"]
            rows = [entry["layers"][label] for label in labels]
            if total:
                share = [
                    np.nan if row["trace_cov"]["value"] is None else row["trace_cov"]["value"] / total for row in rows
                ]
                panels[0].plot(range(len(labels)), share, label=short(name), **looks[name])
            cosine = [row["cosine_to_sft"]["value"] for row in rows]
            panels[1].plot(range(len(labels)), [np.nan if c is None else c for c in cosine], **looks[name])
        panels[0].set(title="share of tr Σ")
        panels[1].set(title="cosine to SFT's gradient")
        step = max(1, len(labels) // 10)
        for axes in panels:
            axes.set_xticks(
                range(0, len(labels), step), [short(label) for label in labels[::step]], rotation=35, ha="right"
            )
            axes.grid(True)
        legend(figure, panels[0], 6)
        return Drawing(figure)


def proxies(found: Found) -> Drawing | None:
    """The logit-space proxy of each prompt's squared gradient norm against the exact one."""
    prompts_of = {n: o["proxies"]["prompts"] for n, o in found["objectives"].items() if o.get("proxies")}
    objectives = {n: prompts for n, prompts in prompts_of.items() if any(prompts["total_power"])}
    if not objectives:
        return None
    looks = style_of(found)
    with mpl.rc_context(STYLE):
        figure, grid = axes_grid(len(objectives), 2.0)
        for axes, (name, prompts) in zip(grid, objectives.items(), strict=True):
            x, y = np.array(prompts["total_power"]), np.array(prompts["exact"])
            some = (x > 0) & (y > 1e-9 * y.max(initial=0))  # a group of equal rewards has only rounding
            axes.plot(x[some], y[some], linewidth=0, marker=".", markersize=3, color=looks[name]["color"], alpha=0.6)
            axes.set(title=short(name))
            log_scale(axes, "xy")
        figure.supxlabel("proxy of a prompt: Σ a² S in logits", fontsize=10)
        figure.supylabel("‖g_p‖², exact", fontsize=10)
        return Drawing(figure)
