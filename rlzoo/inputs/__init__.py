"""Inputs that an objective can request in `Objective.requires`; built-in inputs use the same interface as your own."""

from rlzoo.inputs.base import Context, Input, Stage
from rlzoo.inputs.of_policy import Critic, Snapshot, Statistic, TrainingProgress
from rlzoo.inputs.references import Mismatched, MovingReference, Privileged, Reference, ReferenceLogits
from rlzoo.inputs.stored import Behaviour, Column, FromDemonstration, Outcome, Truncated

__all__ = [
    "Behaviour",
    "Column",
    "Context",
    "Critic",
    "FromDemonstration",
    "Input",
    "Mismatched",
    "MovingReference",
    "Outcome",
    "Privileged",
    "Reference",
    "ReferenceLogits",
    "Snapshot",
    "Stage",
    "Statistic",
    "TrainingProgress",
    "Truncated",
]
