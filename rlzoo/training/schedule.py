"""The learning-rate schedule."""

from __future__ import annotations

import math

from rlzoo.config import Training


def cosine(step: int, settings: Training) -> float:
    """Linear warm-up over ``warmup_ratio`` of the steps, then cosine decay to 0, one step after the last."""
    warmup = math.ceil(settings.warmup_ratio * settings.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))
