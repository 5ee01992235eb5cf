"""Figures as SVG that takes its text colour from the surrounding page, and as PDF: colours, style, embedding."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

# Okabe and Ito's colours, with olive in place of yellow and black, which would be invisible on a white or black page.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8F7A2B")
MARKERS = "osD^vPX"
GREY = "#808080"
INK = "#010203"
"""A placeholder for the text colour of the page, replaced by `inline` and `standalone`."""
PAPER = "#fefefd"
"""A placeholder for the background of the page."""
WIDTH = 9.6
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # names may contain a dollar sign
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "rlzoo",
}


SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def log_scale(axes: Any, which: str) -> None:
    """Logarithmic axes (``x``, ``y`` or ``xy``) with few ticks at powers of ten."""
    for name in which:
        axis = axes.xaxis if name == "x" else axes.yaxis
        getattr(axes, f"set_{name}scale")("log")
        axis.set_major_locator(LogLocator(numticks=6))
        axis.set_minor_locator(NullLocator())
        low, high = getattr(axes, f"get_{name}lim")()
        if high < 30 * low:  # at most one power of ten inside
            axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axis.set_major_formatter(lambda value, _: _power(value))


def _power(value: float) -> str:
    if 0.01 < value < 10_000:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10**exponent)
    return ("" if digit == 1 else f"{digit}·") + f"10{str(exponent).translate(SUPERSCRIPTS)}"


def short(name: str) -> str:
    """A name cut to fit beside an axis. A leading underscore, which would hide it from a legend, is masked."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    plain = f"\N{ZERO WIDTH SPACE}{plain}" if plain.startswith("_") else plain
    return plain if len(plain) <= 22 else f"{plain[:21]}…"


def axes_row(columns: int, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure of the width of the page, with one row of axes: (figure, axes)."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False, **options)[0]


def axes_grid(number: int, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure of the width of the page, with this number of axes in rows of at most four: (figure, axes)."""
    columns = min(number, 4)
    lines = -(-number // columns)
    figure = Figure(figsize=(WIDTH, 0.5 + height * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, **options).flat
    for axes in grid[number:]:
        axes.set_visible(False)
    return figure, grid[:number]


def legend(figure: Any, axes: Any, columns: int, handlelength: float = 1.6) -> None:
    """The names of the lines in some axes above the figure, at most this number of ``columns``."""
    handles, labels = axes.get_legend_handles_labels()
    ncols = min(len(labels), columns)
    figure.legend(handles, labels, loc="outside upper center", ncols=ncols, handlelength=handlelength)


@dataclass(frozen=True)
class Drawing:
    """A figure, drawn with `STYLE`, and the forms in which it is written: the same figure gives the same bytes."""

    figure: Any

    @cached_property
    def svg(self) -> str:
        """An SVG element."""
        text = self._saved("svg", dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=True).decode()
        return text[text.index("<svg") :]

    def pdf(self) -> bytes:
        """A page of the size of the figure, with its fonts embedded."""
        return self._saved("pdf", dict.fromkeys(("CreationDate", "Creator", "Producer")))

    def _saved(self, form: str, metadata: Mapping[str, None], **options: Any) -> bytes:
        out = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.figure.savefig(out, format=form, metadata=metadata, **options)
        return out.getvalue()


def inline(svg: str, name: str, alt: str) -> str:
    """The drawing as an element of a page: with unique ids, the text colour of the page, and no external references."""
    svg = re.sub(r"<(metadata|style)\b.*?</\1>\s*", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    )
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace(INK, "currentColor").replace(PAPER, "var(--page)")
    return f'<svg role="img" aria-label="{html.escape(alt)}"{svg[len("<svg") :]}'


def standalone(svg: str) -> str:
    """The drawing as a file of its own, dark on white."""
    head, _, body = svg.partition(">")
    white = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>{white}{body}'.replace(INK, "#1a1a1a").replace(
        PAPER, "#ffffff"
    )
