"""One loop for every objective: draw a batch, fix what stays fixed, accumulate the surrogate's gradient, step."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlzoo.buffers import Buffer
from rlzoo.config import Training
from rlzoo.errors import UserError
from rlzoo.objective import Objective, reduce, surrogate_of
from rlzoo.policy import Policy, Sequences, TokenScores
from rlzoo.policy.policy import score_rows, token_batches
from rlzoo.training.batches import BufferSource, Source, atoms, static_batch
from rlzoo.training.costs import Costs, peak_memory_bytes, reset_peak_memory
from rlzoo.types import STATISTICS, Coefficients, Coupling, Need, TokenBatch, Trajectory

Callback = Callable[["Trainer", int], None]
"""Called with the trainer and the number of steps done, after every optimizer step."""


@dataclass
class TrainingRecord:
    """What a run did: one row of metrics a step, and its costs."""

    steps: list[dict[str, float]] = field(default_factory=list)
    costs: Costs = field(default_factory=Costs)


class Trainer:
    """Trains a policy with an objective on the batches of a source.

    The gradient of a step is that of the whole batch: it depends neither on the micro-batch size nor on the order
    of rows, because every denominator is known before the first backward pass.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective,
        source: Source,
        settings: Training,
        callbacks: Sequence[Callback] = (),
        reference: Policy | None = None,
    ) -> None:
        self.objective, self.source, self.settings = objective, source, settings
        self.callbacks = callbacks
        self.record = TrainingRecord()
        self.accelerator = Accelerator(cpu=policy.device.type == "cpu")
        if Need.CRITIC in objective.requires:
            policy.add_critic(objective.shared_critic)
        self.reference = self._reference_policy(policy, reference)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = self.accelerator.prepare(policy, optimizer)
        # not prepared: Accelerate would step the schedule once a process
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, settings))
        self.policy: Policy = self.accelerator.unwrap_model(self.model)

    def _reference_policy(self, policy: Policy, reference: Policy | None) -> Policy | None:
        """The reference that is kept in memory: one that moves, or one that scores fresh samples."""
        needs_logits = type(self.objective).logit_term is not Objective.logit_term
        if Need.EMA_REFERENCE in self.objective.requires or (needs_logits and reference is None):
            return policy.frozen_copy()
        return reference

    def run(self) -> TrainingRecord:
        """Train for ``settings.steps`` optimizer steps."""
        step = 0
        while step < self.settings.steps:
            reset_peak_memory()
            started = time.perf_counter()
            rows, units = self.source.draw()
            batch = self._prepare(rows, units)
            for update in range(self.settings.updates_per_batch):
                if update and self._coupled:
                    batch = self._scored(rows, batch)
                metrics = self._update(rows, units, batch)
                step += 1
                costs = self.record.costs
                costs.wall_seconds += time.perf_counter() - started
                costs.peak_memory_bytes = max(costs.peak_memory_bytes, peak_memory_bytes())
                self.record.steps.append({"step": step, **metrics})
                for callback in self.callbacks:
                    callback(self, step)
                if step == self.settings.steps:
                    break
                reset_peak_memory()  # a callback's evaluation is no cost of training
                started = time.perf_counter()
        return self.record

    @property
    def _coupled(self) -> bool:
        """Whether a coefficient looks at the whole batch, which then has to be scored before its first backward."""
        return self.objective.couples is Coupling.BATCH

    def _prepare(self, rows: Sequence[Trajectory], units: Sequence[tuple[int, ...]]) -> TokenBatch:
        """The batch with everything that is fixed during its updates."""
        objective, needs = self.objective, self.objective.requires
        batch = static_batch(rows, units, objective.learns_from, self.policy.device)
        if Need.BEHAVIOUR in needs and batch.behaviour_logp is None:
            raise UserError("the buffer has no behaviour log-probs: fill it with `rlzoo rollout`, which records them")
        if needs & {Need.REFERENCE, Need.EMA_REFERENCE} and self.reference is not None:
            batch = replace(batch, reference_logp=self._score(self.reference, rows)[0].logp)
        if Need.REFERENCE in needs and batch.reference_logp is None:
            raise UserError("the buffer has no reference log-probs: use rlzoo.train, which computes them")
        if needs & {Need.SNAPSHOT, Need.CRITIC} or self._coupled:
            batch = self._scored(rows, batch)
            batch = replace(batch, snapshot_logp=batch.logp, old_value=batch.value)
        return objective.prepare(batch)

    def _scored(self, rows: Sequence[Trajectory], batch: TokenBatch) -> TokenBatch:
        """The batch with log-probs, values and statistics of the policy as it is."""
        scores, statistics = self._score(self.policy, rows)
        return replace(batch, logp=scores.logp, value=scores.value, statistics=statistics)

    @torch.no_grad()
    def _score(self, policy: Policy, rows: Sequence[Trajectory]) -> tuple[TokenScores, Mapping[str, Tensor]]:
        """Scores of all rows by ``policy`` as it is, with no graph."""
        width = max(len(r.completion_ids) for r in rows)
        parts: dict[str, Tensor] = {}
        training = policy.training
        policy.eval()
        for index in self._micro_batches(rows, [(i,) for i in range(len(rows))]):
            sequences = self._collate(rows, index)
            scores = policy(sequences, statistics=self._statistics())
            found = {"logp": scores.logp, "value": scores.value, **scores.statistics}
            for name, value in found.items():
                if value is not None:
                    whole = parts.setdefault(name, value.new_zeros(len(rows), width))
                    whole[torch.tensor(index), : value.shape[1]] = value
            self._count_forward(policy, sequences, passes=1)
        policy.train(training)
        logp, value = parts.pop("logp"), parts.pop("value", None)
        return TokenScores(logp, {}, value), parts

    def _update(
        self,
        rows: Sequence[Trajectory],
        units: Sequence[tuple[int, ...]],
        batch: TokenBatch,
    ) -> dict[str, float]:
        """One optimizer step on the batch."""
        objective = self.objective
        world = self.accelerator.num_processes
        denominator = self._over_ranks(objective.normaliser.denominator(batch))
        coefficients = objective.coefficients(batch) if self._coupled else None
        sums = _Sums()
        self.model.eval()  # dropout would move ratios off 1 and tie the gradient to the micro-batches
        self.optimizer.zero_grad(set_to_none=True)
        for index in self._micro_batches(rows, atoms(units, objective.couples)):
            sequences = self._collate(rows, index)
            scores = self.model(
                sequences, statistics=self._statistics(), term=self._logit_term(), reference=self.reference
            )
            place = torch.tensor(index, device=batch.mask.device)
            part = replace(
                batch.rows(place, sequences.mask.shape[1]),
                logp=scores.logp,
                value=scores.value,
                statistics=scores.statistics,
            )
            own = objective.coefficients(part.detach()) if coefficients is None else _rows(coefficients, place, part)
            loss = surrogate_of(own, objective, part, denominator)
            if scores.term is not None and denominator:
                loss = loss + reduce(scores.term, part, objective.normaliser, denominator)
            self.accelerator.backward(loss * world)  # the ranks' gradients are averaged, not summed
            sums.add(objective, part, own, loss, denominator)
            self._count_forward(self.policy, sequences, passes=3)
            if scores.term is not None and self.reference is not None:
                self._count_forward(self.reference, sequences, passes=1)
            self.record.costs.gradient_tokens += sequences.tokens
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_gradient_norm)
        if not math.isfinite(float(norm)):
            raise UserError(f"the gradient is {float(norm)}: lower learning_rate, or look at the data of this step")
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self._move_reference()
        reward = {} if batch.reward is None else {"reward": float(batch.reward.mean())}
        return {**sums.means(), **reward, "gradient_norm": float(norm), "learning_rate": float(rate)}

    def _logit_term(self) -> Any:
        return self.objective.logit_term if type(self.objective).logit_term is not Objective.logit_term else None

    def _statistics(self) -> list[Need]:
        return [need for need in STATISTICS if need in self.objective.requires]

    def _micro_batches(self, rows: Sequence[Trajectory], together: Sequence[tuple[int, ...]]) -> list[list[int]]:
        return list(token_batches(together, [_length(row) for row in rows], self.settings.token_budget))

    def _collate(self, rows: Sequence[Trajectory], index: Sequence[int]) -> Sequences:
        prompts, completions = [rows[i].prompt_ids for i in index], [rows[i].completion_ids for i in index]
        return Sequences.collate(prompts, completions, self.policy.device)

    def _count_forward(self, policy: Policy, sequences: Sequences, passes: int) -> None:
        self.record.costs.flops += passes * policy.flops(sequences.tokens, int(sequences.mask.sum()))

    def _over_ranks(self, count: float) -> float:
        if self.accelerator.num_processes == 1:
            return count
        total: Tensor = self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device), "sum")
        return float(total)

    @torch.no_grad()
    def _move_reference(self) -> None:
        decay = self.objective.reference_decay
        if decay is None or self.reference is None:
            return
        for average, current in zip(self.reference.model.parameters(), self.policy.model.parameters(), strict=True):
            average.lerp_(current, 1 - decay)


