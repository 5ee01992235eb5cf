"""Checkpoints of a training run: all that it takes to go on as if it had never stopped. Safetensors and JSON."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlzoo.outputs import file_digest, remove, replacing
from rlzoo.pieces import Pieces
from rlzoo.ranks import agreed, barrier, is_main

KEPT = 2
"""Checkpoints that are kept: one that turns out to be damaged leaves the one before."""


class Checkpoints:
    """The checkpoints in a folder: one file of tensors each, and beside it one of plain data that vouches for it."""

    def __init__(self, folder: Path, seconds: float) -> None:
        """One is due ``seconds`` after the last, or after this was made."""
        self.folder, self.seconds = folder, seconds
        self._pieces = Pieces(folder)
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
            self._pieces.write(name, {"step": step, "sha256": digest, **state})
            for old in self._names()[:-KEPT]:
                remove(self.folder / f"{old}.piece")  # first: it vouches for the other
                remove(self.folder / f"{old}.safetensors")
        barrier()
        self._last = time.monotonic()

    def newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole checkpoint, or None. Damaged ones are passed over: their steps are done again."""
        for name in reversed(agreed(self._names())):
            state, file = self._pieces.read(name), self.folder / f"{name}.safetensors"
            with suppress(OSError):
                if state is not None and file_digest(file) == state["sha256"]:
                    return load_file(file), state
        return None

    def _names(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("step-*.piece"))


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered where processes hold parts of it; all of them must call this."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()


@torch.no_grad()
def put(into: Tensor, value: Tensor) -> None:
    """Overwrite a tensor with a whole one; a sharded one takes its part."""
    if hasattr(into, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(into, DTensor)
        value = distribute_tensor(value.to(into.device), into.device_mesh, into.placements)
    into.copy_(value)


def optimizer_tensors(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """The optimizer's state, as ``optimizer/<entry>/<parameter>``."""
    return {
        f"optimizer/{entry}/{name}": whole(value)
        for name, parameter in named
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


@torch.no_grad()
def restore_optimizer(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_tensors`, on an optimizer that has made no step."""
    parameters = dict(named)
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind != "optimizer":
            continue
        entry, _, name = rest.partition("/")
        parameter = parameters[name]
        if value.shape == parameter.shape:
            optimizer.state[parameter][entry] = torch.zeros_like(parameter, requires_grad=False)
            put(optimizer.state[parameter][entry], value)
        else:  # a count of steps
            optimizer.state[parameter][entry] = value.to(parameter.device)


def random_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of torch's, NumPy's and Python's own random numbers: as tensors, and as plain data."""
    tensors = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"random/cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, *rest = np.random.get_state(legacy=True)
    return tensors, {"python": random.getstate(), "numpy": [kind, np.asarray(keys).tolist(), *rest]}


def restore_random_states(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """The inverse of `random_states`; GPUs that are no longer there are passed over."""
    torch.set_rng_state(tensors["random/cpu"])
    for device in range(torch.cuda.device_count()):
        if (state := tensors.get(f"random/cuda/{device}")) is not None:
            torch.cuda.set_rng_state(state, device)
    random.setstate(random_state(plain["python"]))
    kind, keys, *rest = plain["numpy"]
    np.random.set_state((kind, np.asarray(keys, np.uint32), *rest))


def random_state(plain: Any) -> Any:
    """The state of a `random.Random`, from what JSON made of it."""
    version, numbers, gauss = plain
    return version, tuple(numbers), gauss
