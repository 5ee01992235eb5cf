"""The pages of a run: the overview, a single cell, and the settings."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any
from urllib.parse import quote

import yaml

from rlzoo.comparison.dashboard.charts import ChartLine, chart, colour, legend
from rlzoo.comparison.dashboard.curves import mean_line
from rlzoo.comparison.dashboard.elements import Child, Html, facts, h, join, link, pre, table, url
from rlzoo.comparison.dashboard.layout import Content
from rlzoo.comparison.dashboard.state import (
    DONE,
    FAILED,
    RUNNING,
    STATUSES,
    TRAINED,
    WAITING,
    CellView,
    RunView,
    TaskLog,
    counts_of,
    duration,
)
from rlzoo.config import BASE
from rlzoo.document.estimates import NONE, number

RUNNING_SECONDS, IDLE_SECONDS = 3.0, 20.0
"""How often a page is refreshed while the run is running, and otherwise."""
MOST_CELLS = 40
"""The number of cells above which those that wait are shown only on request."""
MOST_LINES = 7
"""The number of lines that a chart begins with: one per colour."""
SHOWN = ("loss", "reward", "gradient_norm", "logp")
"""The metrics of steps that the overview draws, if they are there."""
TITLES = {
    "loss": "Loss",
    "reward": "Reward of the batch",
    "gradient_norm": "Gradient norm, before clipping",
    "logp": "Mean log-prob of the batch's tokens",
    "learning_rate": "Learning rate",
    "coefficient": "Mean coefficient",
}
Row = tuple[str, float | None]
"""An algorithm and a learning rate."""


def seconds_of(view: RunView) -> float:
    """How often a page about a run is refreshed."""
    return RUNNING_SECONDS if view.is_running else IDLE_SECONDS


def overview(view: RunView, rows: Sequence[str], status: str) -> Content:
    """The run's state, its cells and its curves; of the curves those of some ``rows``, and of the cells one status."""
    parts: dict[str, Html] = {"state": _state(view)}
    failed = [cell for cell in view.cells if cell.error]
    parts["failures"] = _failures(failed)
    if view.command == "train" and view.cells:
        cell = view.cells[0]
        parts |= {"curves": curves_of_cell(cell), "facts": facts_of_cell(cell)}
    elif view.cells:
        parts["curves"] = _curves(view, rows)
        parts["results"] = _results(view)
        parts["cells"] = _cells(view, status)
    if view.events:
        parts["events"] = join(h("h2", "Events before training"), [h("p", event) for event in view.events])
    return Content(view.name, parts, seconds_of(view))


def chip(status: str) -> Html:
    """A status, in its colour."""
    return h("span", status, class_=f"chip {status}", title=STATUSES.get(status))


def _state(view: RunView) -> Html:
    done = [cell for cell in view.cells if cell.status in (DONE, TRAINED)]
    lines: list[Child] = [[chip(view.state), " ", view.told]]
    if view.cells and view.command != "train":
        left = view.seconds_left
        told = f"{len(done)} of {len(view.cells)} cells done" + (f", about {duration(left)} left" if left else "")
        lines.append(told)
    elif view.cells:
        lines.append(_progress(view.cells[0]))
    busy: list[Html] = []
    if view.is_running and view.command != "train":
        busy += [_task(name, None, log) for name, log in view.tasks.items() if log.begun and not log.has_ended]
        busy += [_task(cell.id, cell_url(cell), cell.log) for cell in view.cells if cell.status == RUNNING]
    is_whole = view.command == "train" or view.state == "finished"
    bar = None if is_whole or not view.cells else h("progress", value=f"{view.share:.4f}", max=1)
    return join(
        h("h1", view.name), [h("p", line) for line in lines], bar, h("ul", busy, class_="busy") if busy else None
    )


def _task(name: str, to: str | None, log: TaskLog) -> Html:
    """What is running, how far it has come, and how long it will take."""
    left = "" if log.seconds_left is None else f", {duration(log.seconds_left)} left"
    bar = h("progress", value=f"{log.share:.4f}", max=1)
    return h("li", link(to, name) if to else name, " ", bar, f" {log.detail or 'begun'}{left}")


def _failures(cells: Sequence[CellView]) -> Html:
    if not cells:
        return Html("")
    items = [h("li", link(cell_url(cell), cell.id), ": ", str(cell.error)) for cell in cells]
    return join(h("h2", "Failed cells"), h("ul", items, class_="failures"))


