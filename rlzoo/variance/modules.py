"""The modules of a model whose parameters' gradients can be computed per row, and what that computation needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp

from rlzoo.errors import UserError
from rlzoo.policy.compiled import uncompiled
from rlzoo.policy.head import Head
from rlzoo.policy.policy import Policy
from rlzoo.variance.factored import Block, Factored, Lookup, Outer, Sum, at_least_float32

FIX = "freeze its parameters (requires_grad_(False)), or leave the gradients out"


@dataclass
class Covered:
    """A module whose parameters' gradients can be computed per row."""

    name: str
    """The name in the model."""
    module: nn.Module
    parameters: Mapping[str, str]
    """The parameters that train: name in the module → name in the model."""
    layer: int
    factor: float = 1.0
    """The factor on the output of an embedding."""
    saved: Tensor | None = None
    """What the forward pass leaves for the backward: inputs, ids, or the derivative by a scale."""

    def remember(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep what the backward pass needs of the module's inputs."""
        if self.saved is not None:
            raise UserError(f"module {self.name!r} runs twice in one forward pass: {FIX}")
        if _is_matrix(self.module) or isinstance(self.module, nn.Embedding):
            self.saved = (args[0] if args else next(iter(kwargs.values()))).detach()
        else:
            self.saved = _by_scale(self.module, *args, **kwargs)

    def by_row(self, e: Tensor, rows: int, positions: int) -> Float[Tensor, "B L D"]:
        """The gradient at the output with rows first. Raises UserError where rows are mixed."""
        if e.ndim >= 3 and e.shape[0] == rows:
            return e.reshape(rows, -1, e.shape[-1])
        if e.ndim == 2 and e.shape[0] == rows * positions:
            return e.reshape(rows, positions, -1)
        raise UserError(
            f"module {self.name!r} gives {tuple(e.shape)} for {rows} rows of {positions} tokens, so its gradients "
            f"cannot be computed per row: {FIX}"
        )

    def looked_up(self, e: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """For an embedding, the gradient at the rows that it looks up; torch gives the padding row none."""
        assert isinstance(self.module, nn.Embedding) and self.saved is not None
        e = e if self.factor == 1.0 else e * self.factor
        padding = self.module.padding_idx
        return e if padding is None else e * (self.saved.reshape(e.shape[:2]) != padding)[..., None]

    def factored(self, block: Block, e: Float[Tensor, "B L D"]) -> Iterator[tuple[str, Factored]]:
        """The gradient of each parameter for the units of a block, from the gradient ``e`` at the output."""
        assert self.saved is not None
        computed = e.dtype  # of the product, to which its input was rounded
        e = e.to(at_least_float32(computed))
        if isinstance(self.module, nn.Embedding):
            ids = block.cut(self.saved.reshape(e.shape[:2]))
            yield self.parameters["weight"], Lookup(ids, block.cut(self.looked_up(e)), self.module.num_embeddings)
            return
        gradient = block.cut(e)
        if "bias" in self.parameters:
            yield self.parameters["bias"], Sum(gradient)
        if "weight" not in self.parameters:
            return
        name = self.parameters["weight"]
        inputs = block.cut(self.saved.reshape(*e.shape[:2], -1).to(computed).to(gradient.dtype))
        if isinstance(self.module, nn.Linear):
            yield name, Outer(gradient, inputs)
        elif _is_matrix(self.module):
            yield name, Outer(inputs, gradient)  # transformers' Conv1D keeps its matrix transposed
        else:
            yield name, Sum(gradient * inputs)


class Modules:
    """The modules of a policy with trainable parameters, by layer.

    Covered are Linear, transformers' Conv1D, Embedding, normalisations with a scale, their biases, and an output layer
    of its own or tied to the embedding. Raises UserError that names any other: nothing is left out silently.
    """

    def __init__(self, policy: Policy) -> None:
        self.trainable = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
        if not self.trainable:
            raise UserError(f"model {policy.name!r} has no parameter that trains, so there is no gradient to measure")
        names = {id(p): name for name, p in self.trainable.items()}
        head = Head.of(policy.model).layer
        owners: dict[str, list[str]] = {}
        self.layers: list[str] = []
        self.covered: list[Covered] = []
        self.head_parameters: Mapping[str, str] = {}
        self.head_layer: int | None = None
        for name, module in policy.model.named_modules():
            own = {local: names[id(p)] for local, p in module.named_parameters(recurse=False) if id(p) in names}
            for full in own.values():
                owners.setdefault(full, []).append(name)
            if own and module is head and type(head).forward is nn.Linear.forward:
                self.head_parameters = own
            elif own:
                self.covered.append(Covered(name, module, own, self._layer(name), _checked(name, module)))
        if type(head).forward is not nn.Linear.forward and any(p.requires_grad for p in head.parameters()):
            raise UserError(f"the output layer ({type(head).__name__}) is not a plain linear layer: {FIX}")
        self.tied = self._tied_embedding(owners)
        if self.tied is not None:
            self.head_layer = self.tied.layer
        elif self.head_parameters:
            self.head_layer = self._layer(next(iter(self.head_parameters.values())).rpartition(".")[0])
        self.layer_of = dict.fromkeys(self.head_parameters.values(), self.head_layer or 0)
        self.layer_of |= {full: c.layer for c in self.covered for full in c.parameters.values()}

    def _layer(self, name: str) -> int:
        """The number of the layer of a module: its numbered block where there is one, else the module itself."""
        block = re.match(r"(?:\w+\.)*?(\w+\.\d+)(?=\.|$)", name)
        label = block.group(1) if block else name.rpartition(".")[2]
        if label not in self.layers:
            self.layers.append(label)
        return self.layers.index(label)

    def _tied_embedding(self, owners: Mapping[str, list[str]]) -> Covered | None:
        """The embedding that shares its weight with the output layer. Raises UserError for any other sharing."""
        tied = None
        for full, sharing in owners.items():
            if len(sharing) > 1:
                embeddings = [c for c in self.covered if c.name in sharing and isinstance(c.module, nn.Embedding)]
                if len(sharing) > 2 or len(embeddings) != 1 or full != self.head_parameters.get("weight"):
                    raise UserError(f"parameter {full!r} is shared by the modules {', '.join(sharing)}: {FIX}")
                tied = embeddings[0]
        return tied

    @contextmanager
    def watched(self, output: Callable[[Covered, Tensor], None]) -> Iterator[None]:
        """Within, every covered module keeps what it needs of its input, and shows its output."""
        busy = False

        def hook(covered: Covered) -> Callable[..., None]:
            def run(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
                nonlocal busy
                if not busy:  # the derivative by a scale runs the module again
                    busy = True
                    covered.remember(args, kwargs)
                    busy = False
                    output(covered, result)

            return run

        self.forget()
        handles = [c.module.register_forward_hook(hook(c), with_kwargs=True) for c in self.covered]
        try:
            with uncompiled():
                yield
        finally:
            for handle in handles:
                handle.remove()
        for covered in self.covered:
            if covered.saved is None:
                raise UserError(f"module {covered.name!r} has parameters that train and does not run: {FIX}")

    def forget(self) -> None:
        """Drop what the last forward pass left."""
        for covered in self.covered:
            covered.saved = None


def _checked(name: str, module: nn.Module) -> float:
    """The factor on an embedding's output, 1 for other modules. Raises UserError for a module that is not covered."""
    factor: float | None = None
    if isinstance(module, nn.Embedding):
        factor = _embedding_factor(module)
    elif _is_matrix(module) or _is_scale(module):
        factor = 1.0
    if factor is None:
        raise UserError(f"module {name!r} ({type(module).__name__}) has no known gradient per row: {FIX}")
    return factor


def _is_matrix(module: nn.Module) -> bool:
    """Whether the module is y = W x + b, in one of the two layouts; a subclass that computes something else is not."""
    from transformers.pytorch_utils import Conv1D

    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


@torch.no_grad()
def _embedding_factor(module: nn.Embedding) -> float | None:
    """s of an embedding that gives s · weight[id], found by running it; None for one that gives anything else."""
    if module.max_norm is not None or module.scale_grad_by_freq:
        return None
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    ids = torch.arange(min(8, module.num_embeddings), device=module.weight.device)[None]
    try:
        found, plain = module(ids).double(), module.weight[ids].double()
    except Exception:
        return None
    size = float((plain * plain).sum())
    factor = float((found * plain).sum()) / size if found.shape == plain.shape and size else 1.0
    return factor if found.shape == plain.shape and torch.allclose(found, factor * plain, rtol=0.01) else None


def _is_scale(module: nn.Module) -> bool:
    """Whether the module is a normalisation whose weight acts on each entry separately, found by running it."""
    own = dict(module.named_parameters(recurse=False))
    if "Norm" not in type(module).__name__ or "weight" not in own or set(own) - {"weight", "bias"}:
        return False
    weight = own["weight"]
    if any(p.shape != weight.shape or p.ndim != 1 for p in own.values()):
        return False
    draw = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(shape, generator=draw).to(weight) for shape in ((2, 1, len(weight)), (len(weight),)))
    try:
        moved, by_entry = _derivative(module, direction, x), _by_scale(module, x) * direction
    except Exception:  # it needs more than x
        return False
    return torch.allclose(moved, by_entry, rtol=0.01, atol=1e-3)


def _by_scale(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """∂ y / ∂ w of a normalisation y = f(x, …) · s(w), entry by entry."""
    return _derivative(module, torch.ones_like(module.get_parameter("weight")), *args, **kwargs)


def _derivative(module: nn.Module, direction: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The derivative of the output when the weight moves in a direction."""
    weight = module.get_parameter("weight").detach()
    plain = [a.detach() if isinstance(a, Tensor) else a for a in args]
    named = {key: a.detach() if isinstance(a, Tensor) else a for key, a in kwargs.items()}

    def run(w: Tensor) -> Tensor:
        found: Tensor = functional_call(module, {"weight": w}, tuple(plain), named)
        return found

    found: Tensor = jvp(run, (weight,), (direction,))[1]
    return found.detach()
