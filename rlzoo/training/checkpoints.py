"""Checkpoints of training: the full state needed to resume exactly, as tensors and JSON."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlzoo.jobs.cached_results import CachedResults
from rlzoo.jobs.outputs import file_digest, remove, replacing
from rlzoo.jobs.ranks import agreed, barrier, gathered, is_main, rank, world_size

KEPT = 2
"""The number of checkpoints kept: if the newest is damaged, training resumes from the previous one."""
BUDGET = "token-budget"
Like = Callable[[str, torch.Size, torch.dtype], Tensor]
"""Name, full shape and dtype of a stored tensor → an empty tensor to read it into, of which a shard takes its part."""


def on_cpu(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """A whole tensor on the CPU."""
    return torch.empty(size, dtype=dtype)


class Checkpoints:
    """The checkpoints in a folder: for each, its tensors, and a file of plain data with their checksums.

    A single process writes one safetensors file. Several processes each write their shards to a folder in the
    background (torch.distributed.checkpoint), with checksums; any number of processes can read it. A checkpoint is
    used only if it is complete.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        """A checkpoint is due ``seconds`` after the last one, or after construction."""
        self.folder, self.seconds = folder, seconds
        self._cached = CachedResults(folder)
        self._last = time.monotonic()
        self._writing: Future[None] | None = None

    def due(self) -> bool:
        """Whether a checkpoint is due, by the clock of this process."""
        return time.monotonic() - self._last >= self.seconds

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove all but the newest `KEPT`. All processes must call this.

        With several processes, this returns once all is copied, and writing continues in the background.
        """
        name, state = f"step-{step:08d}", {"step": step, **state}
        if world_size() == 1:
            file = self.folder / f"{name}.safetensors"
            with replacing(file) as beside:
                save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, beside)
                digest = file_digest(beside)
            self._cached.write(name, {**state, "sha256": digest})
            self._remove_old()
        else:
            self.wait()
            self._begin(name, dict(tensors), deepcopy(state))  # training goes on, and adds to its record
        self._last = time.monotonic()

    def wait(self) -> None:
        """Wait until all processes have written the current checkpoint. All processes must call this."""
        if self._writing is not None:
            self.wait_alone()
            barrier()
            if is_main():
                self._remove_old()

    def wait_alone(self) -> None:
        """Wait until this process has written its shards. Raises OSError if the disk is full, for instance."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _begin(self, name: str, tensors: dict[str, Any], state: Mapping[str, Any]) -> None:
        """Copy this process's shards, and start writing them."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        folder = self.folder / name
        if is_main():
            remove(folder)  # of a run that was killed while it wrote
            folder.mkdir(parents=True)
        barrier()
        saving: Any = async_save(tensors, storage_writer=FileSystemWriter(folder), process_group=_group())

        def finish() -> None:
            try:
                saving.result()
            except Exception as error:
                raise _of_the_system(error) or error from None
            own = [*folder.glob(f"__{rank()}_*"), *([folder / ".metadata"] if is_main() else [])]
            digests = {file.name: file_digest(file) for file in own}
            CachedResults(folder).write(f"rank-{rank()}", digests)
            if is_main():
                self._cached.write(name, {**state, "processes": world_size()})

        self._writing = _background().submit(finish)

    def _remove_old(self) -> None:
        for old in self._names()[:-KEPT]:
            remove(self.folder / f"{old}.result")  # first, as it holds the checksum of the others
            remove(self.folder / f"{old}.safetensors")
            remove(self.folder / old)

    def newest(self, like: Like = on_cpu) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and plain data of the newest intact checkpoint, or None. All processes must call this.

        Damaged checkpoints are skipped, and the steps since the one before are repeated.
        """
        for name in reversed(agreed(self._names())):
            state = self._cached.read(name)
            if all(gathered(state is not None and self._is_intact(name, state))):
                folder = self.folder / name
                return (_read(folder, like) if "processes" in state else load_file(f"{folder}.safetensors")), state
        return None

    def _is_intact(self, name: str, state: Mapping[str, Any]) -> bool:
        """Whether a checkpoint's files have their recorded checksums; processes share the work."""
        digests = {f"{name}.safetensors": state.get("sha256")}
        if "processes" in state:
            found = [CachedResults(self.folder / name).read(f"rank-{number}") for number in range(state["processes"])]
            if any(own is None for own in found):
                return False
            digests = {f"{name}/{file}": digest for own in found for file, digest in own.items()}
        mine = sorted(digests.items())[rank() :: world_size()]
        with suppress(OSError):
            return all(file_digest(self.folder / file) == digest for file, digest in mine)
        return False

    def write_budget(self, tokens: int, event: str) -> None:
        """Record the token budget to resume with, and why, after one process of several ran out of memory."""
        _, events = self._cached.read(BUDGET) or (None, [])
        self._cached.write(BUDGET, (tokens, [*events, event]))

    def budget(self) -> tuple[int | None, list[str]]:
        """The recorded token budget, if any, and its events; the same on all processes. All must call this."""
        tokens, events = agreed(self._cached.read(BUDGET)) or (None, [])
        return tokens, events

    def _names(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("step-*.result"))


@cache
def _group() -> Any:
    """A CPU process group, so that checkpoints do not interfere with communication between GPUs."""
    return dist.new_group(backend="gloo")


@cache
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


def _of_the_system(error: BaseException) -> OSError | None:
    """The first OSError, such as a full disk, among the errors of all processes that were writing."""
    causes = [cause for cause, *_ in getattr(error, "failures", {}).values()]
    return next((cause for cause in causes if isinstance(cause, OSError)), None)


def _read(folder: Path, like: Like) -> dict[str, Tensor]:
    """The tensors of a folder that several processes wrote, each read into a tensor from ``like``."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # in one process it should be
    reader = FileSystemReader(folder)
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {name: like(name, one.size, one.properties.dtype) for name, one in stored.items()}
    alone = world_size() == 1
    load(tensors, storage_reader=reader, process_group=None if alone else _group(), no_dist=alone)
    return tensors
