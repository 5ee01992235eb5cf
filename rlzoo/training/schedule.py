"""The learning-rate schedule."""

from __future__ import annotations

import math

from rlzoo.config import Training


def cosine(step: int, settings: Training) -> float:
    """The factor of the peak learning rate in a step: linear warm-up, then cosine decay.

    With S = ``steps`` and W = ⌈``warmup_ratio`` · S⌉: (t + 1) / (W + 1) for t < W, then
    ½ (1 + cos(π (t - W) / (S - W))), which reaches 0 at t = S, one step after the last.
    """
    warmup = math.ceil(settings.warmup_ratio * settings.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))
