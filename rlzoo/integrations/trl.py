"""Any objective as the loss of TRL's DPO, KTO and GRPO trainers. Written for and tested with TRL 1.16 (November 2026).

What TRL does beside its loss stays: data preparation, sampling, rewards, the reference model, and its log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlzoo.errors import UserError
from rlzoo.inputs.references import mismatched
from rlzoo.integrations.export import Stack
from rlzoo.integrations.frozen import without_adapter
from rlzoo.integrations.rows import IGNORED, rows_of_labels
from rlzoo.integrations.trainers import ObjectiveLoss, Part, Scores, of_fused, shown_of
from rlzoo.policy import Sequences
from rlzoo.types import Normaliser, TokenBatch, Trajectory, Unit

PAIRS = Stack(
    "TRL's DPOTrainer", frozenset({Unit.PAIR}), has_logits=True, has_models=True,
    hint="use another trainer, or rlzoo.train",
)  # fmt: skip
UNPAIRED = Stack(
    "TRL's KTOTrainer", frozenset({Unit.ROW}), frozenset({"mismatched"}), has_logits=True, has_models=True,
    hint="use another trainer, or rlzoo.train",
)  # fmt: skip
GROUPS = Stack(
    "TRL's GRPOTrainer", frozenset({Unit.GROUP}), frozenset({"behaviour_logp", "reference_logp"}), has_logits=True,
    has_models=True, hint="use another trainer, or rlzoo.train",
)  # fmt: skip
NOT_OF_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", "label", "ref_logps", "ref_KL_logps")
"""Entries of a batch of preferences that the model does not take; others begin with KL_."""
OWN = "rlzoo_"
"""The prefix of what a group objective has prepared, among the entries of TRL's batch."""


