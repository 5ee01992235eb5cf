"""Checkpoints of training: the whole state needed to resume exactly, as safetensors and JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlzoo.jobs.cached_results import CachedResults
from rlzoo.jobs.outputs import file_digest, remove, replacing
from rlzoo.jobs.ranks import agreed, barrier, is_main

KEPT = 2
"""Number of checkpoints kept: if the last is damaged, the one before is used."""


class Checkpoints:
    """The checkpoints in a folder: for each, a file of tensors, and one of plain data with its checksum."""

    def __init__(self, folder: Path, seconds: float) -> None:
        """A checkpoint is due ``seconds`` after the last one, or after construction."""
        self.folder, self.seconds = folder, seconds
        self._cached = CachedResults(folder)
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether a checkpoint is due; the same on all processes."""
        return bool(agreed(time.monotonic() - self._last >= self.seconds))

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove all but the newest `KEPT`. The main process writes."""
        if is_main():
            name = f"step-{step:08d}"
            file = self.folder / f"{name}.safetensors"
            with replacing(file) as beside:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside)
                digest = file_digest(beside)
            self._cached.write(name, {"step": step, "sha256": digest, **state})
            for old in self._names()[:-KEPT]:
                remove(self.folder / f"{old}.result")  # first, as it holds the checksum of the other
                remove(self.folder / f"{old}.safetensors")
        barrier()
        self._last = time.monotonic()

    def newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest intact checkpoint, or None. Damaged ones are skipped: their steps are repeated."""
        for name in reversed(agreed(self._names())):
            state, file = self._cached.read(name), self.folder / f"{name}.safetensors"
            with suppress(OSError):
                if state is not None and file_digest(file) == state["sha256"]:
                    return load_file(file), state
        return None

    def _names(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("step-*.result"))
