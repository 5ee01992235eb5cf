"""Memory: what ran out, what nothing uses any more, and the way to the device."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on the device, without waiting for what the device has to do: from pinned memory."""
    if pins(device):
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pins(device: torch.device) -> bool:
    """Whether memory of the host can be pinned for the device."""
    return device.type == "cuda" and torch.cuda.is_available()


def free_bytes(device: torch.device) -> float:
    """Memory of a GPU that this process can still have: what nobody holds, and what it holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def release_memory() -> None:
    """Give memory that nothing uses any more back to the system, so that the next peak is not the last run's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)


_SAID = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""By the libraries below, where memory runs out and the kind of the exception does not say so."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or here."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(said in str(error) for said in _SAID)
