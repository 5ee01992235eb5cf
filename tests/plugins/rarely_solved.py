"""SFT that learns from a view of its own: samples of prompts that are not always solved, the harder the more often."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rlzoo.objective import Objective
from rlzoo.types import Coefficients, Selector, TokenBatch, Units, register_view


@register_view
class RarelySolved(Selector):
    """Samples with at least ``minimum`` reward whose prompts have a mean reward below ``below``."""

    name: ClassVar[str] = "rarely-solved"

    def units(self, rows: Any, minimum: float = 0.5, below: float = 2.0) -> Units:
        reward, mean = rows["reward"].to_pylist(), self.means(rows)
        return tuple((i,) for i, r in enumerate(reward) if r is not None and r >= minimum and mean[i] < below)

    def weights(self, rows: Any, units: Units) -> tuple[float, ...]:
        return tuple(1 / (1 + self.means(rows)[i]) for (i,) in units)

    def means(self, rows: Any) -> list[float]:
        table = rows.select(["prompt_id", "reward"]).group_by("prompt_id").aggregate([("reward", "mean")]).to_pylist()
        mean = {row["prompt_id"]: row["reward_mean"] for row in table}
        return [mean[prompt] for prompt in rows["prompt_id"].to_pylist()]


@dataclass(frozen=True)
class Hard(Objective):
    name: ClassVar[str] = "hard"
    learns_from: ClassVar[str] = "rarely-solved"

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(torch.ones_like(batch.logp))
