"""What a step saves: embedding gradients without a dense matrix, and activations that are made anew."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rlzoo.errors import UserError


@contextmanager
def layers_recomputed(model: nn.Module) -> Iterator[None]:
    """While this lasts, transformer layers keep their input alone and run again in the backward pass.

    transformers' own switch works in training mode alone, and this trains without dropout, in evaluation mode.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError("gradient_checkpointing: the model has no layers that transformers would checkpoint")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def gradients_in_place(model: nn.Module) -> Iterator[None]:
    """While this lasts, a look-up's backward pass adds the rows that it touched to the weight's ``.grad``.

    autograd makes a zero matrix of the whole vocabulary for every micro-batch and adds it up, for tied weights twice:
    a fifteenth of a small model's step. On a GPU that costs next to nothing and adding in place is not deterministic,
    so there, and for modules that are more than a plain `nn.Embedding`, all stays as it is.
    """
    changed = [module for module in model.modules() if isinstance(module, nn.Embedding) and _is_plain(module)]
    for module in changed:
        module.forward = _lookup_of(module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _is_plain(module: nn.Embedding) -> bool:
    special = module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    here = module.weight.requires_grad and module.weight.device.type == "cpu"
    return type(module) is nn.Embedding and here and not special


def _lookup_of(module: nn.Embedding) -> Any:
    return lambda ids: _Lookup.apply(module.weight, ids, module.padding_idx)  # type: ignore[no-untyped-call]


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Float[Tensor, "V H"], ids: Int[Tensor, "*B"], padding: int | None
    ) -> Float[Tensor, "*B H"]:
        ctx.weight, ctx.ids, ctx.padding = weight, ids, padding
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: Float[Tensor, "*B H"]) -> tuple[None, None, None]:
        weight, ids, rows = ctx.weight, ctx.ids.flatten(), pull.flatten(0, -2)
        if ctx.padding is not None:
            rows = rows * (ids != ctx.padding)[:, None]
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.index_add_(0, ids, rows.to(weight.dtype))
        return None, None, None
