"""Batches for testing objectives: random rows of every kind, with garbage at masked positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlzoo.inputs import Input, Snapshot, Stage
from rlzoo.objective import Objective, is_composite
from rlzoo.types import TokenBatch, over

GROUPS = (4, 4, 3, 2, 1)
FLAT_GROUP = slice(4, 8)
"""The rows of a group of equal rewards."""
SINGLE_TOKEN, EMPTY = (1, 6, 9), (3, 7)
ROWS, LENGTH = sum(GROUPS), 11
PADDING = (math.nan, math.inf, -math.inf, 1e9, 0.0)


def random_batch(objective: Objective, seed: int = 0, padding: Sequence[float] = PADDING) -> TokenBatch:
    """A batch of 14 rows with all inputs of an objective, in float64, and ``padding`` values at masked positions.

    It includes a group of equal rewards, a group of one, and rows of one token or none. Pairs are consecutive rows.
    """
    draw = torch.Generator().manual_seed(seed)
    length = torch.randint(2, LENGTH + 1, (ROWS,), generator=draw)
    length[list(SINGLE_TOKEN)], length[list(EMPTY)] = 1, 0
    mask = torch.arange(LENGTH) < length[:, None]
    rubbish = torch.tensor(padding, dtype=torch.float64).repeat(ROWS * LENGTH)[: ROWS * LENGTH].view(ROWS, LENGTH)

    def padded(values: Tensor) -> Tensor:
        if values.ndim < 2 or not values.is_floating_point():
            return values
        return torch.where(over(mask, values), values, over(rubbish, values))

    logp = -torch.randn(ROWS, LENGTH, dtype=torch.float64, generator=draw).abs() - 0.01
    reward = torch.rand(ROWS, dtype=torch.float64, generator=draw).round(decimals=1)
    reward[FLAT_GROUP] = 1.0
    better = torch.arange(0, ROWS, 2) + torch.randint(0, 2, (ROWS // 2,), generator=draw)
    inputs: dict[str, Tensor] = {}
    for one in sorted(inputs_of(objective), key=lambda one: one.is_statistic):
        if not one.gives_logits:  # statistics are those of the policy at the start of the batch, where that is there
            inputs[one.key] = one.example(inputs.get("snapshot_logp", logp), draw)
    inputs = {key: padded(value) for key, value in inputs.items()}
    for key in keys_with_graph(objective):
        inputs[key].requires_grad_()
    return TokenBatch(
        padded(logp).requires_grad_(),
        mask,
        reward=reward,
        group=torch.arange(len(GROUPS)).repeat_interleave(torch.tensor(GROUPS)),
        partner=torch.arange(ROWS).view(-1, 2).flip(1).flatten(),
        chosen=torch.zeros(ROWS, dtype=torch.bool).index_fill(0, better, True),
        inputs=inputs,
    )


def inputs_of(objective: Objective) -> list[Input]:
    """The distinct inputs of an objective and its components."""
    return list(dict.fromkeys(one for component in objective.components for one in component.objective.requires))


def keys_with_graph(objective: Objective) -> list[str]:
    """The keys of the inputs that carry a graph: outputs of modules."""
    forward = [one for one in inputs_of(objective) if one.stage is Stage.FORWARD]
    return [one.key for one in forward if not one.is_statistic and not one.gives_logits]


def prepared(objective: Objective, batch: TokenBatch) -> TokenBatch:
    """The batch as the trainer prepares it: without log-probs, unless the objective has them at that point.

    The components of a composite are prepared by `surrogate` instead.
    """
    if is_composite(type(objective)):
        return batch
    known = batch.detach()
    if not objective.is_coupled and not any(isinstance(one, Snapshot) for one in objective.requires):
        later = [one.key for one in objective.requires if one.stage is Stage.FORWARD]
        known = known.replace(logp=None, **dict.fromkeys(later))
    default = torch.get_default_dtype()
    torch.set_default_dtype(batch.dtype)  # that of log-probs, which are not there yet
    try:
        with torch.no_grad():
            fixed = objective.prepare(known)
    finally:
        torch.set_default_dtype(default)
    return fixed.replace(logp=batch.logp, inputs={**fixed.inputs, **batch.inputs})


def leaves(batch: TokenBatch) -> list[Tensor]:
    """The tensors with respect to which a loss is differentiated: log-probs, and inputs with a graph."""
    return [batch.logp, *(value for value in batch.inputs.values() if value.requires_grad)]


def gradients(loss: Tensor, batch: TokenBatch) -> Float[Tensor, " G"]:
    """The gradient with respect to all `leaves` of a batch, as one vector; 0 for leaves that the loss does not use."""
    own = leaves(batch)
    found = torch.autograd.grad(loss, own, allow_unused=True, retain_graph=True)
    pairs = zip(own, found, strict=True)
    return torch.cat([(torch.zeros_like(leaf) if g is None else g).flatten() for leaf, g in pairs])


def gap(ours: Tensor, theirs: Tensor) -> float:
    """The distance between two tensors, relative to the norm of the second; NaN if either has one."""
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).norm()) / max(float(theirs.norm()), 1e-30)


def wider(batch: TokenBatch, extra: int) -> TokenBatch:
    """The same batch with ``extra`` more masked positions, full of NaN, at its end."""

    def widened(value: Tensor) -> Tensor:
        if value.ndim < 2:
            return value
        filler = math.nan if value.is_floating_point() else 0
        return torch.cat([value, value.new_full((len(value), extra, *value.shape[2:]), filler)], dim=1)

    return _mapped(batch, widened)


def with_gaps(batch: TokenBatch, extra: int, seed: int) -> TokenBatch:
    """The same batch with ``extra`` more masked positions per row, full of NaN and at random places between its own."""
    draw = torch.Generator().manual_seed(seed)
    rows, length = batch.mask.shape
    order = torch.rand(rows, length + extra, generator=draw).argsort(1)
    places = order[:, :length].sort(1).values

    def spread(value: Tensor) -> Tensor:
        if value.ndim < 2:
            return value
        filler = math.nan if value.is_floating_point() else 0
        whole = value.new_full((rows, length + extra, *value.shape[2:]), filler)
        return whole.index_put((torch.arange(rows)[:, None], places), value)

    return _mapped(batch, spread)


def cast(batch: TokenBatch, dtype: torch.dtype) -> TokenBatch:
    """The batch with all its floating-point tensors rounded to ``dtype``, as fresh leaves."""

    def rounded(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    return _mapped(batch, rounded)


def _mapped(batch: TokenBatch, function: Callable[[Tensor], Tensor]) -> TokenBatch:
    fields = {name: batch.get(name) for name in ("logp", "mask", "advantage", "reward")}
    changed = {name: function(value) for name, value in {**fields, **batch.inputs}.items() if value is not None}
    return batch.replace(**changed)


def permutation(size: int, seed: int = 0) -> Int[Tensor, " N"]:
    """A fixed random permutation."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))
