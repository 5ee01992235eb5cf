"""Memory: out-of-memory errors, releasing unused memory, and copies to the device."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on the device, through pinned memory, so that the CPU does not wait for the device."""
    if pins(device):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pins(device: torch.device) -> bool:
    """Whether CPU memory can be pinned for copies to the device."""
    return device.type == "cuda" and torch.cuda.is_available()


def free_bytes(device: torch.device) -> float:
    """The memory, in bytes, that this process can still allocate on a GPU, its own unused reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def release_memory() -> None:
    """Return unused memory to the system, so that it does not count in the next peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # in glibc, but not in musl
        if trim is not None:
            trim(0)


_MESSAGES = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Messages of libraries whose exception type does not tell that memory ran out."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the CPU."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(message in str(error) for message in _MESSAGES)
