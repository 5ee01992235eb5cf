"""The processes of one distributed run: who this one is, and work that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that a launcher started: on a GPU of its own, or through gloo where there is none."""
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 where it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def world_size() -> int:
    """How many processes run this together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass needs all processes, each holding a part of the weights (FSDP2)."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def shared(items: Sequence[T], work: Callable[[list[int]], list[R]], model: nn.Module) -> list[R]:
    """``work`` on the numbers of all items, each process doing a part; every process gets all results, in order.

    All processes must call this. Where the model is sharded each does all of the work, in step with the others.
    """
    size = world_size()
    if size == 1 or is_sharded(model):
        return work(list(range(len(items))))
    found: list[Any] = [None] * len(items)
    for number, part in enumerate(gathered(work(list(range(rank(), len(items), size))))):
        found[number::size] = part
    return found


def agreed(value: T) -> T:
    """The main process's value, on every process: what each made for itself may differ by a rounding error."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: T) -> list[T]:
    """What every process has, in order of their numbers."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def summed(value: Tensor) -> Tensor:
    """The sum of what every process has; the tensor itself takes it."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()
