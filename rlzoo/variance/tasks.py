"""What is measured: an objective's gradient as weights on ∇ log π, and which objectives share a backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from rlzoo.policy import Policy
from rlzoo.policy.head import LogitTerm


@dataclass(frozen=True)
class Task:
    """The gradient of one objective: the sum over a unit's positions of weight · ∇ log π, and further terms.

    R rows are analysed, of at most T completion tokens.
    """

    units: Sequence[tuple[int, ...]]
    """The rows of each unit. No row belongs to two units."""
    weight: Float[Tensor, "R T"]
    """∂ loss / ∂ log π of each completion token."""
    scale: float = 1.0
    """The factor on every unit's gradient that makes their mean the gradient of the batch."""
    input_weights: Mapping[str, Float[Tensor, "R T ..."]] = field(default_factory=dict)
    """∂ loss / ∂ x, by key, of each input x that a separate module computes from the policy's hidden states."""
    term: LogitTerm | None = None
    """A loss per position over the full vocabulary."""
    reference: Policy | None = None
    """The policy that computes the term's reference logits."""
    term_weight: Float[Tensor, "R T"] | None = None
    """The weight of the term at each position."""


@dataclass
class Pass:
    """Tasks that share a backward pass: in every row, the weights of each are those of the pass times one number."""

    weight: Float[Tensor, "R T"]
    scale: dict[str, Float[Tensor, " R"]]
    """Task → the number for each row; 0 where the task has no weight."""
    alone: bool = False
    """Whether it has further terms besides weights on ∇ log π, which cannot be shared."""

    def join(self, name: str, weight: Float[Tensor, "R T"]) -> bool:
        """Add a task if its weights are proportional to those of the pass in every row that others use already."""
        used, wanted = (w.abs().amax(1) > 0 for w in (self.weight, weight))
        scale = (weight * self.weight).sum(1) / self.weight.square().sum(1).clamp(min=torch.finfo(weight.dtype).tiny)
        rest = (weight - scale[:, None] * self.weight).abs().amax(1)
        near = rest <= 16 * torch.finfo(weight.dtype).eps * weight.abs().amax(1)
        if self.alone or not bool(near[used & wanted].all()):
            return False
        free = wanted & ~used
        self.weight = torch.where(free[:, None], weight, self.weight)
        self.scale[name] = torch.where(free, 1, torch.where(wanted, scale, 0))
        return True


def shared_passes(tasks: Mapping[str, Task]) -> list[Pass]:
    """The backward passes that are needed: a coefficient that is constant over a row only scales the row's gradient."""
    passes: list[Pass] = []
    for name, task in tasks.items():
        alone = task.term is not None or bool(task.input_weights)
        if alone or not any(known.join(name, task.weight) for known in passes):
            used = task.weight.abs().amax(1) > 0
            passes.append(Pass(task.weight, {name: (used | alone).to(task.weight.dtype)}, alone))
    return passes


@dataclass
class UnitGradients:
    """What is kept of an objective's gradients: U units, L layers, D dimensions of a random projection."""

    squared_norm: Float[Tensor, "U L"]
    """‖g_u‖² by layer, exact, in float64."""
    sketch: Float[Tensor, "U L D"]
    """Projections whose inner products are those of the gradients in expectation."""
    mean: dict[str, Tensor] = field(repr=False)
    """The mean gradient, by parameter."""

    def scaled(self, factor: float) -> UnitGradients:
        """All gradients times a factor; the means are changed in place, as there may be no memory for a copy."""
        means = {name: mean.mul_(factor) for name, mean in self.mean.items()}
        return UnitGradients(self.squared_norm * factor**2, self.sketch * factor, means)


def connected(units_by_task: Iterable[Iterable[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """Rows grouped so that rows that share a unit, directly or through other units, are in one group."""
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while parent.setdefault(row, row) != row:
            parent[row] = row = parent[parent[row]]
        return row

    for units in units_by_task:
        for first, *others in units:
            root(first)
            for other in others:
                parent[root(other)] = root(first)
    found: dict[int, list[int]] = {}
    for row in sorted(parent):
        found.setdefault(root(row), []).append(row)
    return [tuple(rows) for rows in found.values()]
