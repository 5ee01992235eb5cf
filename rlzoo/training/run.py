"""`train`, and the preparation of a fixed buffer for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from rlzoo.buffers import Buffer
from rlzoo.buffers.bad_rows import BadRows
from rlzoo.config import TokenBudget, Training
from rlzoo.errors import UserError
from rlzoo.inputs import Input, Reference, Stage
from rlzoo.objective import Objective
from rlzoo.policy import Assembler, MicroBatches, Models, Policy, log_probs
from rlzoo.policy.defaults import token_budget_of
from rlzoo.training.batches import (
    BufferSource,
    FreshSource,
    Source,
    buffer_sources,
    check_sources,
    seeds,
    shares,
    views_of,
)
from rlzoo.training.record import TrainingRecord
from rlzoo.training.trainer import Callback, Trainer
from rlzoo.types import TEMPERED, at_temperature


def check_buffer(policy: Policy, buffer: Buffer) -> None:
    """Raise UserError naming a row (from 1) with a token that has no embedding, or with more tokens than positions."""
    found = buffer.outside(policy.vocabulary)
    doubtful = None if found is None else found[0]
    if doubtful is None and policy.positions is not None and len(buffer) and buffer.tokens().max() > policy.positions:
        doubtful = int(buffer.tokens().argmax())
    if doubtful is not None:
        row = buffer[doubtful]
        with BadRows().at(f"row {doubtful + 1} of the buffer (prompt {row.prompt_id!r})"):
            policy.row_check()(row.prompt_ids, row.completion_ids)


def with_inputs(
    buffer: Buffer,
    inputs: Iterable[Input],
    policy: Policy,
    token_budget: TokenBudget = 8192,
    initial: Policy | None = None,
) -> Buffer:
    """The buffer with computed values of stored inputs; ``initial`` is the initial policy (None: ``policy``).

    Rows sampled at a temperature other than 1 get values both at that temperature and at 1.
    """
    for one in inputs:
        models = Models.load(policy, [one], initial or policy)
        assembler = Assembler(policy, models, MicroBatches(token_budget_of(policy, token_budget)))
        plain: list[np.ndarray] = []
        tempered: list[np.ndarray | None] = []
        for rows in buffer.chunks():
            hot = [place for place, row in enumerate(rows) if row.temperature != 1.0]
            cold = [at_temperature(row, sampling=False) for row in rows]
            plain += assembler.values(one, cold)
            own = dict(zip(hot, assembler.values(one, [rows[place] for place in hot]), strict=True))
            tempered += [own.get(place) for place in range(len(rows))]
        buffer = buffer.with_values(one.column, plain)
        buffer = buffer.with_values(TEMPERED + one.column, tempered)
    return buffer


def with_reference(buffer: Buffer, policy: Policy, token_budget: TokenBudget = 8192) -> Buffer:
    """`with_inputs` for the log-probs of ``policy`` as the frozen reference."""
    return with_inputs(buffer, [Reference()], policy, token_budget)


def stored_inputs(objectives: Iterable[Objective]) -> list[Input]:
    """The distinct stored inputs of objectives that can be computed."""
    components = (component.objective for whole in objectives for component in whole.components)
    wanted = (one for objective in components for one in objective.requires)
    return list(dict.fromkeys(one for one in wanted if one.stage is Stage.STORED and one.is_computed))


def lacking(buffer: Buffer, *objectives: Objective, again: bool = False) -> list[Input]:
    """The stored inputs of objectives that can be computed and that rows of the buffer lack.

    With ``again`` also those of a model that another input of the same objective uses during training: stored values
    may be another model's, and the two must agree.
    """
    found: dict[Input, None] = {}
    for objective in (component.objective for whole in objectives for component in whole.components):
        later = {name for one in objective.requires if one.stage is not Stage.STORED for name in one.models()}
        for one in objective.requires:
            if one.stage is Stage.STORED and one.is_computed:
                stale = again and bool(later.intersection(one.models()))
                if stale or buffer.lacks(one.column, objective.at_sampling_temperature):
                    found[one] = None
    return list(found)


def with_behaviour(buffer: Buffer, policy: Policy, token_budget: TokenBudget = 8192) -> tuple[Buffer, list[int]]:
    """The buffer with ``policy``'s log-probs for samples without behaviour log-probs, and the indices of these rows."""
    sampled = np.array(buffer.column("source")) != "demonstration"
    lacks = ~buffer.has("behaviour_logp") & sampled
    if not lacks.any():  # then a large buffer is not read into memory
        return buffer, []
    known, heats, start = buffer.column("behaviour_logp"), buffer.numbers("temperature"), 0
    for rows in buffer.ids():
        own = np.flatnonzero(lacks[start : start + len(rows)])
        logps = log_probs(policy, [rows[i] for i in own], token_budget, heats[start + own].tolist())
        for i, logp in zip(own, logps, strict=True):
            known[start + i] = logp
        start += len(rows)
    return buffer.with_behaviour_logp(known), np.flatnonzero(lacks).tolist()


