"""Checkpoints of a training run: all that it takes to go on as if it had never stopped. Safetensors and JSON."""

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
"""Checkpoints that are kept: one that turns out to be damaged leaves the one before."""


class Checkpoints:
    """The checkpoints in a folder: one file of tensors each, and beside it one of plain data that vouches for it."""

    def __init__(self, folder: Path, seconds: float) -> None:
        """One is due ``seconds`` after the last, or after this was made."""
        self.folder, self.seconds = folder, seconds
        self._cached = CachedResults(folder)
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for one. All processes get the same answer."""
        return bool(agreed(time.monotonic() - self._last >= self.seconds))

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove all but the newest. Of several processes the main one writes."""
        if is_main():
            name = f"step-{step:08d}"
            file = self.folder / f"{name}.safetensors"
            with replacing(file) as beside:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside)
                digest = file_digest(beside)
            self._cached.write(name, {"step": step, "sha256": digest, **state})
            for old in self._names()[:-KEPT]:
                remove(self.folder / f"{old}.result")  # first: it vouches for the other
                remove(self.folder / f"{old}.safetensors")
        barrier()
        self._last = time.monotonic()

    def newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole checkpoint, or None. Damaged ones are passed over: their steps are done again."""
        for name in reversed(agreed(self._names())):
            state, file = self._cached.read(name), self.folder / f"{name}.safetensors"
            with suppress(OSError):
                if state is not None and file_digest(file) == state["sha256"]:
                    return load_file(file), state
        return None

    def _names(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("step-*.result"))
