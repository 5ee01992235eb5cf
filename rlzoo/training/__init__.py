"""The training loop. It never asks which objective runs."""

from rlzoo.training.costs import Costs
from rlzoo.training.trainer import Trainer, TrainingRecord, train, with_reference

__all__ = ["Costs", "Trainer", "TrainingRecord", "train", "with_reference"]
