"""One loop for every objective: draw a batch, fix what stays fixed, accumulate the surrogate's gradient, step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from rlzoo.config import Training
from rlzoo.errors import UserError
from rlzoo.interrupts import heed, noted, pending
from rlzoo.objective import Objective, Part, reduce, statistics_of, surrogate_of
from rlzoo.policy import Policy, Sequences, TokenScores
from rlzoo.policy.adapters import adapters
from rlzoo.policy.policy import token_batches
from rlzoo.ranks import agreed, gathered, is_sharded, rank, world_size
from rlzoo.training.batches import Drawn, Source, as_scored, atoms, mismatched, static_batch
from rlzoo.training.checkpoints import Checkpoints
from rlzoo.training.costs import is_out_of_memory, peak_memory_bytes, release_memory, reset_peak_memory
from rlzoo.training.record import TrainingRecord
from rlzoo.training.savings import gradients_in_place, layers_recomputed
from rlzoo.training.schedule import cosine
from rlzoo.training.state import is_finite, restore, state_of
from rlzoo.training.sums import Sums, coefficients_of_rows, coupled_coefficients, metrics_of, truncated_importance
from rlzoo.training.tally import count, told
from rlzoo.training.trackers import installed, tracked
from rlzoo.types import Coefficients, Need, TokenBatch, Trajectory

NO_ENGINE = "importance_cap changes nothing for rows without sampler_logp, the log-probs of another engine"
T = TypeVar("T")
Callback = Callable[["Trainer", int], None]
"""Called with the trainer and the number of steps done, after every optimizer step."""


class Trainer:
    """Trains a policy with an objective on the batches of a source.

    The gradient of a step is that of the whole batch: it depends neither on the micro-batch size nor on the order
    of rows, because every denominator is known before the first backward pass.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        source: Source | Sequence[Source],
        settings: Training,
        callbacks: Sequence[Callback] = (),
        reference: Policy | None = None,
        folder: Path | None = None,
        record: TrainingRecord | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        """``folder`` is where trackers write that write files, and names the run for all of them.

        A composite objective takes a ``source`` for each of its parts, in their order.

        With a folder for ``checkpoints`` they are written there, and the run resumes from the newest one in it, to
        the same end, bit for bit, as if it had never stopped; ``record`` then has what came before.
        """
        self.objective, self.settings = objective, settings
        self.sources = source if isinstance(source, Sequence) else [source]
        if len(self.sources) != len(objective.parts):
            raise UserError(
                f"objective {objective.name!r} has {len(objective.parts)} parts and {len(self.sources)} sources: "
                "give one for each"
            )
        self.callbacks, self.folder = callbacks, folder
        self.record = record or TrainingRecord()
        self.token_budget = settings.token_budget
        self.checkpoints = None
        self.accelerator = Accelerator(
            cpu=policy.device.type == "cpu", log_with=list(installed(settings.trackers)) or None, project_dir=folder
        )
        if settings.lora is not None and not adapters(policy.model):
            policy.add_lora(**settings.lora.model_dump())
        if Need.CRITIC in objective.requires:
            policy.add_critic(objective.shared_critic)
        self.reference = self._reference_policy(policy, reference)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        # a frozen weight takes no gradient of its own, but passes one on
        self._trained = sum(p.numel() for p in parameters) / sum(p.numel() for p in policy.parameters())
        optimizer = torch.optim.AdamW(
            parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = self.accelerator.prepare(policy, optimizer)
        # not prepared: Accelerate would step the schedule once a process
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, settings))
        self.policy: Policy = self.accelerator.unwrap_model(self.model)
        if checkpoints is not None and settings.checkpoint_seconds is not None:
            self.checkpoints = Checkpoints(checkpoints, settings.checkpoint_seconds)
            if (found := self.checkpoints.newest()) is not None:
                restore(self, *found)

    def _reference_policy(self, policy: Policy, reference: Policy | None) -> Policy | None:
        """The reference that is kept in memory: one that moves, gives logits, or scores what no buffer holds."""
        if Need.EMA_REFERENCE in self.objective.requires:
            return policy.frozen_copy()
        needed = self.objective.requires & {Need.REFERENCE_LOGITS, Need.MISMATCHED}
        return policy.reference() if needed and reference is None else reference

    def run(self) -> TrainingRecord:
        """Train up to ``settings.steps`` optimizer steps.

        The first Ctrl-C or SIGTERM is raised between two steps, after a checkpoint.
        """
        with noted(), tracked(self.accelerator, self.settings, self.folder) as log:
            self._run(log)
        if not self._is_finite():
            raise UserError("the last step made weights infinite: lower learning_rate")
        self.record.events += told(self.record.counts, self.objective.parts, self.sources)
        return self.record

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return len(self.record.steps)

    def _run(self, log: Callable[[dict[str, float], int], None]) -> None:
        step = self.step
        while step < self.settings.steps:
            reset_peak_memory()
            started = time.perf_counter()
            fresh = agreed([source.draw() for source in self.sources])
            drawn = [self._prepare(part, *rows) for part, rows in zip(self.objective.parts, fresh, strict=True)]
            for some in drawn:
                count(self.record.counts, some)
            for update in range(self.settings.updates_per_batch):
                if update:
                    drawn = [self._renewed(some) for some in drawn]
                metrics = self._update(drawn)
                step += 1
                costs = self.record.costs
                costs.wall_seconds += time.perf_counter() - started
                costs.peak_memory_bytes = max(costs.peak_memory_bytes, peak_memory_bytes())
                self.record.steps.append({"step": step, **metrics})
                log(metrics, step)
                for callback in self.callbacks:
                    callback(self, step)
                if step == self.settings.steps:
                    break
                reset_peak_memory()  # a callback's evaluation is no cost of training
                started = time.perf_counter()
            self._between_batches()

    def _between_batches(self) -> None:
        """Save a checkpoint if one is due, or before a noted signal is raised."""
        if self.checkpoints is not None:
            stopping = world_size() == 1 and pending()
            if self.checkpoints.due() or stopping:
                self._save()
        heed()

    def _save(self) -> None:
        assert self.checkpoints is not None
        if not self._is_finite():  # never in place of a good one
            return
        self.checkpoints.save(self.step, *state_of(self))

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What is trained, in the order of the optimizer."""
        return [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]

    def _is_finite(self) -> bool:
        found = all(is_finite(parameter) for _, parameter in self.named_parameters())
        return all(gathered(found))

    @property
    def moving_reference(self) -> Policy | None:
        """The reference, if it follows the policy."""
        return None if self.objective.reference_decay is None else self.reference

    def _prepare(self, part: Part, rows: Sequence[Trajectory], units: Sequence[tuple[int, ...]]) -> Drawn:
        """A part's rows as a batch, with everything that is fixed during its updates."""
        objective, needs = part.objective, part.objective.requires
        capped = self.settings.importance_cap is not None and all(row.sampler_logp is None for row in rows)
        if capped and NO_ENGINE not in self.record.events:
            self.record.events.append(NO_ENGINE)
        rows = [as_scored(row, objective.at_sampling_temperature) for row in rows]
        batch = static_batch(rows, units, objective.learns_from, self.policy.device, objective.truncated == "mask")
        if Need.BEHAVIOUR in needs and batch.behaviour_logp is None:
            raise UserError("the buffer has no behaviour log-probs: fill it with `rlzoo rollout`, which records them")
        stored = batch.reference_logp is not None and Need.EMA_REFERENCE not in needs
        if needs & {Need.REFERENCE, Need.EMA_REFERENCE} and self.reference is not None and not stored:
            batch = replace(batch, reference_logp=self._score(self.reference, rows)[0].logp)
        if Need.REFERENCE in needs and batch.reference_logp is None:
            raise UserError("the buffer has no reference log-probs: use rlzoo.train, which computes them")
        if needs & {Need.SNAPSHOT, Need.CRITIC} or objective.is_coupled:
            batch = self._scored(objective, rows, batch)
            batch = replace(batch, snapshot_logp=batch.logp, old_value=batch.value)
        return Drawn(part, rows, units, objective.prepare(self._against_others(objective, rows, batch)))

    def _renewed(self, drawn: Drawn) -> Drawn:
        """The same with what depends on other rows and on the policy as it has become."""
        objective, batch = drawn.part.objective, drawn.batch
        if objective.is_coupled:
            batch = self._scored(objective, drawn.rows, batch)
        return replace(drawn, batch=self._against_others(objective, drawn.rows, batch))

    def _against_others(self, objective: Objective, rows: Sequence[Trajectory], batch: TokenBatch) -> TokenBatch:
        """The batch with ``mismatched``, for `Need.MISMATCHED`; 0 where all rows have one prompt."""
        if Need.MISMATCHED not in objective.requires:
            return batch
        assert self.reference is not None
        others, mean = mismatched(rows), torch.zeros((), device=batch.mask.device)
        if others:
            own, reference = (self._score(policy, others)[0].logp.sum(1) for policy in (self.policy, self.reference))
            mean = (own - reference).mean()
        return replace(batch, mismatched=mean.expand(len(rows)))

    def _scored(self, objective: Objective, rows: Sequence[Trajectory], batch: TokenBatch) -> TokenBatch:
        """The batch with log-probs, values and statistics of the policy as it is."""
        scores, statistics = self._score(self.policy, rows, statistics_of(objective))
        return replace(batch, logp=scores.logp, value=scores.value, statistics=statistics)

    @torch.no_grad()
    def _score(
        self, policy: Policy, rows: Sequence[Trajectory], statistics: Sequence[Need] = ()
    ) -> tuple[TokenScores, Mapping[str, Tensor]]:
        """Scores of all rows by ``policy`` as it is, with no graph."""
        width = max(len(r.completion_ids) for r in rows)
        training = policy.training
        policy.eval()

        def pieces() -> dict[str, Tensor]:
            parts: dict[str, Tensor] = {}
            for index, counts in self._share(rows, [(i,) for i in range(len(rows))]):
                sequences = self._collate(rows, index)
                scores = policy(sequences, statistics=statistics)
                found = {"logp": scores.logp, "value": scores.value, **scores.statistics}
                for name, value in found.items():
                    if value is not None:
                        all_rows = parts.setdefault(name, value.new_zeros(len(rows), width))
                        if counts:
                            all_rows[torch.tensor(index), : value.shape[1]] = value
            return parts

        parts = self._within_memory(rows, pieces)
        if world_size() > 1:
            parts = {name: self.accelerator.reduce(part, "sum") for name, part in parts.items()}
        self._count(policy, rows, passes=1)
        policy.train(training)
        logp, value = parts.pop("logp"), parts.pop("value", None)
        return TokenScores(logp, {}, value), parts

    def _update(self, drawn: Sequence[Drawn]) -> dict[str, float]:
        """One optimizer step on the batches of all parts."""
        rows = [row for some in drawn for row in some.rows]
        self.model.eval()  # dropout would move ratios off 1 and tie the gradient to the micro-batches
        sums = self._within_memory(rows, lambda: self._gradient(drawn))
        if world_size() > 1:
            # gradients were averaged over processes. Not done to the loss: models round some gradients to float32,
            # and a factor of 3 would round others
            for parameter in self.policy.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(world_size())
        self._count(self.policy, rows, passes=2 + self._trained)
        for some in drawn:
            if (reference := self._logits_of(some.part.objective)) is not None:
                self._count(reference, some.rows, passes=1)
        self.record.costs.gradient_tokens += sum(map(_length, rows))
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_gradient_norm)
        metrics = metrics_of(drawn, [part.over_processes() for part in sums])
        sound = math.isfinite(float(norm)) and math.isfinite(metrics["loss"])
        if not sound:
            told = f"step {self.step + 1}: the gradient is {float(norm)} and the loss {metrics['loss']}"
            if self.settings.on_nonfinite == "stop":
                raise UserError(f"{told}: lower learning_rate, look at this step's data, or set on_nonfinite=skip")
            self.record.events.append(f"{told}; skipped")
            self.optimizer.zero_grad(set_to_none=True)
        rate = self.schedule.get_last_lr()[0]
        if sound:
            self.optimizer.step()
            self.policy.weights_changed()  # a sharded weight that steps may stand behind its gathered copy
            self._move_reference()
        self.schedule.step()
        return {**metrics, "gradient_norm": float(norm), "learning_rate": float(rate)}

    def _gradient(self, drawn: Sequence[Drawn]) -> list[Sums]:
        """Leave the weighted sum of the gradients of whole batches in the parameters; the metrics of each."""
        denominators = [some.part.objective.normaliser.denominator(some.batch) for some in drawn]
        coefficients = [coupled_coefficients(some) for some in drawn]
        sums = [Sums() for _ in drawn]
        self.optimizer.zero_grad(set_to_none=True)
        recomputed = layers_recomputed(self.policy) if self.settings.gradient_checkpointing else nullcontext()
        with recomputed, nullcontext() if world_size() > 1 else gradients_in_place(self.policy):
            mine = [
                (place, index, counts)
                for place, some in enumerate(drawn)
                for index, counts in self._share(some.rows, atoms(some.units, some.part.objective.couples))
            ]
            for number, (place, index, counts) in enumerate(mine):
                own = sums[place] if counts else None
                with nullcontext() if number + 1 == len(mine) else self._no_exchange():
                    self._backward(drawn[place], coefficients[place], index, denominators[place], own)
        return sums

    def _within_memory(self, rows: Sequence[Trajectory], work: Callable[[], T]) -> T:
        """Do the work, in micro-batches half as large where memory runs out. Of several processes none may change."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or world_size() > 1:
                    raise
                if self.token_budget <= max(map(_length, rows)):
                    raise UserError(f"out of memory with one sequence per micro-batch: {error}") from None
            self.optimizer.zero_grad(set_to_none=True)
            release_memory()
            halved = max(min(self.token_budget, sum(map(_length, rows))) // 2, 1)
            self.record.events.append(
                f"step {self.step + 1}: out of memory with {self.token_budget} tokens per micro-batch, now {halved}"
            )
            self.token_budget = halved

    def _backward(
        self,
        drawn: Drawn,
        coefficients: Coefficients | None,
        index: list[int],
        denominator: float,
        sums: Sums | None,
    ) -> None:
        """Add the gradient of a micro-batch; without ``sums`` it keeps step with the other processes and weighs 0."""
        objective, rows, batch = drawn.part.objective, drawn.rows, drawn.batch
        sequences, reference = self._collate(rows, index), self._logits_of(objective)
        statistics, term = statistics_of(objective), objective.logit_term if objective.has_logit_term else None
        scores = self.model(sequences, statistics=statistics, term=term, reference=reference)
        if sums is None:
            parts = [part.sum() for part in (scores.logp, scores.value, scores.term) if part is not None]
            self.accelerator.backward(0.0 * torch.stack(parts).sum())
            return
        place = torch.tensor(index, device=batch.mask.device)
        part = replace(
            batch.rows(place, sequences.mask.shape[1]),
            logp=scores.logp,
            value=scores.value,
            statistics=scores.statistics,
        )
        own = (
            objective.coefficients(part.detach())
            if coefficients is None
            else coefficients_of_rows(coefficients, place, part)
        )
        if (cap := self.settings.importance_cap) is not None:
            own = replace(own, values=own.values * truncated_importance([rows[i] for i in index], part.mask, cap))
        loss = surrogate_of(own, objective, part, denominator)
        if scores.term is not None and denominator:
            loss = loss + reduce(scores.term, part, objective.normaliser, denominator)
        if scores.value is not None and Need.CRITIC not in objective.requires:
            loss = loss + 0.0 * scores.value.sum()  # another part's critic: processes wait for all gradients
        self.accelerator.backward(drawn.part.weight * loss)
        if scores.term is not None:
            own = replace(own, metrics={**own.metrics, "logit_term": scores.term})
        sums.add(objective, part, own, loss, denominator)

    def _share(self, rows: Sequence[Trajectory], together: Sequence[tuple[int, ...]]) -> list[tuple[list[int], bool]]:
        """This process's micro-batches, and whether each counts: all processes have as many, of like length.

        A sharded model needs them to run in step, so where micro-batches are too few, one runs once more for nothing.
        """
        lengths, world = [_length(row) for row in rows], world_size()
        budget = min(self.token_budget, -(-sum(lengths) // world))
        batches = list(token_batches(together, lengths, budget if world > 1 else self.token_budget))
        own = range(rank(), -(-len(batches) // world) * world, world)
        return [(batches[i], True) if i < len(batches) else (batches[0], False) for i in own]

    def _no_exchange(self) -> AbstractContextManager[Any]:
        """Gradients stay with this process for now; a sharded model has no room for that."""
        if is_sharded(self.policy):
            return nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(self.model)
        return context

    def _logits_of(self, objective: Objective) -> Policy | None:
        """The policy whose logits an objective's logit term asks for."""
        return self.reference if Need.REFERENCE_LOGITS in objective.requires else None

    def _collate(self, rows: Sequence[Trajectory], index: Sequence[int]) -> Sequences:
        return Sequences.of([rows[i] for i in index], self.policy.device)

    def _count(self, policy: Policy, rows: Sequence[Trajectory], passes: float) -> None:
        completions = sum(len(row.completion_ids) for row in rows)
        self.record.costs.flops += passes * policy.flops(sum(map(_length, rows)), completions)

    @torch.no_grad()
    def _move_reference(self) -> None:
        decay, reference = self.objective.reference_decay, self.moving_reference
        if decay is None or reference is None:
            return
        for average, current in zip(reference.model.parameters(), self.policy.model.parameters(), strict=True):
            average.lerp_(current.full_tensor() if is_sharded(self.policy) else current, 1 - decay)


def _length(row: Trajectory) -> int:
    return len(row.prompt_ids) + len(row.completion_ids)
