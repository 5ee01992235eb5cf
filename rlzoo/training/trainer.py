"""One loop for every objective: draw a batch, prepare it, accumulate the surrogate's gradient, step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlzoo.config import Training
from rlzoo.errors import TryAgainError, UserError
from rlzoo.inputs import Input, Stage
from rlzoo.jobs.interrupts import pending, raise_signal, signals_deferred
from rlzoo.jobs.memory import on_device
from rlzoo.jobs.ranks import agreed, gathered, is_sharded, world_size
from rlzoo.jobs.restarts import can_restart
from rlzoo.objective import Component, Objective, surrogate_of
from rlzoo.policy import Assembler, FirstPass, MicroBatches, Models, Policy, sharding
from rlzoo.policy.adapters import adapters
from rlzoo.policy.defaults import token_budget_of
from rlzoo.policy.quantised import entries
from rlzoo.policy.sequences import Tokens, learned_tokens, length
from rlzoo.training.batches import (
    Drawn,
    Source,
    check_sources,
    in_mini_batches,
    in_steps,
    keeps_first_pass,
    lacks,
    micro_units,
)
from rlzoo.training.checkpoints import Checkpoints
from rlzoo.training.checks import check_precision, check_quantised
from rlzoo.training.costs import now, peak_memory_bytes, reset_peak_memory
from rlzoo.training.record import TrainingRecord
from rlzoo.training.savings import savings
from rlzoo.training.schedule import Progress
from rlzoo.training.state import is_finite, like_of, restore, state_of
from rlzoo.training.sums import Sums, coefficients_of_rows, coupled_coefficients, metrics_of, truncated_importance
from rlzoo.training.tally import lines_of
from rlzoo.training.trackers import Log, accelerator_for, tracked, untracked
from rlzoo.types import Coefficients, Trajectory, at_temperature

NO_ENGINE = "importance_cap has no effect on rows without sampler_logp, the log-probs of another engine"
Callback = Callable[["Trainer", int], None]
"""Called after every optimizer step with the trainer and the number of steps done."""


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
        """``folder`` is where trackers write their files, and its name is the run's name in them.

        A composite objective takes one ``source`` per component, in their order. ``callbacks`` are called after every
        optimizer step. ``reference`` is a copy of the initial policy, if there is one already.

        Checkpoints are written to the folder ``checkpoints``, and training resumes from the newest one in it, with
        bitwise the same result as without the interruption; ``record`` then includes the steps before. Raises UserError
        for settings that do not suit the policy, and for checkpoints of another run.
        """
        self.sources = source if isinstance(source, Sequence) else [source]
        check_sources(objective, self.sources)
        self.objective, self.settings = objective, (settings := in_steps(settings, self.sources))
        self.callbacks, self.folder = callbacks, folder
        self.record = record or TrainingRecord()
        self.micro = MicroBatches(token_budget_of(policy, settings.token_budget), self._halved)
        self.checkpoints = None
        self.accelerator = accelerator_for(policy.device, settings, folder)
        self._send: Log = untracked
        shards = sharding.is_asked()
        check_quantised(policy, settings, shards)
        if shards and not is_sharded(policy):  # the policy does not come from load_policy
            sharding.shard(policy, policy.model)
        if settings.lora is not None and not adapters(policy.model):
            policy.add_lora(**settings.lora.model_dump(exclude={"load_in_4bit"}))
        policy.pack(settings.packing)
        policy.compile_layers(settings)
        policy.attach(objective.requires)
        sharding.spread(p for p in policy.parameters() if p.requires_grad)  # before they are copied
        self.models = Models.load(policy, self._with_models(), reference)
        sharding.reshard(policy)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        check_precision({p.dtype for p in parameters})
        # frozen weights get no gradient, but activation gradients still pass through them
        self._trained = sum(map(entries, parameters)) / sum(map(entries, policy.parameters()))
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in sharding.in_groups(parameters)],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.progress = Progress(settings, self.record.costs)
        self.policy = policy
        self._savings = partial(savings, policy, settings.gradient_checkpointing)
        self._first = FirstPass(self._savings)
        first = self._first if not is_sharded(policy) and keeps_first_pass(objective, settings) else None
        count = partial(self._count, passes=1)  # also of a pass that is kept: costs do not depend on micro-batches
        self.assembler = Assembler(
            policy, self.models, self.micro, count, first=first, progress=lambda: self.progress.fraction
        )
        if checkpoints is not None and settings.checkpoint_seconds is not None:
            self.checkpoints = Checkpoints(checkpoints, settings.checkpoint_seconds)
            if (found := self.checkpoints.newest(like_of(self))) is not None:
                restore(self, *found)
            budget, events = self.checkpoints.budget()
            self.micro.token_budget = min(self.micro.token_budget, budget or self.micro.token_budget)
            self.record.events += [event for event in events if event not in self.record.events]

    def _with_models(self) -> list[Input]:
        """The inputs whose models are kept in memory: all but those stored in every row of their source."""
        components = zip(self.objective.components, self.sources, strict=True)
        return [
            one
            for component, source in components
            for one in component.objective.requires
            if one.stage is not Stage.STORED or lacks(source, one, component.objective.at_sampling_temperature)
        ]

    def run(self) -> TrainingRecord:
        """Train until ``settings.steps`` optimizer steps are done, the budget is spent, or a callback calls `stop`.

        The first Ctrl-C or SIGTERM, to any process, is raised between two batches in all, after a checkpoint. Raises
        UserError if weights, the loss or a gradient become infinite or NaN, unless ``on_nonfinite`` skips such steps.
        """
        most = 1 if world_size() == 1 else 2  # a launcher repeats what a terminal or a scheduler has sent
        options = {field.name: getattr(self.objective, field.name) for field in fields(self.objective)}
        about = {"model": self.policy.name, "objective": self.objective.name, "options": options}
        with (
            signals_deferred(most),
            tracked(self.accelerator, self.settings, self.folder, about) as self._send,
        ):
            try:
                self._run()
            except BaseException:
                if self.checkpoints is not None:
                    with suppress(Exception):  # others may have failed differently
                        self.checkpoints.wait_alone()
                raise
        if self.checkpoints is not None:
            self.checkpoints.wait()
        if not self._is_finite():
            raise UserError("the last step made weights infinite or NaN: lower learning_rate")
        self.record.events += self.progress.events()
        self.record.events += lines_of(self.record.counts, self.objective.components, self.sources)
        return self.record

    @property
    def step(self) -> int:
        """The number of optimizer steps done."""
        return len(self.record.steps)

    def stop(self, reason: str) -> None:
        """End training after the current step. All processes must call this, with the same reason."""
        self.record.ended = reason

    def log(self, metrics: Mapping[str, float]) -> None:
        """Send further metrics of the current step to the trackers, if there are any, as a callback may."""
        self._send(metrics, self.step)

    def _run(self) -> None:
        step, device = self.step, self.policy.device
        while self.record.ended is None:
            reset_peak_memory(device)
            started = time.perf_counter()
            fresh = agreed([source.draw() for source in self.sources])
            for source in self.sources:
                self.record.costs.add(getattr(source, "spent", dict)())
            drawn = [
                self._prepare(component, *rows)
                for component, rows in zip(self.objective.components, fresh, strict=True)
            ]
            parts = in_mini_batches(drawn, self.settings.mini_batches)
            updates = self.settings.updates_per_batch * len(parts)
            for update in range(updates):
                place = update % len(parts)
                if update or len(parts) > 1:
                    parts[place] = [self._renewed(some) for some in parts[place]]
                metrics = self._update(parts[place], is_first=update < len(parts), is_last=update == updates - 1)
                step += 1
                costs = self.record.costs
                # reading the metrics has waited for the GPU; the optimizer's own work counts in the next step
                self.record.ended = self.progress.ended
                costs.wall_seconds += (time.perf_counter() if self.record.ended is None else now(device)) - started
                costs.peak_memory_bytes = max(costs.peak_memory_bytes, peak_memory_bytes(device))
                self.record.steps.append({"step": step, **metrics})
                self.log({**metrics, **{f"costs/{name}": value for name, value in costs.as_dict().items()}})
                for callback in self.callbacks:
                    callback(self, step)
                if self.record.ended is not None:
                    break
                reset_peak_memory(device)  # a callback's evaluation is not a cost of training
                started = time.perf_counter()
            self._between_batches()

    def _between_batches(self) -> None:
        """Save a checkpoint if one is due, or before a signal that any process has deferred is raised in all."""
        due = self.checkpoints is not None and self.checkpoints.due()
        (due, _), *_ = told = gathered((due, pending()))  # the main process decides what is due
        signal = max((number for _, number in told if number is not None), default=None)
        if self.checkpoints is not None and (due or signal is not None):
            self._save()
            if signal is not None:
                self.checkpoints.wait()
        if signal is not None:
            raise_signal(signal)

    def _save(self) -> None:
        assert self.checkpoints is not None
        if not self._is_finite():  # never replace a good one
            return
        self.checkpoints.save(self.step, *state_of(self))

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The trained parameters, in the optimizer's order."""
        return [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]

    def _is_finite(self) -> bool:
        found = all(is_finite(parameter) for _, parameter in self.named_parameters())
        return all(gathered(found))

    def _prepare(self, component: Component, rows: Sequence[Trajectory], units: Sequence[tuple[int, ...]]) -> Drawn:
        """A component's rows as a prepared batch."""
        objective = component.objective
        capped = self.settings.importance_cap is not None and all(row.sampler_logp is None for row in rows)
        if capped and NO_ENGINE not in self.record.events:
            self.record.events.append(NO_ENGINE)
        rows = [at_temperature(row, objective.at_sampling_temperature) for row in rows]
        return Drawn(component, rows, units, objective.prepare(self.assembler.assemble(rows, units, objective)))

    def _renewed(self, drawn: Drawn) -> Drawn:
        """The same rows, with STEP inputs and coupled log-probs recomputed for the current policy."""
        batch = self.assembler.renew(drawn.batch, drawn.rows, drawn.units, drawn.component.objective)
        return replace(drawn, batch=batch)

    def _update(self, drawn: Sequence[Drawn], is_first: bool, is_last: bool) -> dict[str, float]:
        """One optimizer step on the mini-batches of all components; ``is_first``: the first step on these rows;
        ``is_last``: the last step before other rows are drawn."""
        rows = [row for some in drawn for row in some.rows]
        drawn = [replace(some, component=some.component.at(self.progress.fraction)) for some in drawn]
        self.policy.eval()  # with dropout, ratios would not start at 1 and the gradient would depend on micro-batches
        sums = self.micro.within_memory(rows, lambda: self._gradient(drawn), self._undo, is_sharded(self.policy))
        parameters = [p for _, p in self.named_parameters()]
        sharding.sum_gradients(parameters)
        self._count(self.policy, rows, passes=2 + self._trained)
        for some in drawn:
            if (reference := self._logits_of(some.component.objective)) is not None:
                self._count(reference, some.rows, passes=1)
        self.record.costs.gradient_tokens += sum(map(length, rows))
        self.progress.move_to(self.step + 1, self.record.costs)
        total = sharding.clip_gradients(parameters, self.settings.max_gradient_norm)
        if is_last:
            self._draw_ahead()
        metrics = metrics_of(drawn, sums, total, self.record.counts if is_first else None)
        norm, loss = metrics["gradient_norm"], metrics["loss"]
        sound = math.isfinite(norm) and math.isfinite(loss)
        if not sound:
            event = f"step {self.step + 1}: the gradient norm is {norm} and the loss {loss}"
            if self.settings.on_nonfinite == "stop":
                raise UserError(f"{event}: lower learning_rate, check the data of this step, or set on_nonfinite=skip")
            self.record.events.append(f"{event}; skipped")
            self._undo()
        rate = self.progress.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if sound:
            self.optimizer.step()
            self.policy.weights_changed()  # the counters of a gathered copy do not see the step of its shards
            self.assembler.after_step()
        return {**metrics, **self._scheduled(drawn), "learning_rate": rate}

    def _scheduled(self, drawn: Sequence[Drawn]) -> dict[str, float]:
        """The weights in this step of components whose weight changes in training."""
        pairs = zip(self.objective.components, drawn, strict=True)
        return {f"{own.label}/mixture_weight": some.component.weight for own, some in pairs if own.schedules}

    def _draw_ahead(self) -> None:
        """Let sources prefetch the next batch while the GPU is still busy with this step."""
        if self.progress.ended is None:
            for source in self.sources:
                getattr(source, "draw_ahead", lambda: None)()

    def _gradient(self, drawn: Sequence[Drawn]) -> list[Sums]:
        """Accumulate the weighted sum of the gradients of whole batches; return the metrics of each."""
        denominators = [some.component.objective.normaliser.count(some.batch) for some in drawn]
        coefficients = [coupled_coefficients(some) for some in drawn]
        sums = [Sums() for _ in drawn]
        self.optimizer.zero_grad()
        with self._savings():
            mine = [
                (place, index, counts)
                for place, some in enumerate(drawn)
                for index, counts in self.micro.share(
                    some.rows, micro_units(some.units, some.component.objective.couples), self.policy.packs
                )
            ]
            for place, index, counts in mine:
                own = sums[place] if counts else None
                self._backward(drawn[place], coefficients[place], index, denominators[place], own)
        return sums

    def _undo(self) -> None:
        self.optimizer.zero_grad()
        self._first.drop()

    def _halved(self, before: int, after: int) -> None:
        event = f"step {self.step + 1}: out of memory with {before} tokens per micro-batch, now {after}"
        self.record.events.append(event)
        if is_sharded(self.policy) and self.checkpoints is not None:
            self.checkpoints.write_budget(after, event)
            if not can_restart():
                raise TryAgainError(
                    f"{event}; the run stops, because the processes of a sharded model cannot retry a step on their "
                    "own: resume with the same command"
                )

    def _backward(
        self,
        drawn: Drawn,
        coefficients: Coefficients | None,
        index: list[int],
        denominator: Tensor | float,
        sums: Sums | None,
    ) -> None:
        """Add the gradient of a micro-batch; without ``sums``, with weight 0, to keep in step with other processes."""
        objective, rows, batch = drawn.component.objective, drawn.rows, drawn.batch
        sequences = self.policy.collate([rows[i] for i in index])
        statistics = [one for one in objective.requires if one.is_statistic]
        term, reference = objective.logit_term if objective.has_logit_term else None, self._logits_of(objective)
        output = self._first.take(index) or self.policy(
            sequences, statistics=statistics, term=term, reference=reference
        )
        given = output.of(objective.requires)
        others = [output.inputs[key] for key in self.policy.attached if key not in given]
        if sums is None:
            parts = [output.logp, *(v for v in given.values() if v.requires_grad), *others]
            parts += [] if output.term is None else [output.term]
            torch.autograd.backward(0.0 * torch.stack([part.sum() for part in parts]).sum())
            return
        place = on_device(torch.tensor(index), batch.mask.device)
        part = batch.rows(place, sequences.mask.shape[1]).replace(logp=output.logp, **given)
        own = (
            objective.coefficients(part.detach())
            if coefficients is None
            else coefficients_of_rows(coefficients, place, part)
        )
        if (cap := self.settings.importance_cap) is not None:
            own = own.weighted(truncated_importance([rows[i] for i in index], part.mask, cap))
        loss = surrogate_of(own, objective, part, denominator, output.term)
        for value in others:  # other components' modules: every process must have all gradients
            loss = loss + 0.0 * value.sum()
        torch.autograd.backward(drawn.component.weight * loss)
        if output.term is not None:
            own = replace(own, metrics={**own.metrics, "logit_term": own.of_term(output.term, part.mask)})
        sums.add(objective, part, own, loss, denominator)

    def _logits_of(self, objective: Objective) -> Policy | None:
        """The reference model of an objective's logit term."""
        givers = (one for one in objective.requires if one.gives_logits)
        return next((self.models.of(name) for one in givers for name in one.models()), None)

    def _count(self, policy: Policy, rows: Sequence[Tokens], passes: float) -> None:
        completions = sum(map(learned_tokens, rows))
        self.record.costs.flops += passes * policy.flops(sum(map(length, rows)), completions)