def cell_url(cell: CellView) -> str:
    """The page of a cell."""
    return f"/cell/{quote(cell.id, safe='')}"


def row_name(row: Row, view: RunView) -> str:
    """The name of an algorithm, with the learning rate where it has several."""
    algorithm, rate = row
    several = len({cell.learning_rate for cell in view.cells if cell.algorithm == algorithm}) > 1
    return f"{algorithm}, lr {rate:g}" if several and rate is not None else algorithm


def rows_of(view: RunView) -> dict[Row, list[CellView]]:
    """The cells of each algorithm and learning rate, in the order of the experiment."""
    found: dict[Row, list[CellView]] = {}
    for cell in view.cells:
        found.setdefault((cell.algorithm, cell.learning_rate), []).append(cell)
    order = {name: place for place, name in enumerate(dict.fromkeys(cell.algorithm for cell in view.cells))}
    return dict(sorted(found.items(), key=lambda item: order[item[0][0]]))


def percent(values: Iterable[float | None]) -> Child | tuple[str, float]:
    """The mean of fractions in per cent, and its sort value."""
    known = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return (f"{100 * mean(known):.1f}", 100 * mean(known)) if known else NONE


def _results(view: RunView) -> Html:
    """The mean results of each algorithm and learning rate over the seeds that have one."""
    metrics = [(benchmark, name) for benchmark in view.benchmarks for name in ("avg_at_k", "greedy", "pass_at_k")]
    validates = any(cell.validation is not None for cell in view.cells)
    header = [("algorithm", "name"), ("cells", "number"), *([("validation", "number")] if validates else [])]
    header += [(_label(view, *metric), "number") for metric in metrics]
    body: list[list[Any]] = []
    if view.base:
        own = [_result(view, BASE, *metric, [view.base]) for metric in metrics]
        body.append([BASE, "", *([NONE] if validates else []), *own])
    for row, cells in rows_of(view).items():
        ended = [cell for cell in cells if cell.status in (DONE, TRAINED)]
        own = [_result(view, row[0], *metric, [cell.metrics for cell in cells]) for metric in metrics]
        tuned = [percent(cell.validation for cell in cells)] if validates else []
        share = (f"{len(ended)}/{len(cells)}", len(ended) / len(cells))
        body.append([link(url("/samples", row=row[0]), row_name(row, view)), share, *tuned, *own])
    if not any(cell.metrics or cell.validation is not None for cell in view.cells) and not view.base:
        return Html("")
    title, told = "Results so far", "Per cent correct, as means over the seeds that have ended, without intervals yet."
    if view.summary:
        title, told = "Results", "Per cent correct, with 95 % intervals over seeds and problems."
    return join(h("h2", title), h("p", told), table(header, body, "results"))


