"""The training loop, which is independent of the objective."""

from rlzoo.training.costs import Costs
from rlzoo.training.record import TrainingRecord
from rlzoo.training.run import (
    behaviour_event,
    check_buffer,
    lacking,
    stored_inputs,
    train,
    with_behaviour,
    with_inputs,
    with_reference,
)
from rlzoo.training.trainer import Trainer

__all__ = [
    "Costs",
    "Trainer",
    "TrainingRecord",
    "behaviour_event",
    "check_buffer",
    "lacking",
    "stored_inputs",
    "train",
    "with_behaviour",
    "with_inputs",
    "with_reference",
]
