"""A GPU that is not there: tensors that say they are on it and hold nothing, and a count of how often the host waits.

PyTorch's fake tensors refuse to mix devices, so whatever was left on the CPU fails, on any machine.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode, fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda:0")
_aten = torch.ops.aten
_ASKS = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
    _aten.equal.default,
    _aten.repeat_interleave.Tensor,
}
"""What cannot go on before the device has said what came out, beside copies and numbers."""
_INDEXES = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}


class FakeCUDA(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts in ``waits`` what has the host wait for the GPU: numbers, copies to the host, copies from plain memory,
    shapes that depend on values. A number that is asked for is 1, or True, or every second time False where
    ``alternates``."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []
        self.copies: list[str] = []
        """How entries were copied from the host to the GPU."""
        self.pinned: list[Tensor] = []
        self.alternates = False
        self._asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == torch.device("meta"):  # of an operator's own tensors: see `fake_cuda`
            kwargs["device"] = GPU
        if func is _aten._local_scalar_dense.default:
            return self.number(args[0])
        source = args[1] if func is _aten.copy_.default else args[0] if args else None
        target = args[0] if func is _aten.copy_.default else kwargs
        if func in (_aten._to_copy.default, _aten.copy_.default) and isinstance(source, Tensor) and source.numel():
            to = target.device if isinstance(target, Tensor) else target.get("device") or source.device
            blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            if to.type == "cuda" and not _on_gpu(source):
                pinned = any(source is one for one in self.pinned)
                self.copies.append(f"{'' if pinned else 'not '}pinned, {'' if blocks else 'non-'}blocking")
            if _on_gpu(source) != (to.type == "cuda") and (_on_gpu(source) or blocks):
                self.wait(f"a copy from {source.device.type} to {to.type}")
        elif func in _ASKS and _on_gpu(args[0]):
            self.wait(str(func))
        elif func in _INDEXES and _on_gpu(args[0]) and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.wait(f"{func} by a boolean mask")
        return func(*args, **kwargs)

    def wait(self, what: str) -> None:
        """Note that the host waits, and in which line."""
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        at = next(frame for frame in reversed(frames) if frame.filename != __file__)
        self.waits.append(f"{what} in {at.filename}:{at.lineno}")

    def number(self, tensor: Tensor, counts: bool = True) -> bool | int | float:
        """What stands for an entry of a tensor."""
        if _on_gpu(tensor) and counts:
            self.wait("a number")
        self._asked += 1
        if tensor.dtype == torch.bool:
            return not self.alternates or self._asked % 2 == 0
        return 1.0 if tensor.is_floating_point() else 1

    def entries(self, tensor: Tensor) -> Any:
        """What stands for a tensor's ``tolist``: one wait, however many they are."""
        if _on_gpu(tensor):
            self.wait("a list")

        def nested(shape: tuple[int, ...]) -> Any:
            return [nested(shape[1:]) for _ in range(shape[0])] if shape else self.number(tensor, counts=False)

        return nested(tuple(tensor.shape))


def _on_gpu(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.device.type == "cuda"


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCUDA]:
    """While this lasts all tensors are fake, and can be on `GPU`."""
    mode = FakeCUDA()

    # autograd asks for a tensor's device where a build without CUDA knows none: it is told the device of tensors
    # without values, and everybody else, Python, the GPU
    def device(args: Any) -> torch.device:
        real = args[0].fake_mode.in_kernel_invocation or args[0].fake_device.type != "cpu"
        return torch.device("meta" if real else "cpu")

    monkeypatch.setitem(fake_tensor._DISPATCH_META_HANDLERS, torch.ops.prim.device.default, device)
    plain: Callable[..., Any] = FakeTensor.__torch_dispatch__.__func__  # type: ignore[attr-defined]

    def dispatch(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return device(args)
        return plain(cls, func, types, args, kwargs or {})

    monkeypatch.setattr(FakeTensor, "__torch_dispatch__", classmethod(dispatch))
    monkeypatch.setattr(nn.Module, "to", moved)

    def pin_memory(self: FakeTensor) -> Tensor:
        mode.pinned.append(self.clone())
        return mode.pinned[-1]

    monkeypatch.setattr(FakeTensor, "pin_memory", pin_memory)
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: mode.entries(self))
    monkeypatch.setattr(FakeTensor, "numpy", lambda self: np.array(mode.entries(self)), raising=False)
    gc.disable()  # it crashes over what refers to itself by way of fake parameters: all of that stays, and is small
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), mode:
            yield mode
    finally:
        gc.freeze()
        gc.enable()


def moved(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`nn.Module.to`, which does not get along with fake tensors that something else refers to."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    known: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) not in known:
                kind = dtype if parameter.is_floating_point() else None
                known[id(parameter)] = nn.Parameter(parameter.detach().to(device, kind), parameter.requires_grad)
            setattr(part, name, known[id(parameter)])
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device, dtype if buffer.is_floating_point() else None))
    return module
