"""Compiled transformer layers: torch.compile fuses norms, rotary embeddings, gates and casts into a few kernels.

Layers are compiled rather than the model: all layers of a kind share the compiled code, and shapes are symbolic, so
that a micro-batch of another size does not recompile. Attention remains a call of its own kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from rlzoo.jobs.memory import is_out_of_memory
from rlzoo.policy import sharding
from rlzoo.policy.packing import HALF, ROUNDING
from rlzoo.policy.sequences import Row

if TYPE_CHECKING:
    from rlzoo.policy.policy import Policy

BACKEND = "inductor"
OURS = "_rlzoo_compiled"
"""An attribute of the forward functions that this module gives to layers."""
_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def uncompiled() -> Iterator[None]:
    """In this context, layers run without compilation, so that hooks on their modules are called."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The model's decoder layers: those for which transformers supports gradient checkpointing."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def set_compiled(model: nn.Module, compiled: bool) -> None:
    """Compile a model's layers, or undo it. Decoding, where a cache changes with every token, always runs uncompiled.

    A layer whose ``forward`` another library has replaced is left unchanged.
    """
    for layer in layers_of(model):
        own = vars(layer).get("forward")
        if isinstance(own, MethodType) and hasattr(own.__func__, OURS):
            del layer.forward
        elif own is not None:
            continue
        if compiled:  # a method, so that a copy of the model calls it on its own layers
            torch._dynamo.config.skip_nnmodule_hook_guards = False  # otherwise hooks added later are ignored
            layer.forward = MethodType(_either(type(layer).forward, BACKEND), layer)


@cache
def _either(plain: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A layer's forward function that runs compiled except in decoding and in `uncompiled`."""
    fast = compiled(plain, backend)

    def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        decodes = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        return (plain if decodes or _plain.get() else fast)(layer, *args, **kwargs)

    setattr(forward, OURS, True)
    return forward


def miscompiled(policy: Policy) -> str | None:
    """Why a policy's compiled layers cannot be used, or None.

    Two rows are run compiled and uncompiled, to compare hidden states and the last layer's gradients.
    """
    layers = layers_of(policy.model)
    if not layers:
        return "transformers does not support checkpointing of the model's layers, which marks those to compile"
    sequences, training = policy.collate([Row([0, 1], [1]), Row([1] * 4, [0, 1, 1])]), policy.training
    trained = [p for p in layers[-1].parameters() if p.requires_grad]
    found: list[list[Tensor]] = []
    policy.eval()
    try:
        for context in (uncompiled(), nullcontext()):
            with context:
                states = policy.run(lambda: policy.hidden(sequences))
            direction = torch.linspace(-1, 1, states.shape[1], device=states.device)  # a norm fixes Σ states²
            gradients = sharding.gradients((states.float() @ direction).sum(), policy, trained) if trained else ()
            found.append([value.detach().float() for value in (states, *gradients)])
    except Exception as error:  # any part of the compiler or of the model's code may fail
        if is_out_of_memory(error):
            raise
        error = getattr(error, "inner_exception", error)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"the model's layers cannot be compiled ({reason:.120})"
    finally:
        policy.train(training)
    limit = ROUNDING if (policy.compute or policy.model.dtype) in HALF else 1e-3
    alike = [(one - other).norm() <= limit * one.norm() for one, other in zip(*found, strict=True)]
    return None if all(map(bool, alike)) else "the model's layers give other results when compiled"


def compiled(function: Callable[..., Any], backend: str | None = None) -> Callable[..., Any]:
    """A function compiled for all shapes, with the same intermediate rounding to bfloat16 as without compilation."""
    backend = backend or BACKEND
    options: Any = {"emulate_precision_casts": True} if backend == "inductor" else None
    return torch.compile(function, dynamic=True, backend=backend, options=options)
