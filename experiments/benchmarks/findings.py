"""What a check finds, with the bounds that it is held to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Value = float | int | str | None


@dataclass(frozen=True)
class Finding:
    """Values by name. One that is no number, or beyond its bound, is wrong."""

    name: str
    values: Mapping[str, Value]
    at_most: Mapping[str, float] = field(default_factory=dict)
    at_least: Mapping[str, float] = field(default_factory=dict)

    @property
    def wrong(self) -> list[str]:
        """What is beyond its bound, in words."""
        told = []
        for key, bound in self.at_most.items():
            if not (isinstance(value := self.values.get(key), (int, float)) and value <= bound):
                told.append(f"{key} is {shown(value)}, above {shown(bound)}")
        for key, bound in self.at_least.items():
            if not (isinstance(value := self.values.get(key), (int, float)) and value >= bound):
                told.append(f"{key} is {shown(value)}, below {shown(bound)}")
        return told

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        values = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in self.values.items()}
        bounds = {"at_most": dict(self.at_most), "at_least": dict(self.at_least)}
        return {"name": self.name, "values": values, **bounds, "wrong": self.wrong}


def shown(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclass(frozen=True)
class Setup:
    """What the parts of a check run with."""

    device: str
    tiny: bool
    folder: Path
    """For what they write."""
    dtype: str
    """Of the policies whose speed is measured."""
    token_budgets: tuple[int, ...]
    """Of rlzoo's steps; 0 is what `Training` says by default."""
    repeats: int
    seed: int

    @property
    def small(self) -> str:
        """The shape of models whose numbers are checked."""
        return "tiny" if self.tiny else "small"

    def pick(self, usual: int, tiny: int) -> int:
        """A number that is smaller in the miniature."""
        return tiny if self.tiny else usual