class PreferenceLoss(ObjectiveLoss):
    """The loss of TRL's trainers on preferences, whose batches have ``input_ids`` and ``completion_mask``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        requires = self.exported.objective.requires
        if None not in [name for one in requires for name in one.models()] and not self.args.sync_ref_model:
            self.ref_model = None  # TRL has loaded one, which takes as much memory as the model
        others = [name for one in requires for name in one.models() if name is not None or one.gives_logits]
        self.models = self.frozen_models(others, self.ref_model)

    def check_arguments(self) -> None:
        super().check_arguments()
        names = [name for one in self.exported.objective.requires for name in one.models()]
        if None in names and self.args.precompute_ref_log_probs:
            raise self.refused(
                "it needs the reference's log-probs per token, and TRL stores their sums: set "
                "precompute_ref_log_probs=False"
            )

    def labels(self, inputs: Mapping[str, Any], prefix: str = "") -> Int[Tensor, "B L"]:
        """The completions' tokens, as labels."""
        ids: Tensor = inputs[f"{prefix}input_ids"]
        return ids.masked_fill(inputs[f"{prefix}completion_mask"] == 0, IGNORED)

    def counted(self, inputs: Mapping[str, Any]) -> TokenBatch:
        mask = rows_of_labels(self.labels(inputs), keep_empty=True).mask
        return TokenBatch(None, mask).replace(**self.fields(inputs, len(mask)))

    def fields(self, inputs: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
        """The fields of a `TokenBatch` that say how the rows were judged."""
        raise NotImplementedError

    def given(self, model: nn.Module, inputs: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
        """Inputs of the objective that TRL has prepared, by key."""
        return {}

    def part(self, model: nn.Module, inputs: Mapping[str, Any]) -> Part:
        labels = self.labels(inputs)
        rows = rows_of_labels(labels, keep_empty=True)
        own = {key: value for key, value in inputs.items() if key not in NOT_OF_MODEL and not key.startswith("KL_")}
        scores = self.score(model, own, labels, rows, self.models)
        batch = self.exported.batch(
            scores.values["logp"],
            rows.mask,
            {**scores.values, **self.given(model, inputs, len(labels))},
            lambda name: self.frozen_log_probs(name, own, labels, rows),
            **self.fields(inputs, len(labels)),
        )
        return Part(batch, own, scores.outputs, scores.term, metrics=shown_of(scores.values))

    @torch.no_grad()
    def frozen_log_probs(
        self, name: str | None, inputs: Mapping[str, Any], labels: Int[Tensor, "B L"], rows: Sequences
    ) -> Float[Tensor, "R T"]:
        """A frozen model's log-probs; those of TRL's reference by TRL's head, which knows of sharding."""
        if name is not None:
            return self.models.log_probs(name, inputs, rows)
        model = self.model if self.ref_model is None else self.ref_model
        with without_adapter(self.accelerator.unwrap_model(self.model)) if self.ref_model is None else nullcontext():
            found = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
        return of_fused(found.log_probs, rows)


class PairsLoss(PreferenceLoss):
    """The loss of TRL's DPOTrainer. The first half of a batch is chosen, the second half rejected."""

    def fields(self, inputs: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
        place = torch.arange(rows, device=inputs["input_ids"].device)
        return {"partner": (place + rows // 2) % rows, "chosen": place < rows // 2}


class UnpairedLoss(PreferenceLoss):
    """The loss of TRL's KTOTrainer; a completion's reward is its ``label``, 0 or 1.

    Completions are paired with other rows' prompts over the whole optimizer step, as by `rlzoo.inputs.Mismatched`, and
    not over a micro-batch as by TRL.
    """

    _mismatched: Tensor | None = None

    def begin(self, window: Sequence[Any]) -> None:
        super().begin(window)
        self._mismatched = None

    def fields(self, inputs: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
        return {"reward": inputs["label"].to(torch.float64)}

    def given(self, model: nn.Module, inputs: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
        if not any(one.key == "mismatched" for one in self.exported.objective.requires):
            return {}
        if not self.model.training:
            return {"mismatched": self._log_ratio(model, [inputs]).expand(rows)}
        if self._mismatched is None:
            self._mismatched = self._log_ratio(model, self.window or [inputs])
        return {"mismatched": self._mismatched.expand(rows)}

    @torch.no_grad()
    def _log_ratio(self, model: nn.Module, window: Sequence[Mapping[str, Any]]) -> Float[Tensor, ""]:
        """The mean of Σ_t log π_θ/π_ref over mismatched completions of all processes, each of which scores a share.

        All processes run as many forward passes, because those of a sharded model are joint work.
        """
        own_rows, own_size = [row for each in window for row in rows_of(each)], len(window[0]["input_ids"])
        of_all = gather_object([(own_rows, own_size)])
        others, size = mismatched([row for rows, _ in of_all for row in rows]), max(size for _, size in of_all)
        share = others[self.accelerator.process_index :: self.accelerator.num_processes]
        total = torch.zeros((), device=self.accelerator.device)
        for start in range(0, -(-len(others) // self.accelerator.num_processes), size):
            part = share[start : start + size]
            inputs = inputs_of(part or others[:1], total.device)
            labels = self.labels(inputs)
            rows = rows_of_labels(labels, keep_empty=True)
            own = {key: value for key, value in inputs.items() if key != "completion_mask"}
            policy = self.score(model, own, labels, rows).values["logp"]
            ratio = (policy - self.frozen_log_probs(None, own, labels, rows)).sum()
            total += ratio if part else 0.0
        mean: Tensor = self.accelerator.reduce(total, "sum") / max(len(others), 1)
        return mean


def rows_of(inputs: Mapping[str, Any]) -> list[Trajectory]:
    """The prompts and completions of a batch of preferences; rows of one prompt have the same ``prompt_id``."""
    found = []
    for ids, attended, completion in zip(
        *(inputs[name].tolist() for name in ("input_ids", "attention_mask", "completion_mask")), strict=True
    ):
        length, first = sum(attended), completion.index(1) if 1 in completion else sum(attended)
        prompt = ids[:first]
        found.append(Trajectory("", "", prompt, ids[first:length], str(prompt)))
    return found


def inputs_of(rows: Sequence[Trajectory], device: torch.device) -> dict[str, Int[Tensor, "B L"]]:
    """The inverse of `rows_of`, padded on the right."""

    def padded(values: Sequence[Sequence[int]]) -> Int[Tensor, "B L"]:
        return pad_sequence([torch.tensor(value) for value in values], batch_first=True).to(device)

    sizes = [(len(row.prompt_ids), len(row.completion_ids)) for row in rows]
    return {
        "input_ids": padded([[*row.prompt_ids, *row.completion_ids] for row in rows]),
        "attention_mask": padded([[1] * (before + after) for before, after in sizes]),
        "completion_mask": padded([[0] * before + [1] * after for before, after in sizes]),
    }


class GroupsLoss(ObjectiveLoss):
    """The loss of TRL's GRPOTrainer. Advantages are the objective's own, from the rewards of whole groups.

    What `Objective.prepare` fixes is fixed once per batch of samples, as are TRL's own advantages.
    """

    _starts = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        requires = [one for one in self.exported.objective.requires if one.key not in self.exported.stack.keys]
        self.models = self.frozen_models([name for one in requires for name in one.models()])

    def check_arguments(self) -> None:
        super().check_arguments()
        args, objective = self.args, self.exported.objective
        if "reference_logp" in {one.key for one in objective.requires} and not self.beta:
            raise self.refused("it needs a reference: set beta above 0 in GRPOConfig; the objective's own β is used")
        for name, off in (("top_entropy_quantile", 1.0), ("off_policy_mask_threshold", None), ("entropy_coef", 0.0)):
            if getattr(args, name, off) not in (off, None):
                raise self.refused(f"leave out {name}, which is part of TRL's own loss")
        samples = args.per_device_train_batch_size * args.steps_per_generation
        if samples % self.num_generations:
            raise self.refused(
                f"each process samples {samples} completions, which are no whole groups: make "
                f"per_device_train_batch_size × steps_per_generation a multiple of num_generations, "
                f"{self.num_generations}"
            )
        per_token = objective.normaliser is Normaliser.PER_TOKEN
        if per_token and args.steps_per_generation % args.gradient_accumulation_steps:
            raise self.refused(
                "it divides by the tokens of an optimizer step, which must be sampled before: make "
                "steps_per_generation a multiple of gradient_accumulation_steps"
            )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        self._rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's samples, with the objective's advantages in place of TRL's."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        prepared = self._prepared(output)
        if prepared.advantage is not None:
            output["advantages"] = prepared.advantage
        output["tool_mask"] = prepared.mask.to(output["completion_mask"].dtype)
        added = {key: value for key, value in prepared.inputs.items() if key not in self.exported.stack.keys}
        output |= {
            OWN + key: value.expand(len(prepared.mask)) if value.ndim == 0 else value for key, value in added.items()
        }
        output |= {f"{OWN}reward": prepared.reward, f"{OWN}group": prepared.group}
        return output

    def _prepared(self, output: Mapping[str, Any]) -> TokenBatch:
        mask, objective = mask_of(output), self.exported.objective
        size = self.num_generations if self.model.training else self.num_generations_eval
        rewards = (self._rewards * self.reward_weights.to(self._rewards.device)).nansum(1).to(torch.float64)
        here = slice(self.accelerator.process_index * len(mask), (self.accelerator.process_index + 1) * len(mask))
        if torch.isnan(self._rewards[here]).all(1).any():
            raise self.refused("every reward function returned None for a completion: return a number from one of them")
        group = torch.arange(len(mask), device=mask.device) // size
        given = self._given(output)
        batch = self.exported.batch(None, mask, given, reward=rewards[here], group=group)
        with torch.no_grad():
            try:
                return objective.prepare(batch)
            except UserError:  # it reads log-probs, which TRL has not computed where they are not needed
                values, of_model = self._scored_in_parts(output)
                given = {**values, "behaviour_logp": values["logp"], **given}
                batch = self.exported.batch(values["logp"], mask, given, of_model, reward=rewards[here], group=group)
                return objective.prepare(batch)

    def _scored_in_parts(
        self, output: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Callable[[str | None], Float[Tensor, "B T"]]]:
        """Log-probs and statistics of a whole batch of samples, and a function to those of a frozen model, in the
        micro-batches of training."""
        names, size = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), self._train_batch_size
        spans = [slice(start, start + size) for start in range(0, len(output["prompt_ids"]), size)]
        parts = [self._scored(self.model, {name: output[name][span] for name in names})[1:] for span in spans]
        values = {key: torch.cat([value[key] for _, _, value in parts]) for key in parts[0][2]}
        width = output["completion_ids"].shape[1]
        return values, lambda name: torch.cat([self._of_models(own, rows, width)(name) for rows, own, _ in parts])

    def _given(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        names = {"old_per_token_logps": "behaviour_logp", "ref_per_token_logps": "reference_logp"}
        return {key: inputs[name] for name, key in names.items() if inputs.get(name) is not None}

    def denominator(self, batch: TokenBatch) -> Tensor | float:
        normaliser, steps = self.exported.objective.normaliser, self.current_gradient_accumulation_steps
        if self.model.training and normaliser is not Normaliser.PER_TOKEN:
            return float(len(batch.mask) * steps)
        return super().denominator(batch)

    def counted(self, inputs: Mapping[str, Any]) -> TokenBatch:
        return TokenBatch(None, mask_of(inputs))

    def begin(self, window: Sequence[Any]) -> None:
        super().begin([])  # the trainer's batches are prompts: TRL makes the micro-batches when the first is asked for
        self._starts = True

    def part(self, model: nn.Module, inputs: Mapping[str, Any]) -> Part:
        if self._starts:
            self._starts, parts = False, self._buffered_inputs or []
            first = next((place for place, part in enumerate(parts) if part is inputs), 0)
            super().begin(parts[first : first + self.current_gradient_accumulation_steps])
        scores, rows, own, values = self._scored(model, inputs)
        logp, mask = values["logp"], mask_of(inputs)
        fixed = {key.removeprefix(OWN): value for key, value in inputs.items() if key.startswith(OWN)}
        fields: dict[str, Tensor] = {key: fixed.pop(key) for key in ("reward", "group") if key in fixed}
        advantage = inputs["advantages"]
        fields["advantage"] = advantage[:, None].expand_as(logp) if advantage.ndim == 1 else advantage
        given = {"behaviour_logp": logp.detach(), **self._given(inputs), **values, **fixed}
        if (old := inputs.get("old_per_token_logps")) is not None:
            given.setdefault("snapshot_logp", old)
        batch = self.exported.batch(logp, mask, given, self._of_models(own, rows, logp.shape[1]), **fields)
        batch = batch.replace(**{key: value for key, value in fixed.items() if key not in batch.inputs})
        weight = inputs.get("importance_sampling_ratio")
        return Part(batch, own, scores.outputs, scores.term, weight, shown_of(values))

    def _scored(
        self, model: nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[Scores, Sequences, dict[str, Tensor], dict[str, Tensor]]:
        """The forward pass of all completion tokens at the sampling temperature, with its rows, the model's inputs, and
        log-probs and statistics [B, T]."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        own = {"input_ids": ids, "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)}
        labels = ids.masked_fill(own["attention_mask"] == 0, IGNORED)
        labels[:, : inputs["prompt_ids"].shape[1]] = IGNORED
        rows = rows_of_labels(labels, keep_empty=True).at(self.temperature)
        with self.accelerator.autocast():
            scores = self.score(model, own, labels, rows, self.models)
        width = inputs["completion_ids"].shape[1]
        scores = scores._replace(term=None if scores.term is None else widened(scores.term, width))
        return scores, rows, own, {key: widened(value, width) for key, value in scores.values.items()}

    def _of_models(
        self, inputs: Mapping[str, Any], rows: Sequences, width: int
    ) -> Callable[[str | None], Float[Tensor, "B T"]]:
        """A function from the name of a frozen model to its log-probs."""
        return lambda name: widened(self.models.log_probs(name, inputs, rows), width)


def mask_of(inputs: Mapping[str, Any]) -> Bool[Tensor, "B T"]:
    """The completion tokens that are learned from, in a batch of GRPOTrainer."""
    mask: Tensor = inputs["completion_mask"]
    return (mask * inputs["tool_mask"] if inputs.get("tool_mask") is not None else mask).bool()


def widened(value: Float[Tensor, "B T"], width: int) -> Float[Tensor, "B W"]:
    """A tensor padded with 0 to a width."""
    return torch.nn.functional.pad(value, (0, width - value.shape[1]))
