"""A trainer class whose loss is an objective's."""

from __future__ import annotations

from typing import Any

from rlzoo.errors import UserError
from rlzoo.integrations import trl
from rlzoo.integrations.export import Exported, Stack
from rlzoo.integrations.trainers import LABELLED, LabelledLoss, ObjectiveLoss, trl_names
from rlzoo.objective import Objective

OF_TRL: dict[str, tuple[type[ObjectiveLoss], Stack]] = {
    "SFTTrainer": (LabelledLoss, LABELLED),
    "DPOTrainer": (trl.PairsLoss, trl.PAIRS),
    "KTOTrainer": (trl.UnpairedLoss, trl.UNPAIRED),
    "GRPOTrainer": (trl.GroupsLoss, trl.GROUPS),
}
"""TRL's trainers, by the name of their class: the loss to mix in, and what it can give to an objective."""


def with_objective(trainer: type, objective: str | Objective, **options: Any) -> Any:
    """A subclass of a trainer class whose loss is that of an objective, to be used in place of the class.

        trainer = with_objective(DPOTrainer, "simpo", beta=2.5)(model=..., args=..., train_dataset=...)

    ``trainer`` is transformers' Trainer, TRL's SFTTrainer, DPOTrainer, KTOTrainer or GRPOTrainer, or a subclass;
    ``objective`` a name as for `get_objective`, with its ``options``, or an objective. The gradient of an optimizer
    step is that of `rlzoo.train` on the same rows, however they are split into micro-batches and processes.

    Raises UserError for another class, and for an objective that the trainer cannot serve.
    """
    mixin, stack = _kind(trainer)
    exported = Exported(objective, stack, options)
    name = f"{exported.objective.name.title().replace('-', '')}{trainer.__name__}"
    return type(name, (mixin, trainer), {"exported": exported, "__module__": __name__, "__doc__": trainer.__doc__})


def _kind(trainer: type) -> tuple[type[ObjectiveLoss], Stack]:
    from transformers import Trainer

    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise UserError(f"with_objective: {trainer!r} is not a trainer class of transformers or TRL: give the class")
    names = trl_names(trainer)
    for name, (mixin, stack) in OF_TRL.items():
        if name in names:
            return mixin, Stack(**{**vars(stack), "name": f"TRL's {name}"})
    if names:
        raise UserError(
            f"with_objective: {trainer.__name__} has no loss to replace: use {', '.join(OF_TRL)} or Trainer"
        )
    return LabelledLoss, LABELLED
