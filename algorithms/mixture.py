"""Mixture: the weighted sum of the gradients of several objectives in one optimizer step, each on rows of its own.

Loss: Σ_k w_k L_k, where L_k is the loss of component k over its own rows, divided by its own normaliser. The
components share the batch of a step evenly, up to whole units, so that a mixture sees about as many rows as any other
objective. In an experiment:

    sft+grpo: {objective: mixture, options: {weights: {sft: 0.1, grpo: 0.9}, options: {grpo: {kl_coefficient: 0}}}}

With ``mode: online``, components that learn from samples get fresh ones, and the others read the buffer.

This combines SFT and RL with fixed weights: CHORD's loss (1-μ) L_GRPO + μ L_SFT (arXiv 2508.11408) for a constant μ.
Weights do not change, and no component sees the rows of another. It therefore covers neither CHORD's schedule of μ and
weight p(1-p) per token, nor LUFFY (arXiv 2504.14945), which adds demonstrations to the group and shapes their ratios,
nor HPT (arXiv 2509.04419), which chooses between SFT and RL by how well the policy does on a prompt.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from rlzoo.errors import UserError, unknown
from rlzoo.inputs import Input
from rlzoo.objective import Component, Objective, get_objective, register


@register
@dataclass(frozen=True)
class Mixture(Objective):
    """Mixture of objectives: ∇L = Σ_k w_k ∇L_k, each component on its own view of the buffer."""

    name: ClassVar[str] = "mixture"
    source: ClassVar[str] = "arXiv 2508.11408"

    weights: Mapping[str, float]
    """Objective → weight."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Objective → its options."""

    def __post_init__(self) -> None:
        if not self.weights:
            raise UserError("a mixture needs weights, such as {sft: 0.1, grpo: 0.9}")
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"a mixture needs weights of 0 or more: {name!r} has {weight}")
        for name in self.options:
            if name not in self.weights:
                raise unknown("component with options", name, self.weights)
        _ = self.components  # so that an unknown name is an error right away

    @cached_property
    def components(self) -> tuple[Component, ...]:
        return tuple(
            Component(component.objective, weight * component.weight, f"{name}/{component.label}".rstrip("/"))
            for name, weight in self.weights.items()
            for component in get_objective(name, **self.options.get(name, {})).components
        )

    @property
    def requires(self) -> tuple[Input, ...]:
        return tuple(dict.fromkeys(one for component in self.components for one in component.objective.requires))
