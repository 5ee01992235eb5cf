"""What a training run leaves beside its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from rlzoo.training.costs import Costs


@dataclass
class TrainingRecord:
    """What a run did: one row of metrics per step, and its costs. A checkpoint holds it; a resumed run adds to it."""

    steps: list[dict[str, float]] = field(default_factory=list)
    costs: Costs = field(default_factory=Costs)
    events: list[str] = field(default_factory=list)
    """What a user should know: steps that were skipped, micro-batches that did not fit and, at the end of a run, how
    much of what was drawn could not be learned from."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per component of the objective: how much was drawn, and how much of it taught nothing (see `tally`)."""
    kept: dict[str, list[Any]] = field(default_factory=dict)
    """Plain data that callbacks keep with the run."""

    def plain_steps(self) -> list[dict[str, float | None]]:
        """The steps for a JSON file: what is not finite is null."""
        return [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in self.steps]
