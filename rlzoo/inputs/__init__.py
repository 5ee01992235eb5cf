"""What an objective can ask for in `Objective.requires`: one small class each. Built-in inputs have no privileges."""

from rlzoo.inputs.base import Context, Input, Stage
from rlzoo.inputs.of_policy import Critic, Snapshot, Statistic
from rlzoo.inputs.references import Mismatched, MovingReference, Privileged, Reference, ReferenceLogits
from rlzoo.inputs.stored import Behaviour, Column, Truncated

__all__ = [
    "Behaviour",
    "Column",
    "Context",
    "Critic",
    "Input",
    "Mismatched",
    "MovingReference",
    "Privileged",
    "Reference",
    "ReferenceLogits",
    "Snapshot",
    "Stage",
    "Statistic",
    "Truncated",
]
