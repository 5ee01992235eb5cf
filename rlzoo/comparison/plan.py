"""The grid of a comparison: which cells there are, and how wrong input is found before anything runs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlzoo.config import Experiment


@dataclass(frozen=True)
class Cell:
    """One training run: an algorithm, a seed, a learning rate."""

    algorithm: str
    seed: int
    learning_rate: float

    @property
    def id(self) -> str:
        """A name that is safe for a folder."""
        return re.sub(r"[^\w.-]+", "_", f"{self.algorithm}-lr{self.learning_rate:g}-seed{self.seed}")


def cells(experiment: Experiment) -> list[Cell]:
    """All cells of the grid; seeds vary slowest, so that an interrupted run has whole rows."""
    return [
        Cell(name, seed, rate)
        for seed in experiment.seeds
        for name in experiment.algorithms
        for rate in experiment.learning_rates_of(name)
    ]


def has_choice(experiment: Experiment, algorithm: str) -> bool:
    """Whether the algorithm's learning rate is chosen on validation."""
    return len(experiment.learning_rates_of(algorithm)) > 1
