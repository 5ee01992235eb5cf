"""What a run cost, in units that do not depend on the machine and some that do."""

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
    """Counted while training; evaluation is left out."""

    gradient_tokens: int = 0
    """Prompt and completion tokens, padding left out, that went through a backward pass."""
    sampled_tokens: int = 0
    """Completion tokens that were sampled to learn from; a shared buffer's count for each that learns from it."""
    flops: float = 0.0
    """Matrix-product FLOPs of forwards, backwards and sampling (see `Policy.flops`)."""
    wall_seconds: float = 0.0
    """Training time alone."""
    peak_memory_bytes: int = 0
    """Peak from the start of training to its end: of the process (CPU: resident set), or of its tensors (GPU)."""

    def add(self, spent: Mapping[str, float]) -> None:
        """Add what something took, by the names of these fields."""
        for name, amount in spent.items():
            setattr(self, name, getattr(self, name) + amount)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done what it was asked to: the host only asks."""
    if _on_gpu(device):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _on_gpu(device: torch.device | None) -> bool:
    return torch.cuda.is_available() and (device is None or device.type == "cuda")


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Start a new peak on the ``device`` (None: a GPU where there is one) where the platform can."""
    if _on_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):  # some containers do not allow it
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Peak memory since `reset_peak_memory`, in bytes: of this process's tensors on a GPU, or of the process."""
    if _on_gpu(device):
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
