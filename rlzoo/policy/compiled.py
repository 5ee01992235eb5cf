"""Transformer layers that are compiled: norms, rotary embeddings, gates and casts in a few kernels (torch.compile).

A layer is compiled, not the model: all layers of a kind share what was compiled for one, and shapes are symbolic, so
that no micro-batch of another size compiles anew. Attention stays the call of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

BACKEND = "inductor"
OURS = "_rlzoo_compiled"
"""An attribute of the forward functions that this module gives to layers."""
_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """In this context layers run as they are written: one by one, their modules are seen by hooks."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers would checkpoint: its decoder layers."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def set_compiled(model: nn.Module, compiled: bool) -> None:
    """Have layers run compiled, or not; in decoding, where a cache changes with every token, they never do.

    A layer with a forward function of its own, by somebody else, is left alone.
    """
    for layer in layers_of(model):
        own = vars(layer).get("forward")
        if isinstance(own, MethodType) and hasattr(own.__func__, OURS):
            del layer.forward
        elif own is not None:
            continue
        if compiled:  # a method, so that a copy of the model calls it on its own layers
            torch._dynamo.config.skip_nnmodule_hook_guards = False  # else a hook that comes later is passed over
            layer.forward = MethodType(_either(type(layer).forward, BACKEND), layer)


@cache
def _either(plain: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A layer's forward function, compiled where that is wanted."""
    fast = compiled(plain, backend)

    def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        decodes = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        return (plain if decodes or _plain.get() else fast)(layer, *args, **kwargs)

    setattr(forward, OURS, True)
    return forward


def compiled(function: Callable[..., Any], backend: str | None = None) -> Callable[..., Any]:
    """A function compiled for all shapes, which rounds where the function does: to bfloat16 between two operations."""
    backend = backend or BACKEND
    options: Any = {"emulate_precision_casts": True} if backend == "inductor" else None
    return torch.compile(function, dynamic=True, backend=backend, options=options)
