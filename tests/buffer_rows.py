"""Sampled rows and buffers of them, for tests."""

from __future__ import annotations

from dataclasses import replace

from rlzoo.buffers import OfflineBuffer
from rlzoo.types import Trajectory


def sample(prompt: int, reward: float | None, text: str = "x", version: int = 0, **changes: object) -> Trajectory:
    row = Trajectory(
        f"prompt {prompt}",
        text,
        [1, 2],
        [3],
        str(prompt),
        source="policy",
        reward=reward,
        behaviour_logp=[-1.0],
        policy_version=version,
    )
    return replace(row, **changes)  # type: ignore[arg-type]


def samples(*rows: Trajectory) -> OfflineBuffer:
    return OfflineBuffer.from_trajectories(rows)
