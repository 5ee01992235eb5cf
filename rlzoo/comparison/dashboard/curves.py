"""The metrics of optimizer steps as columns, and their means over cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

POINTS = 300
"""The most points of a drawn line; of more steps, neighbours are averaged."""


@dataclass
class StepColumns:
    """Metrics per optimizer step, and evaluations along the way; N is the number of steps."""

    columns: dict[str, list[float]] = field(default_factory=dict)
    """Name → its value at each step, NaN where it has none; the column ``step`` has the steps."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """Points of the learning curve, as `rlzoo.comparison.curves.brief` gives them."""

    def __len__(self) -> int:
        return len(self.columns.get("step", ()))

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a step. One that is there already was repeated after an interruption, and replaces those since."""
        steps = self.columns.setdefault("step", [])
        while steps and steps[-1] >= row["step"]:
            for values in self.columns.values():
                values.pop()
        before = len(steps)
        for name in dict.fromkeys((*self.columns, *row)):
            self.columns.setdefault(name, [np.nan] * before).append(_number(row.get(name)))

    def add_point(self, point: dict[str, Any]) -> None:
        """Add a point of the learning curve, likewise."""
        self.points = [one for one in self.points if one["step"] < point["step"]] + [point]

    def last(self, name: str) -> float | None:
        """The newest value of a metric; None if there is none."""
        values = self.columns.get(name)
        return values[-1] if values and np.isfinite(values[-1]) else None

    @property
    def names(self) -> list[str]:
        """The metrics that have any value."""
        return [name for name, values in self.columns.items() if name != "step" and np.isfinite(values).any()]

    def line(self, name: str) -> Float[np.ndarray, "N 2"]:
        """Step and value of a metric, where it has one."""
        if name not in self.columns:
            return np.empty((0, 2))
        found: Float[np.ndarray, "N 2"] = np.array([self.columns["step"], self.columns[name]]).T
        kept: Float[np.ndarray, "M 2"] = found[np.isfinite(found[:, 1])]
        return kept

    def point_line(self, where: Sequence[str]) -> Float[np.ndarray, "M 2"]:
        """Step and avg@k, in per cent, of the points that have a result at a path of keys."""
        found = []
        for point in self.points:
            value: Any = point
            for key in (*where, "avg_at_k"):
                value = value.get(key) if isinstance(value, Mapping) else None
            if np.isfinite(number := _number(value)):
                found.append((float(point["step"]), 100.0 * number))
        return np.array(found).reshape(-1, 2)


def columns_of(rows: Iterable[Mapping[str, Any]], points: Iterable[Mapping[str, Any]] = ()) -> StepColumns:
    """The columns of steps as results record them."""
    made, rows = StepColumns(), list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    made.columns = {name: [_number(row.get(name)) for row in rows] for name in ("step", *names)}
    for point in points:
        made.add_point(dict(point))
    return made


def mean_line(lines: Sequence[Float[np.ndarray, "_ 2"]]) -> Float[np.ndarray, "N 2"]:
    """The mean of several lines at each step that any of them has, over those that have it."""
    every = np.concatenate(lines) if lines else np.empty((0, 2))
    if not len(every):
        return every
    steps, place, counts = np.unique(every[:, 0], return_inverse=True, return_counts=True)
    return np.stack([steps, np.bincount(place, every[:, 1]) / counts], 1)


def thinned(line: Float[np.ndarray, "N 2"], most: int = POINTS) -> Float[np.ndarray, "M 2"]:
    """A line with neighbours averaged so that it has at most ``most`` points."""
    if len(line) <= most:
        return line
    return np.stack([part.mean(0) for part in np.array_split(line, most)])


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan
