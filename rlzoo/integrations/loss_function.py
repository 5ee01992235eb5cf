"""Any objective as ``compute_loss_func`` of transformers' Trainer and of TRL's SFTTrainer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlzoo.errors import UserError
from rlzoo.integrations.export import Exported, Stack
from rlzoo.integrations.frozen import FrozenModels
from rlzoo.integrations.rows import rows_of_labels, value_of_column
from rlzoo.integrations.trainers import logits_of
from rlzoo.objective import Objective
from rlzoo.policy.logits import log_probs_of_logits
from rlzoo.types import Normaliser, TokenBatch, Unit

STACK = Stack(
    "compute_loss_func", frozenset({Unit.ROW}), has_columns=True, has_logits=True, has_models=True, splits=True,
    hint="use with_objective(Trainer, ...), or rlzoo.train",
)  # fmt: skip


def compute_loss_func(
    objective: str | Objective,
    model: nn.Module | None = None,
    *,
    reference: nn.Module | None = None,
    sequences_per_step: int | None = None,
    **options: Any,
) -> LossFunction:
    """An objective as ``compute_loss_func``: outputs, labels and ``num_items_in_batch`` → the loss, a scalar.

    -Σ_t c_t log π(y_t) / Z, with Z the learned tokens of the optimizer step on all processes, as transformers counts
    them. ``options`` are the objective's. The objective can be one of single rows, as for demonstrations.

    ``model``, the one that the trainer gets, is needed by objectives that see more of a batch than logits and labels:
    weights per sequence where rows are packed, log-probs of a ``reference`` (by default a copy of the model, made
    here), or columns, which the data collator passes on. ``sequences_per_step`` is needed by objectives that average
    over sequences: batch size per device × accumulation steps × processes.

    Raises UserError for an objective that cannot be served. TRL has announced the end of ``compute_loss_func`` in its
    SFTTrainer for version 2.0, and runs a second forward pass beside it: prefer `with_objective` there.
    """
    return LossFunction(Exported(objective, STACK, options), model, reference, sequences_per_step)


class LossFunction:
    """The result of `compute_loss_func`."""

    def __init__(
        self,
        exported: Exported,
        model: nn.Module | None = None,
        reference: nn.Module | None = None,
        sequences_per_step: int | None = None,
    ) -> None:
        self.exported, self.sequences_per_step = exported, sequences_per_step
        own, name = exported.objective, exported.objective.name
        if own.normaliser is not Normaliser.PER_TOKEN and sequences_per_step is None:
            raise UserError(
                f"compute_loss_func: objective {name!r} averages over sequences, which transformers does not count: "
                "give sequences_per_step, the batch size per device × accumulation steps × processes"
            )
        models = [n for one in own.requires for n in one.models()]
        if model is None and (models or exported.columns or not is_local(own)):
            raise UserError(
                f"compute_loss_func: objective {name!r} sees more of a batch than logits and labels (sequences, "
                f"columns or another model): load the model first, and give compute_loss_func({name!r}, model)"
            )
        self._inputs: dict[str, Any] = {}
        self._columns: dict[str, Any] = {}
        self.models: FrozenModels | None = None
        if model is not None:
            self.models = FrozenModels(model, models, reference)  # before there is a hook that it would copy
            model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Keep what the model is called with, and take out columns that only the loss knows."""
        columns = {name: inputs[name] for name in self.exported.columns if name in inputs}
        own = {key: value for key, value in inputs.items() if key not in columns}
        if torch.is_grad_enabled() or not module.training:
            self._inputs = {**({"input_ids": args[0]} if args else {}), **own}
            self._columns = columns
        return args, own

    def __call__(
        self, outputs: Any, labels: Int[Tensor, "B L"] | None, num_items_in_batch: Tensor | int | None = None
    ) -> Float[Tensor, ""]:
        """The loss of a micro-batch. Raises UserError without labels."""
        if labels is None:
            raise UserError("compute_loss_func: the batch has no labels: give the trainer a collator that adds them")
        logits = logits_of(outputs, labels)
        labels = labels.to(logits.device)
        inputs, models, own = self._inputs, self.models, self.exported.objective
        rows = rows_of_labels(labels, inputs.get("position_ids"))
        reference = None
        if models is not None and (names := self.exported.reference_of_term):
            reference = models.head(names[0], inputs, rows)
        found = log_probs_of_logits(
            logits,
            rows.before,
            rows.targets,
            statistics=self.exported.statistics,
            term=own.logit_term if own.has_logit_term else None,
            reference=reference,
        )
        values = {key: rows.spread(value) for key, value in found.items()}
        term = values.pop("term", None)
        columns = {name: value_of_column(value, labels, rows, name) for name, value in self._columns.items()}
        reward = columns.pop("reward", None)
        of_model = None if models is None else (lambda name: models.log_probs(name, inputs, rows))
        batch = self.exported.batch(values["logp"], rows.mask, {**columns, **values}, of_model, reward=reward)
        return self.exported.loss(batch, self._denominator(batch, num_items_in_batch), term=term).value

    def _denominator(self, batch: TokenBatch, items: Tensor | int | None) -> Tensor | float:
        """Z of the optimizer step, or of the batch where transformers gives no number.

        transformers multiplies the loss by the number of processes where it gives one, in evaluation as well.
        """
        normaliser = self.exported.objective.normaliser
        if items is not None and normaliser is Normaliser.PER_TOKEN:
            return torch.as_tensor(items).to(batch.mask.device)
        if items is not None and torch.is_grad_enabled():
            return float(self.sequences_per_step or 1)
        return torch.as_tensor(normaliser.count(batch))


def is_local(objective: Objective) -> bool:
    """Whether the coefficient of a token depends on no other token, so that it does not matter where sequences begin.

    Found by evaluating the objective on random log-probs of two rows, and on the same log-probs as one row.
    """
    draw = torch.Generator().manual_seed(0)
    logp = -torch.rand(2, 6, dtype=torch.float64, generator=draw) * 3 - 0.01
    inputs: dict[str, Tensor] = {}
    for one in objective.requires:
        if not one.gives_logits:
            inputs[one.key] = one.example(logp, draw).to(torch.float64)

    def coefficients(shape: tuple[int, int]) -> Tensor:
        own = {key: value.reshape(shape) for key, value in inputs.items()}
        batch = TokenBatch(logp.reshape(shape), torch.ones(shape, dtype=torch.bool), inputs=own)
        return objective.coefficients(objective.prepare(batch)).values.reshape(-1)

    try:
        return torch.equal(coefficients((2, 6)), coefficients((1, 12)))
    except Exception:  # it also needs what single rows do not have
        return False
