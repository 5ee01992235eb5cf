"""Any objective as the loss of transformers' Trainer and TRL's SFTTrainer, by a subclass of them.

A subclass knows all micro-batches of an optimizer step before the first backward pass, so that every normaliser is
exact under gradient accumulation and on several processes. Written for, and tested with, TRL 1.16 and transformers 5.19
(November 2026).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import transformers
from jaxtyping import Float, Int
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional

from rlzoo.errors import UserError
from rlzoo.inputs import Input, Statistic
from rlzoo.integrations.export import Exported, Stack
from rlzoo.integrations.frozen import FrozenModels
from rlzoo.integrations.rows import WithColumns, rows_of_labels, value_of_column
from rlzoo.policy import Sequences
from rlzoo.policy.logits import log_probs_of_logits
from rlzoo.training.sums import Readout, Sums, means_of
from rlzoo.types import TokenBatch, Unit

if TYPE_CHECKING:
    Base: Any = object
else:
    Base = object

FUSED: Mapping[Input, str] = {Statistic("entropy"): "entropy"}
"""Statistics that TRL's head computes together with log-probs, by their names in its output."""


class Part(NamedTuple):
    """A micro-batch as an objective's batch."""

    batch: TokenBatch
    inputs: Mapping[str, Any]
    """What the model was called with."""
    outputs: Any
    """The model's outputs."""
    term: Float[Tensor, "B T"] | None = None
    """The full-vocabulary term, if the objective has one."""
    weight: Float[Tensor, "B T"] | None = None
    """Weights of the coefficients, such as truncated importance ratios."""
    metrics: Mapping[str, Float[Tensor, "B T"]] = {}
    """What is logged with the objective's metrics."""


class Scores(NamedTuple):
    """What a forward pass of the policy computes at the learned tokens."""

    values: dict[str, Float[Tensor, "R T"]]
    """``logp`` with its graph, and statistics."""
    term: Float[Tensor, "R T"] | None
    outputs: Any


class ObjectiveLoss(Base):  # type: ignore[misc]
    """A mixin before a transformers Trainer: its loss is that of the class's ``exported`` objective.

    A subclass defines `part`, and what `counted` counts.
    """

    compute_loss_func: Any
    data_collator: Any
    exported: ClassVar[Exported]
    _signature_columns: Any
    loss_is_scaled_for_ga: ClassVar[bool | None] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if Version(transformers.__version__) < Version("5.19.0"):  # which does not know loss_is_scaled_for_ga
            self.model_accepts_loss_kwargs = False
            self.compute_loss_func = self.compute_loss_func or "not None, so that the loss is not scaled"
        self.window: list[Any] = []
        """The micro-batches of the current optimizer step."""
        self._denominator: Tensor | None = None
        self._sums = {"train": Sums(), "eval": Sums()}
        self.check_arguments()

    def check_arguments(self) -> None:
        """Raise UserError for settings of the trainer that the loss would not honour."""
        if getattr(self.args, "label_smoothing_factor", 0):
            raise self.refused("set label_smoothing_factor to 0, because it is part of another loss")
        if getattr(self, "aux_loss_enabled", False):
            raise self.refused("set router_aux_loss_coef to 0, because the loss that balances experts is not added")
        if self.args.n_gpu > 1:
            raise self.refused("start one process per GPU, with accelerate launch")
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise self.refused("sequences are split over processes: use data or tensor parallelism")
        if self.exported.is_coupled and (self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1):
            raise self.refused(
                "it may depend on all rows of the optimizer batch, which accumulation and processes would split: set "
                "gradient_accumulation_steps to 1, on one process"
            )

    def refused(self, reason: str) -> UserError:
        """The error for this objective in this trainer."""
        return UserError(f"{self.exported.stack.name} with objective {self.exported.objective.name!r}: {reason}")

    def frozen_models(self, names: Sequence[str | None], reference: nn.Module | None = None) -> FrozenModels:
        """Models besides the policy. Raises UserError if there are any and the policy's weights will be sharded."""
        if names and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise self.refused(
                "it needs a frozen model, which cannot run beside a sharded policy: give its log-probs as a column of "
                "the data where the trainer takes columns"
            )
        return FrozenModels(self.model, names, reference)

    def part(self, model: nn.Module, inputs: Mapping[str, Any]) -> Part:
        """A micro-batch of the trainer, scored by the model."""
        raise NotImplementedError

    def counted(self, inputs: Mapping[str, Any]) -> TokenBatch:
        """The mask and the pairs of a micro-batch, from which its share of Z follows."""
        raise NotImplementedError

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of the next optimizer step."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        self.begin(samples)
        return samples, items

    def begin(self, window: Sequence[Any]) -> None:
        """Start an optimizer step on these micro-batches."""
        self.window, self._denominator = list(window), None

    def denominator(self, batch: TokenBatch) -> Tensor | float:
        """Z of the optimizer step divided by the number of processes, over which gradients are averaged.

        In evaluation, Z of the batch.
        """
        normaliser = self.exported.objective.normaliser
        if not self.model.training or not self.window:
            return torch.as_tensor(normaliser.count(batch))
        if self._denominator is None:
            own = sum(int(normaliser.count(self.counted(one))) for one in self.window)
            total = torch.tensor(own, device=self.accelerator.device)
            self._denominator = self.accelerator.reduce(total, "sum") / self.accelerator.num_processes
        return self._denominator

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss of a micro-batch."""
        if "pixel_values" in inputs:
            raise self.refused("images are not supported")
        part, sums = self.part(model, inputs), self._sums["train" if self.model.training else "eval"]
        z = self.denominator(part.batch)
        found = self.exported.loss(part.batch, z, part.weight, part.term)
        shown = replace(found.coefficients, metrics={**found.coefficients.metrics, **part.metrics})
        sums.add(self.exported.objective, found.batch, shown, found.surrogate, z)
        if not return_outputs:
            return found.value
        if not hasattr(part.outputs, "logits"):  # evaluation wants them for metrics, and TRL's head does not hold them
            with torch.no_grad():
                return found.value, model(**part.inputs)
        return found.value, part.outputs

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of the objective's metrics since the last call, as ``objective/...``."""
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        readout = Readout()
        places, self._sums[mode] = self._sums[mode].into(readout), Sums()
        if places:
            prefix = "eval_objective/" if mode == "eval" else "objective/"
            means = means_of(places, readout.read())
            logs |= {prefix + name: value for name, value in means.items() if name != "loss"}
        super().log(logs, *args, **kwargs)

    @functools.cached_property
    def is_fused(self) -> bool:
        """Whether the model has TRL's head, which computes log-probs without holding all logits, and that is enough."""
        if set(self.exported.statistics) - FUSED.keys() or self.exported.objective.has_logit_term:
            return False
        return has_trl_head(type(self))

    def score(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        labels: Int[Tensor, "B L"],
        rows: Sequences,
        models: FrozenModels | None = None,
    ) -> Scores:
        """The policy's log-probs and the objective's statistics and term at the learned tokens."""
        inputs = {**inputs, "use_cache": False}
        if self.is_fused:  # its temperature is that of the trainer
            outputs = model(**inputs, labels=labels, fused_lm_head=True)
            kept = {"logp": outputs.log_probs, **{key: getattr(outputs, key) for key in FUSED.values()}}
            return Scores(
                {key: of_fused(value, rows) for key, value in kept.items() if value is not None}, None, outputs
            )
        outputs = model(**inputs)
        reference = None
        if models is not None and (names := self.exported.reference_of_term):
            reference = models.head(names[0], inputs, rows)
        found = log_probs_of_logits(
            logits_of(outputs, labels),
            rows.before,
            rows.targets,
            temperature=1.0 if rows.temperature is None else float(rows.temperature[0]),
            statistics=self.exported.statistics,
            term=self.exported.objective.logit_term if self.exported.objective.has_logit_term else None,
            reference=reference,
        )
        values = {key: rows.spread(value) for key, value in found.items()}
        return Scores(values, values.pop("term", None), outputs)


