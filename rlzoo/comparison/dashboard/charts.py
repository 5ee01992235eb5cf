"""Line charts as SVG, drawn in a millisecond: pages are drawn every few seconds, beside training that needs cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from matplotlib.ticker import MaxNLocator

from rlzoo.comparison.dashboard.curves import thinned
from rlzoo.comparison.dashboard.elements import Html, h
from rlzoo.document.drawing import PALETTE
from rlzoo.document.estimates import number

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 32


@dataclass(frozen=True)
class ChartLine:
    """A line of a chart: its name, its colour, and its points."""

    name: str
    colour: str
    points: Float[np.ndarray, "N 2"]


def colour(place: int) -> str:
    """The colour of the line at a place."""
    return PALETTE[place % len(PALETTE)]


def legend(lines: Sequence[ChartLine]) -> Html:
    """The names of lines beside their colours."""
    return h("ul", [h("li", _swatch(line.colour), line.name) for line in lines], class_="legend")


def chart(title: str, lines: Sequence[ChartLine], shows: str = "", along: str = "step") -> Html:
    """A figure of lines over the optimizer steps; without points, nothing."""
    lines = [line for line in lines if len(line.points)]
    if not lines:
        return Html("")
    every = np.concatenate([line.points for line in lines])
    left, bottom, right, top = (float(value) for value in (*every.min(0), *every.max(0)))
    margin = (top - bottom) / 25 or (abs(top) or 1) / 2
    bottom, top = bottom - margin, top + margin
    right = max(right, left + 1)
    marks = [value for value in MaxNLocator(4).tick_values(bottom, top) if bottom <= value <= top]
    steps = [v for v in MaxNLocator(5, integer=True).tick_values(left, right) if left <= v <= right]

    def x(value: float) -> float:
        return LEFT + (value - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - bottom) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    def label(value: float, at: tuple[float, float], anchor: str) -> Html:
        return h("text", number(float(value)), x=f"{at[0]:.1f}", y=f"{at[1]:.1f}", text_anchor=anchor)

    grid = [
        [h("path", d=f"M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}", class_="grid"), label(v, (LEFT - 6, y(v) + 4), "end")]
        for v in marks
    ]
    axis = [label(v, (x(v), HEIGHT - BOTTOM + 15), "middle") for v in steps]
    name = h("text", along, x=f"{(LEFT + WIDTH - RIGHT) / 2:.0f}", y=HEIGHT - 3, text_anchor="middle")
    drawn = [_drawn(line, x, y) for line in lines]
    picture = h(
        "svg", grid, axis, name, drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img",
        aria_label=f"{title}: {', '.join(line.name for line in lines[:8])}",
    )  # fmt: skip
    return h("figure", h("h3", title), picture, h("figcaption", shows) if shows else None, class_="chart")


def _drawn(line: ChartLine, x: Callable[[float], float], y: Callable[[float], float]) -> Html:
    places = [(x(step), y(value)) for step, value in thinned(line.points)]
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
    dots = places if len(places) <= 12 else places[-1:]
    return h(
        "g", h("title", line.name), h("path", d=path, class_="line", stroke=line.colour),
        [h("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r=2.5, fill=line.colour) for a, b in dots],
    )  # fmt: skip


def _swatch(colour: str) -> Html:
    return h("svg", h("rect", width=10, height=10, rx=2, fill=colour), viewBox="0 0 10 10", class_="swatch")
