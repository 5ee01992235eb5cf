"""Mixture: the weighted sum of the gradients of several objectives in one optimizer step, each on rows of its own.

Loss: Σ_k w_k L_k, where L_k is the loss of component k over its own rows, divided by its own normaliser. The
components share the batch of a step evenly, up to whole units, so that a mixture sees about as many rows as any other
objective. In an experiment:

    sft+grpo: {objective: mixture, options: {weights: {sft: 0.1, grpo: 0.9}, options: {grpo: {kl_coefficient: 0}}}}

With ``mode: online``, components that learn from samples get fresh ones, and the others read the buffer.

A weight may change in training: it is then given by the fraction of training that is done, as in {0: 0.9, 0.5: 0.05},
and ``shape`` says what is between two points: a ``linear`` or ``cosine`` passage, or ``steps``. Before the first point
and after the last the weight is theirs. Each step records it, as ``sft/mixture_weight``. The learning rate's schedule
comes on top.

With SFT and `grpo` this is CHORD's loss, μ L_SFT + (1-μ) L_GRPO (arXiv 2508.11408). CHORD-μ lets μ fall from 0.9 to
0.05 in ``cosine`` shape (as in modelscope/Trinity-RFT, which counts in steps and can warm μ up linearly); CHORD-φ, with
`chord` in place of `sft`, keeps it small, at about 0.1. No component sees the rows of another, so `luffy`, which adds
demonstrations to the group, is another objective; HPT (arXiv 2509.04419), which chooses between SFT and RL by how well
the policy does on a prompt, is not covered.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

from rlzoo.config.schedules import Schedule
from rlzoo.errors import UserError, unknown
from rlzoo.inputs import Input
from rlzoo.objective import Component, Objective, get_objective, register


@register
@dataclass(frozen=True)
class Mixture(Objective):
    """Mixture of objectives: ∇L = Σ_k w_k ∇L_k, each component on its own view of the buffer."""

    name: ClassVar[str] = "mixture"
    source: ClassVar[str] = "arXiv 2508.11408"

    weights: Mapping[str, float | Mapping[float, float]]
    """Objective → weight, or its values by fraction of training."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Objective → its options."""
    shape: Literal["linear", "cosine", "steps"] = "linear"
    """What is between the values of a weight."""

    def __post_init__(self) -> None:
        if not self.weights:
            raise UserError("a mixture needs weights, such as {sft: 0.1, grpo: 0.9}")
        for name, given in self.weights.items():
            for weight in given.values() if isinstance(given, Mapping) else [given]:
                if not (math.isfinite(weight) and weight >= 0):
                    raise UserError(f"a mixture needs weights of 0 or more: {name!r} has {weight}")
        for name in self.options:
            if name not in self.weights:
                raise unknown("component with options", name, self.weights)
        _ = self.components  # so that an unknown name is an error right away
        if not any(any(w.values()) if isinstance(w, Mapping) else w for w in self.weights.values()):
            raise UserError(f"a mixture needs a weight above 0: {', '.join(self.weights)} have none")

    @cached_property
    def components(self) -> tuple[Component, ...]:
        found = []
        for name, given in self.weights.items():
            constant, schedules = (
                (1.0, (Schedule.of(given, self.shape),)) if isinstance(given, Mapping) else (given, ())
            )
            for own in get_objective(name, **self.options.get(name, {})).components:
                label = f"{name}/{own.label}".rstrip("/")
                found.append(Component(own.objective, constant * own.weight, label, (*schedules, *own.schedules)))
        return tuple(found)

    @property
    def requires(self) -> tuple[Input, ...]:
        return tuple(dict.fromkeys(one for component in self.components for one in component.objective.requires))
