"""The tables of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rlzoo.comparison.outcomes import METRICS, OVERALL
from rlzoo.comparison.report.schema import CellCosts, Results, SummaryRow
from rlzoo.config import BASE
from rlzoo.document import Entry, Table
from rlzoo.document.estimates import NONE


def percent(value: float | None) -> str:
    """A fraction in per cent, with one decimal."""
    return NONE if value is None or math.isnan(value) else f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of fractions in percentage points, with a sign (a typographic minus) unless it is 0."""
    text = f"{100 * value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def size(value: float) -> str:
    """The size of a difference in percentage points, without a sign."""
    return points(value).lstrip("+") if value < 1 else "more than 100"


def listed(words: Sequence[str]) -> str:
    """Words as a list in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def amount(value: float | None, unit: str = "") -> str:
    """A quantity with an SI prefix and three digits, as in 1.23 M."""
    if value is None:
        return NONE
    power = min(max(math.floor(math.log10(abs(value)) / 3), 0), 6) if value else 0
    number = f"{value / 1000**power:.3g}" if power or value % 1 else f"{value:.0f}"
    return f"{number} {' kMGTPE'[power].strip()}{unit}".strip()


def plain(value: float | None, unit: str) -> str:
    """The value of a metric: a fraction in per cent, anything else with four digits and a typographic minus."""
    if value is None or unit == "%":
        return percent(value)
    return f"{value:.4g}".replace("-", "−")


def seconds(value: float | None) -> str:
    """A duration, as in 41 s, 3 min 20 s or 2 h 5 min."""
    if value is None:
        return NONE
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def rate(value: float | None) -> str:
    """A learning rate in its shortest form."""
    return NONE if value is None else f"{value:g}"


def interval(row: SummaryRow | None) -> str:
    """A mean in per cent with its interval in brackets."""
    if row is None:
        return NONE
    if math.isnan(row.ci_low):
        return percent(row.mean)
    return f"{percent(row.mean)} [{percent(row.ci_low)}, {percent(row.ci_high)}]"


def significance(p: float) -> str:
    """A p-value, with two digits."""
    return f"p {p_number(p)}" if p < 0.001 else f"p = {p_number(p)}"


def p_number(p: float) -> str:
    """A p-value without its name, with two digits."""
    return "< 0.001" if p < 0.001 else f"{min(p, 1):.2g}" if p < 0.995 else "1"


def on(benchmark: str) -> str:
    """The benchmark of a result, as part of a sentence."""
    return f"by the {OVERALL}" if benchmark == OVERALL else f"on {benchmark}"


def result_table(results: Results, benchmark: str) -> Table:
    """The mean and interval of each metric, with the base model first and the best algorithm marked."""
    best = {metric: _best(results, benchmark, metric) for metric in METRICS}
    rows = []
    for algorithm in dict.fromkeys((BASE, *results.algorithms)):
        found = {metric: results.row(algorithm, benchmark, metric) for metric in METRICS}
        seeds = max((row.seeds for row in found.values() if row), default=0)
        entries = [
            Entry(interval(row), row is not None and algorithm != BASE and row.mean == best[metric])
            for metric, row in found.items()
        ]
        rows.append([Entry(algorithm), *entries, Entry(NONE if algorithm == BASE else str(seeds))])
    labels = [f"{results.label(metric, benchmark)} (%)" for metric in METRICS]
    return Table(["algorithm", *labels, "seeds"], rows)


def online_counterparts(results: Results) -> str | None:
    """Which rows train online elsewhere, and where, as the configuration says; None if there are none."""
    rows = results.settings.get("algorithms")
    places = {
        name: str(row["online_counterpart"]).rpartition("/")
        for name, row in (rows.items() if isinstance(rows, dict) else ())
        if isinstance(row, dict) and row.get("online_counterpart")
    }
    if not places:
        return None
    listed = ", ".join(f"{name} as {row} of {study}" for name, (study, _, row) in places.items())
    return (
        f"Trained online in another experiment, on samples of the policy in training: {listed} "
        "(`rlzoo results show` that study, or run `rlzoo compare` on it)."
    )


def further_table(results: Results, benchmark: str | None) -> Table | None:
    """The means of the metrics that have no interval, on a benchmark or (None) over all; None if there are none."""
    algorithms, shown = (BASE, *results.algorithms), [name for name in results.metrics if name not in METRICS]

    def value(algorithm: str, metric: str) -> float | None:
        if benchmark is None:
            return results.mean_over_benchmarks.get(algorithm, {}).get(metric)
        return results.mean(algorithm, benchmark, metric)

    columns = {metric: [value(algorithm, metric) for algorithm in algorithms] for metric in shown}
    columns = {metric: values for metric, values in columns.items() if any(v is not None for v in values)}
    kinds = [results.metrics[metric] for metric in columns]
    header = [f"{kind.label} ({kind.unit})" if kind.unit else kind.label for kind in kinds]
    rows = [
        [Entry(name), *(Entry(plain(v, kind.unit)) for v, kind in zip(values, kinds, strict=True))]
        for name, values in zip(algorithms, zip(*columns.values(), strict=True), strict=False)
    ]
    return Table(["algorithm", *header], rows) if rows else None


def _best(results: Results, benchmark: str, metric: str) -> float | None:
    """The highest mean; None if there is none, or if all of several are equal."""
    rows = [results.row(algorithm, benchmark, metric) for algorithm in results.algorithms]
    means = [row.mean for row in rows if row]
    return max(means, default=None) if len(means) == 1 or len({*means}) > 1 else None


def facts_of(study: str, results: Results) -> dict[str, Any]:
    """What a study compares, and when it was made, as plain data."""
    return {
        "study": study,
        "benchmarks": list(results.benchmarks),
        "model": results.settings.get("model"),
        "warm_up": results.warm_up is not None,
        "algorithms": list(results.algorithms),
        "seeds": len({cell.seed for cell in results.cells}),
        "created": results.created,
    }


def studies_table(studies: Mapping[str, Results]) -> Table:
    """What each study compares, and when it was made."""
    rows = []
    for name, results in studies.items():
        found = facts_of(name, results)
        model = found["model"] or NONE
        rows.append(
            [
                Entry(name),
                Entry(", ".join(found["benchmarks"])),
                Entry(f"{model} after a warm-up" if found["warm_up"] else str(model)),
                Entry(str(len(found["algorithms"]))),
                Entry(str(found["seeds"])),
                Entry(found["created"][:10]),
            ]
        )
    return Table(["study", "benchmarks", "model", "algorithms", "seeds", "made"], rows, prose="benchmarks")


def loss_table(curves: Mapping[str, Float[np.ndarray, "2 steps"]]) -> Table:
    """The loss and −log π per token of each row, at the first step and as the mean over the last tenth of all steps."""
    rows = [
        [
            Entry(name),
            *(Entry(f"{part:.3g}") for one in both for part in (one[0], one[-max(1, len(one) // 10) :].mean())),
        ]
        for name, both in curves.items()
    ]
    header = [f"{what}, {when}" for what in ("loss", "−log π per token") for when in ("first step", "last tenth")]
    return Table(["algorithm", *header], rows)


_COSTS: Mapping[str, tuple[str, Callable[[float | None], str]]] = {
    "gradient_tokens": ("gradient tokens", amount),
    "sampled_tokens": ("sampled tokens", amount),
    "flops": ("FLOPs", amount),
    "wall_seconds": ("wall time", seconds),
    "peak_memory_bytes": ("peak memory", lambda value: amount(value, "B")),
}


def cost_table(results: Results) -> Table:
    """The cost of one cell per algorithm: the mean over its cells, and the maximum for peak memory."""
    rows = []
    for algorithm in results.algorithms:
        costs = [cell.costs for cell in results.cells if cell.algorithm == algorithm]
        entries = [Entry(show(_cost(costs, name))) for name, (_, show) in _COSTS.items()]
        rows.append([Entry(algorithm), *entries, Entry(str(len(costs)))])
    return Table(["algorithm", *(title for title, _ in _COSTS.values()), "cells"], rows)


def total_cost_table(results: Results) -> Table:
    """The cost of all cells per algorithm, of which a choice among learning rates reports only some."""
    shown = {name: how for name, how in _COSTS.items() if not name.startswith("peak")}
    rows = []
    for algorithm in results.algorithms:
        own = [cell.costs for cell in results.cells if cell.algorithm == algorithm]
        tried = [cell.costs for cells in results.tuning.get(algorithm, {}).values() for cell in cells]
        unknown_tuning = not tried and len((results.learning_rates or {}).get(algorithm, {})) > 1  # by older versions
        totals = {name: None if unknown_tuning else _total(tried or own, name) for name in shown}
        entries = [Entry(show(totals[name])) for name, (_, show) in shown.items()]
        rows.append([Entry(algorithm), *entries, Entry(NONE if unknown_tuning else str(len(tried or own)))])
    return Table(["algorithm", *(title for title, _ in shown.values()), "cells trained"], rows)


def _known(costs: Sequence[CellCosts], name: str) -> list[float]:
    return [value for cost in costs if (value := getattr(cost, name)) is not None]


def _total(costs: Sequence[CellCosts], name: str) -> float | None:
    return sum(known) if (known := _known(costs, name)) else None


def _cost(costs: Sequence[CellCosts], name: str) -> float | None:
    if not (known := _known(costs, name)):
        return None
    return max(known) if name.startswith("peak") else sum(known) / len(known)


def learning_rate_table(results: Results) -> Table | None:
    """The result of each learning rate on validation; those of the reported cells are marked."""
    sweep = {name: tried for name, tried in (results.learning_rates or {}).items() if tried}
    if not sweep:
        return None
    columns = sorted({rate_ for tried in sweep.values() for rate_ in tried}, key=_as_number)
    rows = []
    for algorithm, tried in sweep.items():
        used = {cell.learning_rate for cell in results.cells if cell.algorithm == algorithm}
        entries = [Entry(percent(tried.get(text)), _as_number(text) in used) for text in columns]
        rows.append([Entry(algorithm), *entries])
    return Table(["algorithm", *columns], rows)


def _as_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.inf


def failure_table(results: Results) -> Table | None:
    """The cells that did not finish, and why."""
    rows = [
        [
            Entry(f.algorithm),
            Entry(str(f.seed)),
            Entry(rate(f.learning_rate)),
            Entry(" ".join(f.error.split())[:500]),
        ]
        for f in results.failed or []
    ]
    return Table(["algorithm", "seed", "learning rate", "error"], rows, prose="error") if rows else None


def event_table(results: Results) -> Table | None:
    """Events of training that a reader should know, cells with the same events in one row; None if there are none."""
    seeds: dict[tuple[str, str, str], list[int]] = {}
    for cell in results.cells:
        for event in cell.events:
            seeds.setdefault((cell.algorithm, rate(cell.learning_rate), event), []).append(cell.seed)
    rows = [
        [Entry(algorithm), Entry(", ".join(map(str, own))), Entry(learning_rate), Entry(" ".join(event.split())[:500])]
        for (algorithm, learning_rate, event), own in seeds.items()
    ]
    return Table(["algorithm", "seeds", "learning rate", "event"], rows, prose="event") if rows else None
