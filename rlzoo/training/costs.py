"""The costs of training: tokens and FLOPs, time and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass
class Costs:
    """The costs of training; evaluation is not included."""

    gradient_tokens: int = 0
    """Prompt and completion tokens in backward passes, without padding."""
    sampled_tokens: int = 0
    """Completion tokens sampled for training; those of a shared buffer count for each cell that learns from it."""
    flops: float = 0.0
    """FLOPs of matrix products in forward and backward passes and in sampling (see `Policy.flops`). Of the first
    micro-batch of a batch whose log-probs are needed beforehand they are counted as if it ran forward twice."""
    wall_seconds: float = 0.0
    """Time spent in training steps."""
    peak_memory_bytes: int = 0
    """Peak during training (CPU: resident set of the process; GPU: this process's tensors)."""

    @property
    def tokens(self) -> int:
        """Gradient tokens and sampled tokens together."""
        return self.gradient_tokens + self.sampled_tokens

    def add(self, spent: Mapping[str, float]) -> None:
        """Add amounts, by field name."""
        for name, amount in spent.items():
            setattr(self, name, getattr(self, name) + amount)

    def as_dict(self) -> dict[str, float]:
        """The costs by field name."""
        return asdict(self)


def now(device: torch.device) -> float:
    """The time in seconds, after waiting for the device: kernels run asynchronously."""
    if _on_gpu(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _on_gpu(device: torch.device | None) -> bool:
    return torch.cuda.is_available() and (device is None or device.type == "cuda")


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Reset the peak of `peak_memory_bytes`, where the platform allows it; ``device`` None: a GPU if there is one."""
    if _on_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # some containers do not allow it
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Peak memory in bytes since `reset_peak_memory`: of this process's tensors on a GPU, or of the whole process."""
    if _on_gpu(device):
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
