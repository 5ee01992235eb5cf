"""A number that changes with the fraction of training that is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from rlzoo.errors import UserError

Shape = Literal["linear", "cosine", "steps"]
"""Between two points: a straight line, half a period of a cosine, or the value of the earlier point."""


@dataclass(frozen=True)
class Schedule:
    """Values at fractions of training, and what is between them; before the first and after the last, their values."""

    points: tuple[tuple[float, float], ...]
    shape: Shape = "linear"

    @classmethod
    def of(cls, points: Mapping[float, float], shape: Shape = "linear") -> Schedule:
        """From values by fraction of training. Raises UserError unless there are any, at fractions from 0 to 1."""
        if not points:
            raise UserError("a schedule needs values by fraction of training, such as {0: 0.9, 0.5: 0.05}")
        for fraction in points:
            if not 0 <= fraction <= 1:
                raise UserError(f"a schedule is by fraction of training, from 0 to 1: {fraction:g} is not one")
        return cls(tuple(sorted(points.items())), shape)

    def at(self, fraction: float) -> float:
        """The value once this fraction of training is done: 0 at the first step, and 1 only after the last."""
        if fraction >= self.points[-1][0]:
            return self.points[-1][1]
        for (start, before), (end, after) in pairwise(self.points):
            if start <= fraction < end:
                share = {
                    "linear": (fraction - start) / (end - start),
                    "cosine": (1 - math.cos(math.pi * (fraction - start) / (end - start))) / 2,
                    "steps": 0.0,
                }[self.shape]
                return before + share * (after - before)
        return self.points[0][1]
