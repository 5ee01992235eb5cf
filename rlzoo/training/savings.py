"""Less memory and time per training step: gradients accumulated in place, activations recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rlzoo.errors import UserError
from rlzoo.jobs.ranks import is_sharded
from rlzoo.policy import Policy
from rlzoo.policy.compiled import layers_of


@contextmanager
def savings(policy: Policy, recompute: bool) -> Iterator[None]:
    """The context of a policy's forward and backward passes in training; with ``recompute``, `layers_recomputed`."""
    own_gradients = is_sharded(policy) or policy.compiles
    with (
        layers_recomputed(policy) if recompute else nullcontext(),
        nullcontext() if own_gradients else gradients_in_place(policy),
    ):
        yield


@contextmanager
def layers_recomputed(model: nn.Module) -> Iterator[None]:
    """In this context, transformer layers keep only their inputs and run again in the backward pass.

    transformers' own option works only in training mode, whereas rlzoo trains in evaluation mode, without dropout.
    Raises UserError for a model without layers that support it. Source: arXiv 1604.06174.
    """
    layers = layers_of(model)
    if not layers:
        raise UserError("gradient_checkpointing: the model has no layers that transformers would checkpoint")
    before = [vars(layer).get("forward") for layer in layers]  # a compiled one
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


@contextmanager
def gradients_in_place(model: nn.Module) -> Iterator[None]:
    """In this context, backward passes on a CPU add to the ``.grad`` of weights in place.

    By default, autograd computes each micro-batch's gradient in new memory and then adds it to ``.grad``; a matrix
    product can accumulate directly. For an embedding, autograd fills a zero matrix of the whole vocabulary (twice if
    weights are tied), although only the rows that were looked up have a gradient. On a GPU the overhead is negligible
    and adding rows in place is not deterministic, so nothing changes there, nor for modules other than a plain
    `nn.Embedding` or `nn.Linear`.
    """
    changed = [module for module in model.modules() if _is_plain(module)]
    for module in changed:
        module.forward = _lookup_of(module) if isinstance(module, nn.Embedding) else _product_of(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _is_plain(module: nn.Module) -> bool:
    if type(module) is nn.Embedding:
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    else:
        plain = type(module) is nn.Linear
    weight = getattr(module, "weight", None)
    own = "forward" not in vars(module)  # another patch is left alone
    return plain and own and weight is not None and weight.requires_grad and weight.device.type == "cpu"


def _lookup_of(module: nn.Embedding) -> Any:
    return lambda input: _Lookup.apply(module.weight, input, module.padding_idx)  # type: ignore[no-untyped-call]


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


def _product_of(module: nn.Module) -> Any:
    assert isinstance(module, nn.Linear)

    def product(input: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):  # which casts the weight: its gradient has another dtype
            return functional.linear(input, module.weight, module.bias)
        found: Tensor = _Product.apply(input, module.weight)  # type: ignore[no-untyped-call]
        return found if module.bias is None else found + module.bias

    return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "*B H"], weight: Float[Tensor, "O H"]) -> Float[Tensor, "*B O"]:
        ctx.save_for_backward(x)
        ctx.weight = weight  # the parameter itself: a checkpoint returns an alias with its own .grad
        return functional.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: Float[Tensor, "*B O"]) -> tuple[Tensor | None, None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        rows, pulls = x.reshape(-1, x.shape[-1]), pull.reshape(-1, pull.shape[-1])
        if weight.grad is None:
            weight.grad = pulls.T @ rows
        else:
            weight.grad.addmm_(pulls.T, rows)
        return pull @ weight if ctx.needs_input_grad[0] else None, None
