"""The record of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from rlzoo.training.costs import Costs


@dataclass
class TrainingRecord:
    """Metrics per step, costs and events of training. Checkpoints contain it; after resuming, it is continued."""

    steps: list[dict[str, float]] = field(default_factory=list)
    costs: Costs = field(default_factory=Costs)
    events: list[str] = field(default_factory=list)
    """What a user should know: skipped steps, micro-batches that did not fit and, at the end, how much of the drawn
    data gave no gradient."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per component of the objective: how much data was drawn, and how much of it gave no gradient (see `tally`)."""
    ended: str | None = None
    """Why training is over: ``steps``, ``budget``, or the reason that `Trainer.stop` was given."""
    kept: dict[str, list[Any]] = field(default_factory=dict)
    """Plain data that callbacks keep with the record."""

    def plain_steps(self) -> list[dict[str, float | None]]:
        """The steps for a JSON file: values that are not finite are null."""
        return [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in self.steps]
