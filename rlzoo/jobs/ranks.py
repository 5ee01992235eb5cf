"""The processes of one distributed run: their ranks, and the work that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlzoo.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


_before_parting: list[Callable[[], None]] = []


def before_parting(work: Callable[[], None]) -> None:
    """Have this done before the processes leave their group: a library that has groups of its own ends them."""
    _before_parting.append(work)


@contextmanager
def joined() -> Iterator[None]:
    """Join the process group of a launcher: with NCCL on one GPU each, else with gloo."""
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())
    try:
        yield
    finally:
        while _before_parting:
            _before_parting.pop()()
        if dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    """The rank of this process; 0 without a launcher."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def world_size() -> int:
    """The number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass needs all processes, each holding a part of the weights (FSDP2)."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def shared(
    items: Sequence[T], work: Callable[[list[int]], list[R]], model: nn.Module | None = None, together: int = 1
) -> list[R]:
    """``work`` on the indices of all items, shared by the processes; each process gets all results, in order.

    All processes must call this. With a sharded ``model`` each does all of the work, in step with the others; those of
    ``together`` consecutive ranks do the same work.
    """
    size = world_size() // together
    if size <= 1 or (model is not None and is_sharded(model)):
        return work(list(range(len(items))))
    found: list[Any] = [None] * len(items)
    for number, part in enumerate(gathered(work(list(range(rank() // together, len(items), size))))[::together]):
        found[number::size] = part
    return found


def agreed(value: T) -> T:
    """The main process's value, on every process: their own may differ by rounding errors."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def by_main(work: Callable[[], T]) -> T | None:
    """What the main process's ``work`` returns, and None elsewhere. Its UserError is raised in every process."""
    found, wrong = None, None
    if is_main():
        try:
            found = work()
        except UserError as error:
            wrong = error
    if (told := agreed(wrong)) is not None:
        raise told
    return found


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def summed(value: Tensor) -> Tensor:
    """The sum over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()
