"""The training loop. It never asks which objective runs."""

from rlzoo.training.costs import Costs
from rlzoo.training.record import TrainingRecord
from rlzoo.training.run import (
    check_buffer,
    lacking,
    scored_event,
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
    "check_buffer",
    "lacking",
    "scored_event",
    "stored_inputs",
    "train",
    "with_behaviour",
    "with_inputs",
    "with_reference",
]