class _Sums:
    """Metrics of a step from unreduced parts, so that they do not depend on micro-batches either."""

    def __init__(self) -> None:
        self._total: dict[str, float] = defaultdict(float)
        self._count: dict[str, float] = defaultdict(float)

    def add(
        self,
        objective: Objective,
        part: TokenBatch,
        coefficients: Coefficients,
        loss: Tensor,
        denominator: float,
    ) -> None:
        reported = loss.detach()
        if coefficients.loss is not None and denominator:
            reported = reduce(coefficients.loss, part, objective.normaliser, denominator)
        self._total["loss"] += float(reported)
        self._count["loss"] = 1
        per_token = {"logp": part.logp.detach(), "coefficient": coefficients.values, **coefficients.metrics}
        for name, value in per_token.items():
            inside = value[part.mask] if value.ndim == 2 else value
            inside = inside[~inside.isnan()]
            self._total[name] += float(inside.sum())
            self._count[name] += inside.numel()

    def means(self) -> dict[str, float]:
        return {name: self._total[name] / max(self._count[name], 1) for name in self._total}


def _rows(coefficients: Coefficients, index: Tensor, part: TokenBatch) -> Coefficients:
    def cut(x: Tensor) -> Tensor:
        return x[index] if x.ndim == 1 else x[index, : part.logp.shape[1]]

    loss = None if coefficients.loss is None else cut(coefficients.loss)
    return Coefficients(cut(coefficients.values), loss, {k: cut(v) for k, v in coefficients.metrics.items()})