def _result(
    view: RunView, algorithm: str, benchmark: str, metric: str, found: Sequence[Mapping[str, Mapping[str, Any]]]
) -> Child | tuple[str, float]:
    """The mean of a metric over cells, given the metrics of each by benchmark; with its interval, if it has one."""
    known = view.summary.get((algorithm, benchmark, metric))
    if known is None or not any(found):
        return percent(own.get(benchmark, {}).get(metric) for own in found)
    value, low, high = (100 * known[key] for key in ("mean", "ci_low", "ci_high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]", value


def _label(view: RunView, benchmark: str, metric: str) -> str:
    every = (view.base, *(cell.metrics for cell in view.cells))
    found = next((metrics[benchmark] for metrics in every if benchmark in metrics), {})
    k, samples = found.get("k", "k"), found.get("samples", found.get("k", "k"))
    name = {"avg_at_k": f"avg@{samples}", "pass_at_k": f"pass@{k}"}.get(metric, metric)
    return name if len(view.benchmarks) == 1 else f"{benchmark} {name}"


def _curves(view: RunView, asked: Sequence[str]) -> Html:
    rows = {row_name(row, view): cells for row, cells in rows_of(view).items()}
    able = [name for name, cells in rows.items() if any(len(cell.steps) for cell in cells)]
    if not able:
        return Html("")
    busy = [name for name in able if any(cell.status == RUNNING for cell in rows[name])]
    chosen = [name for name in able if name in asked] or [*busy, *(name for name in able if name not in busy)]
    chosen = chosen if any(name in asked for name in able) else chosen[:MOST_LINES]
    places = {name: place for place, name in enumerate(chosen)}
    charts = []
    for metric in SHOWN:
        lines = [
            ChartLine(name, colour(places[name]), mean_line([cell.steps.line(metric) for cell in rows[name]]))
            for name in chosen
        ]
        charts.append(chart(TITLES[metric], lines))
    for where in _evaluations(view.cells):
        lines = [
            ChartLine(name, colour(places[name]), mean_line([cell.steps.point_line(where) for cell in rows[name]]))
            for name in chosen
        ]
        charts.append(chart(f"{where[-1]}, per cent correct", lines))
    boxes = [
        h("label", h("input", type="checkbox", name="row", value=name, checked=name in places), " ", name)
        for name in able
    ]
    form = h("form", h("div", boxes, class_="choices"), h("button", "Show these"), method="get", action="/")
    told = "Means over the seeds that have reached a step. Losses of different objectives are different quantities."
    if len(chosen) < len(able):
        told = f"{len(chosen)} of {len(able)} rows. {told}"
    lines = [ChartLine(name, colour(place), mean_line([])) for name, place in places.items()]
    choice = h("details", h("summary", "Choose rows"), form) if len(able) > 1 else None
    return join(h("h2", "Curves"), h("p", told), legend(lines), h("div", charts, class_="charts"), choice)


def _evaluations(cells: Iterable[CellView]) -> list[tuple[str, ...]]:
    """Where the points of learning curves have results: on validation and on benchmarks."""
    points = [point for cell in cells for point in cell.steps.points]
    names = dict.fromkeys(name for point in points for name in point.get("metrics") or {})
    found: list[tuple[str, ...]] = [("metrics", name) for name in names]
    return ([("validation",)] if any(point.get("validation") for point in points) else []) + found


def _cells(view: RunView, status: str) -> Html:
    counts = counts_of(view.cells)
    status = status if status in counts else ""
    shown = [cell for cell in view.cells if not status or cell.status == status]
    hides = not status and len(view.cells) > MOST_CELLS and 0 < counts.get(WAITING, 0) < len(view.cells)
    if hides:
        shown = [cell for cell in shown if cell.status != WAITING]
    order = list(STATUSES)
    shown.sort(key=lambda cell: order.index(cell.status))
    choices = [link("/#part-cells", f"all {len(view.cells)}", class_=None if status else "chosen")]
    choices += [
        link(f"{url('/', status=name)}#part-cells", f"{name} {count}", class_="chosen" if status == name else None)
        for name, count in counts.items()
    ]
    metrics = [name for name in SHOWN[:3] if any(cell.steps.last(name) is not None for cell in view.cells)]
    validates = any(cell.validation is not None for cell in view.cells)
    header = [("cell", "name"), ("status", "word"), ("progress", "word")]
    header += [("left", "number")] if view.is_running else []
    header += [(TITLES[name].split(",")[0].removesuffix(" of the batch").lower(), "number") for name in metrics]
    header += [("validation", "number")] if validates else []
    header += [(_label(view, benchmark, "avg_at_k"), "number") for benchmark in view.benchmarks]
    body = [
        [
            link(cell_url(cell), cell.id), chip(cell.status), _progress(cell),
            *([_left(cell)] if view.is_running else []),
            *((number(value), value) if (value := cell.steps.last(name)) is not None else NONE for name in metrics),
            *([percent([cell.validation])] if validates else []),
            *(percent([cell.metrics.get(benchmark, {}).get("avg_at_k")]) for benchmark in view.benchmarks),
        ]
        for cell in shown
    ]  # fmt: skip
    hidden = h("p", f"{counts[WAITING]} cells that have not begun are not shown.") if hides else None
    return join(
        h("h2", "Cells"), h("p", [[choice, " "] for choice in choices], class_="choices"), hidden,
        table(header, body, "cells") if shown else h("p", "None."),
    )  # fmt: skip


def _progress(cell: CellView) -> Child:
    steps, planned = len(cell.steps), cell.planned
    if cell.status == FAILED:
        return cell.error
    if cell.status in (DONE, TRAINED):
        return f"{steps} steps" if steps else ""
    if cell.status == WAITING:
        return ""
    told = cell.log.detail or (f"step {steps}/{planned}" if planned else f"step {steps}")
    return [h("progress", value=f"{cell.share:.4f}", max=1), " ", told]


def _left(cell: CellView) -> Child | tuple[str, float]:
    left = cell.log.seconds_left if cell.status == RUNNING else None
    return NONE if left is None else (duration(left), left)


def cell_page(view: RunView, cell: CellView) -> Content:
    """One cell: how it stands, its results, and all of its curves."""
    head = join(
        h("h1", cell.id), h("p", chip(cell.status), " ", STATUSES[cell.status]),
        h("p", _progress(cell)) if cell.status not in (DONE, TRAINED, WAITING) else None,
        h("p", link(url("/samples", row=cell.algorithm, seed=str(cell.seed)), "Its samples")) if cell.metrics else None,
    )  # fmt: skip
    parts = {"state": head, "results": _metrics_of_cell(view, cell)}
    return Content(cell.id, {**parts, "curves": curves_of_cell(cell), "facts": facts_of_cell(cell)}, seconds_of(view))


def _metrics_of_cell(view: RunView, cell: CellView) -> Html:
    if not cell.metrics:
        return Html("") if cell.validation is None else h("p", f"Validation: {100 * cell.validation:.1f} % correct.")
    names = list(dict.fromkeys(name for own in cell.metrics.values() for name in own if name not in ("k", "samples")))
    header = [("metric", "name"), *((benchmark, "number") for benchmark in cell.metrics)]
    body = [[name, *(_value(own.get(name)) for own in cell.metrics.values())] for name in names]
    told = "Fractions, and lengths in tokens."
    return join(h("h2", "Results"), h("p", told), table(header, body, "results"))


def _value(value: Any) -> Child | tuple[str, float]:
    return (number(float(value)), float(value)) if isinstance(value, int | float) else NONE


def curves_of_cell(cell: CellView) -> Html:
    """A chart per metric of steps, and those of evaluations along the way."""
    order = [*SHOWN, *(name for name in cell.steps.names if name not in SHOWN)]
    charts = [
        chart(TITLES.get(name, name), [ChartLine(name, colour(0), cell.steps.line(name))])
        for name in order
        if name in cell.steps.names
    ]
    charts += [
        chart(f"{where[-1]}, per cent correct", [ChartLine(where[-1], colour(1), cell.steps.point_line(where))])
        for where in _evaluations([cell])
    ]
    return join(h("h2", "Curves"), h("div", charts, class_="charts")) if any(charts) else Html("")


def facts_of_cell(cell: CellView) -> Html:
    """What a cell learned with and cost, and its events."""
    costs: Mapping[str, Any] = cell.facts.get("costs") or {}
    pairs: list[tuple[str, Child]] = [
        ("algorithm", cell.algorithm), ("seed", str(cell.seed)),
        ("learning rate", None if cell.learning_rate is None else f"{cell.learning_rate:g}"),
        ("ended by", cell.facts.get("ended")),
        *((name.replace("_", " "), number(float(value))) for name, value in costs.items()
          if isinstance(value, int | float)),
        *((str(name).replace("_", " "), str(value)) for name, value in (cell.facts.get("resolved") or {}).items()),
    ]  # fmt: skip
    events = [h("li", str(event)) for event in cell.facts.get("events") or ()]
    return join(h("h2", "Facts"), facts(pairs), [h("h3", "Events"), h("ul", events)] if events else None)


def settings_page(view: RunView, folder: str, has_experiment: bool) -> Content:
    """The command, all settings, and the versions that the run was made with; and how it can be repeated."""
    again = pre(shlex.join(["rlzoo", view.command, f"{folder}/experiment.yaml"]))
    told = [h("p", "It can be repeated, into a new folder, with"), again] if has_experiment else None
    settings = yaml.safe_dump(dict(view.settings), sort_keys=False, allow_unicode=True, width=100)
    pairs: list[tuple[str, Child]] = [("command", f"rlzoo {view.command}"), ("folder", folder)]
    pairs += [(str(name), str(value)) for name, value in view.versions.items()]
    return Content("Settings", {"settings": join(
        h("h1", "Settings"), facts(pairs), told, h("h2", "All settings"), pre(settings, 200_000),
    )})  # fmt: skip