def behaviour_event(rows: int) -> str:
    """The event for the record when `with_behaviour` has filled in this number of ``rows``."""
    return f"behaviour log-probs of {rows:,} samples were computed with the policy before training (behaviour: current)"


Collect = Callable[[int], Buffer]
"""Returns a buffer of fresh rows, given the number of batches so far: a `rlzoo.rollout.Collector`, for instance."""


def train(
    policy: Policy,
    objective: Objective,
    source: Buffer | Collect | Source | Sequence[Buffer | Collect | Source],
    settings: Training | None = None,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    folder: Path | None = None,
    checkpoints: Path | None = None,
) -> TrainingRecord:
    """Train ``policy`` in place: offline on a buffer, or online on samples of a `rlzoo.rollout.Collector`.

    ``source`` is a buffer, whose missing inputs are computed with ``policy`` before training; a function that returns a
    fresh buffer, given the number of batches so far; a `Source`; or, for a composite, one of these per component.
    ``folder`` is for trackers; an interrupted run resumes from the newest checkpoint in ``checkpoints``. Under
    `accelerate launch`, all processes call this and share each batch.
    Raises UserError if rows lack an input, if a view of the objective is empty, and for rows that the model cannot
    take.
    """
    settings, components, record = settings or Training(), objective.components, TrainingRecord()
    torch.manual_seed(seed)
    if isinstance(source, Buffer):
        sources: list[Source] = [*_of_buffer(policy, objective, source, settings, seed, record)]
    else:
        given = list(source) if isinstance(source, Sequence) else [source]
        check_sources(objective, given)
        views, sources = views_of(objective), []
        split = zip(given, components, views, shares(settings.batch_size, len(views)), seeds(views, seed), strict=True)
        for one, component, (which, options), size, own in split:
            if isinstance(one, Buffer):
                smaller = settings.model_copy(update={"batch_size": size})
                sources += _of_buffer(policy, component.objective, one, smaller, own, record)
            elif isinstance(one, Source):
                sources.append(one)
            elif callable(one):
                sources.append(FreshSource(one, which, **options))
            else:
                raise UserError(
                    f"a {type(one).__name__} is not a source: give a buffer, a Collector, or a source of your own"
                )
    trainer = Trainer(
        policy, objective, sources, settings, callbacks, folder=folder, record=record, checkpoints=checkpoints
    )
    return trainer.run()


def _of_buffer(
    policy: Policy, objective: Objective, buffer: Buffer, settings: Training, seed: int, record: TrainingRecord
) -> list[BufferSource]:
    """One source per component of an objective, all on one buffer, whose missing inputs are computed."""
    check_buffer(policy, buffer)
    if settings.behaviour == "current" and any(
        component.objective.at_sampling_temperature for component in objective.components
    ):
        buffer, computed = with_behaviour(buffer, policy, settings.token_budget)
        record.events += [behaviour_event(len(computed))] if computed else []
    sources = buffer_sources(buffer, views_of(objective), settings.batch_size, seed)
    if missing := lacking(buffer, objective, again=True):
        buffer = with_inputs(buffer, missing, policy, settings.token_budget)
        sources = buffer_sources(buffer, views_of(objective), settings.batch_size, seed)
    return sources