def _length(row: Trajectory) -> int:
    return len(row.prompt_ids) + len(row.completion_ids)


def _cosine(step: int, settings: Training) -> float:
    """Linear warm-up over ``warmup_ratio`` of the steps, then a cosine that would reach 0 one step after the last."""
    warmup = math.ceil(settings.warmup_ratio * settings.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def with_reference(buffer: Buffer, policy: Policy, token_budget: int = 8192) -> Buffer:
    """The buffer with log-probs of ``policy`` as the reference, computed once."""
    rows = list(zip(buffer.column("prompt_ids"), buffer.column("completion_ids"), strict=True))
    return buffer.with_reference_logp(score_rows(policy, rows, token_budget))


def train(
    policy: Policy,
    objective: Objective,
    buffer: Buffer,
    settings: Training | None = None,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
) -> TrainingRecord:
    """Train ``policy`` in place on a fixed buffer; missing reference log-probs are those of ``policy`` as it comes.

    Raises UserError where the buffer lacks what the objective learns from.
    """
    settings = settings or Training()
    torch.manual_seed(seed)
    view = buffer.view(objective.learns_from, **objective.view_options)
    if Need.REFERENCE in objective.requires and any(r is None for r in buffer.column("reference_logp")):
        buffer = with_reference(buffer, policy, settings.token_budget)
    source = BufferSource(buffer, view, settings.batch_size, seed)
    return Trainer(policy, objective, source, settings, callbacks).run()