def shown_of(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the policy's statistics that are always logged where they are there."""
    return {key: value.detach() for key, value in values.items() if key in FUSED.values()}


def of_fused(value: Float[Tensor, "B L1"], rows: Sequences) -> Float[Tensor, "R T"]:
    """A value of TRL's head, whose last position is missing, at the learned tokens of the rows."""
    width = rows.ids.shape[1]
    whole = functional.pad(value[:, -(width - 1) :], (0, 1))  # virtual tokens of a prompt come first
    return rows.spread(whole.flatten().index_select(0, rows.before))


def logits_of(outputs: Any, labels: Int[Tensor, "B L"]) -> Float[Tensor, "M V"]:
    """The logits at the positions of the labels, flattened."""
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    found: Tensor = logits[:, -labels.shape[1] :].flatten(0, 1)
    return found


def trl_names(trainer: type) -> set[str]:
    """The names of the classes of TRL that a trainer derives from."""
    return {base.__name__ for base in trainer.__mro__ if base.__module__.partition(".")[0] == "trl"}


def has_trl_head(trainer: type) -> bool:
    """Whether a trainer is one of TRL's that puts TRL's head into its model."""
    if not trl_names(trainer):
        return False
    from trl.trainer import utils

    return hasattr(utils, "add_fused_lm_head")


LABELLED = Stack(
    "transformers' Trainer", frozenset({Unit.ROW}), has_columns=True, has_logits=True, has_models=True,
    hint="use another trainer, or rlzoo.train",
)  # fmt: skip


class LabelledLoss(ObjectiveLoss):
    """The loss of a trainer whose batches have ``labels``, packed or padded: transformers' Trainer and SFTTrainer.

    ``ref_model`` is a frozen copy of the initial policy for objectives that need one; by default the model is copied
    or, with an adapter, used without it. Columns of the data that the objective requires are passed on to it.
    """

    def __init__(self, *args: Any, ref_model: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        there = getattr(self.train_dataset, "column_names", None)  # None: a data set that does not say
        columns, requires = self.exported.columns, self.exported.objective.requires
        computed = {one.column for one in requires if one.models()}
        lacking = [name for name in columns if there is not None and name not in {*there, *computed}]
        if lacking:
            raise self.refused(
                f"it needs a column {lacking[0]!r}, and the prepared data has {', '.join(there or ())}: add it, with "
                "packing=False, or choose another objective"
            )
        named = [one for one in requires if one.gives_logits or one.column not in (there or ())]
        self.models = self.frozen_models([name for one in named for name in one.models()], ref_model)
        self.data_collator = WithColumns(self.data_collator, columns)

    def _set_signature_columns_if_needed(self) -> None:
        """transformers removes columns that are not listed here."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "labels", *self.exported.columns]))

    def counted(self, inputs: Mapping[str, Any]) -> TokenBatch:
        return TokenBatch(None, rows_of_labels(inputs["labels"], inputs.get("position_ids")).mask)

    def part(self, model: nn.Module, inputs: Mapping[str, Any]) -> Part:
        if "labels" not in inputs:
            raise self.refused(
                "the batch has no labels, which say what is learned from: give a collator that adds them"
            )
        labels = inputs["labels"]
        rows = rows_of_labels(labels, inputs.get("position_ids"))
        own = {key: value for key, value in inputs.items() if key not in ("labels", *self.exported.columns)}
        scores = self.score(model, own, labels, rows, self.models)
        columns = {
            name: value_of_column(inputs[name], labels, rows, name) for name in self.exported.columns if name in inputs
        }
        reward = columns.pop("reward", None)
        batch = self.exported.batch(
            scores.values["logp"],
            rows.mask,
            {**columns, **scores.values},
            lambda name: self.models.log_probs(name, own, rows),
            reward=reward,
        )
        return Part(batch, own, scores.outputs, scores.term, metrics=shown_of(scores.values))
