"""The processes of one distributed run: their ranks, and the work that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlzoo.errors import UserError
from rlzoo.jobs.restarts import group_options

T = TypeVar("T")
R = TypeVar("R")


_on_leaving: list[Callable[[], None]] = []


def on_leaving(work: Callable[[], None]) -> None:
    """Call ``work`` before the process group is destroyed, for libraries that have to end groups of their own."""
    _on_leaving.append(work)


@contextmanager
def joined() -> Iterator[None]:
    """In this context, processes form the launcher's group: with NCCL on one GPU each, or else with gloo."""
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available(), **group_options())
    try:
        yield
    finally:
        while _on_leaving:
            _on_leaving.pop()()
        if dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    """The rank of this process; 0 without a launcher."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the main process, which writes and prints."""
    return rank() == 0


def world_size() -> int:
    """The number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are sharded (FSDP2), so that a forward pass needs all processes."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())


def shared(items: Sequence[T], work: Callable[[list[int]], list[R]], together: int = 1) -> list[R]:
    """The results of ``work`` for all items, given their indices; processes share the work, and each gets all results.

    All processes must call this. Groups of ``together`` consecutive ranks do the same work.
    """
    size = world_size() // together
    if size <= 1:
        return work(list(range(len(items))))
    found: list[Any] = [None] * len(items)
    for number, part in enumerate(gathered(work(list(range(rank() // together, len(items), size))))[::together]):
        found[number::size] = part
    return found


def agreed(value: T) -> T:
    """The main process's value, on every process. All processes must call this."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def by_main(work: Callable[[], T]) -> T | None:
    """The result of ``work`` in the main process, and None elsewhere. Its UserError is raised in every process."""
    found, failure = None, None
    if is_main():
        try:
            found = work()
        except UserError as error:
            failure = error
    if (of_main := agreed(failure)) is not None:
        raise of_main
    return found


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank. All processes must call this."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor over processes, in place. All processes must call this."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()
