"""Training in one call, and what a fixed buffer needs for it."""

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
from rlzoo.policy import Assembler, MicroBatches, Models, Policy, score_rows
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
    """Raise UserError naming a row (from 1) without tokens, with one that has no embedding, or more than positions."""
    empty = [row for name in ("prompt_ids", "completion_ids") for row in np.flatnonzero(buffer.tokens(name) == 0)]
    doubtful = int(empty[0]) if empty else None
    if doubtful is None and (found := buffer.outside(policy.vocabulary)) is not None:
        doubtful = found[0]
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
    """The buffer with the values of stored inputs, computed once; ``initial`` is the initial policy, else ``policy``.

    Rows that were sampled at a temperature other than 1 get them at that temperature too.
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
    """`with_inputs` for log-probs of ``policy`` as the frozen reference."""
    return with_inputs(buffer, [Reference()], policy, token_budget)


def stored_inputs(objectives: Iterable[Objective]) -> list[Input]:
    """The stored inputs of objectives that can be computed, each once."""
    parts = (part.objective for whole in objectives for part in whole.parts)
    wanted = (one for objective in parts for one in objective.requires)
    return list(dict.fromkeys(one for one in wanted if one.stage is Stage.STORED and one.is_computed))


def lacking(buffer: Buffer, *objectives: Objective, again: bool = False) -> list[Input]:
    """The stored inputs of objectives that can be computed and that rows of the buffer have no value of.

    With ``again`` also those with a model that a later input of the same objective scores with: stored values may be
    another model's, and the two must agree.
    """
    found: dict[Input, None] = {}
    for objective in (part.objective for whole in objectives for part in whole.parts):
        later = {name for one in objective.requires if one.stage is not Stage.STORED for name in one.models()}
        for one in objective.requires:
            if one.stage is Stage.STORED and one.is_computed:
                stale = again and bool(later.intersection(one.models()))
                if stale or buffer.lacks(one.column, objective.at_sampling_temperature):
                    found[one] = None
    return list(found)


def with_behaviour(buffer: Buffer, policy: Policy, token_budget: TokenBudget = 8192) -> tuple[Buffer, list[int]]:
    """The buffer with log-probs of ``policy`` as the behaviour's in samples that have none, and the rows of those."""
    sampled = np.array(buffer.column("source")) != "demonstration"
    lacks = ~buffer.has("behaviour_logp") & sampled
    if not lacks.any():  # nothing of a large buffer is read into memory
        return buffer, []
    known, heats, start = buffer.column("behaviour_logp"), buffer.numbers("temperature"), 0
    for rows in buffer.ids():
        own = np.flatnonzero(lacks[start : start + len(rows)])
        scores = score_rows(policy, [rows[i] for i in own], token_budget, heats[start + own].tolist())
        for i, logp in zip(own, scores, strict=True):
            known[start + i] = logp
        start += len(rows)
    return buffer.with_behaviour_logp(known), np.flatnonzero(lacks).tolist()


def scored_event(rows: int) -> str:
    """What a run records about ``rows`` that `with_behaviour` scored."""
    return f"behaviour log-probs of {rows:,} samples were scored with the policy before training (behaviour: current)"


Collect = Callable[[int], Buffer]
"""Makes a buffer of fresh rows for a batch, given how many batches there were: a `rlzoo.rollout.Collector`, say."""


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
    """Train ``policy`` in place, offline on a buffer or online on what a `rlzoo.rollout.Collector` samples.

    ``source`` is a buffer, whose rows get what they lack from ``policy`` as it comes; or any function of the number of
    batches so far that makes a fresh buffer; or any `Source`; or, for the parts of a composite, one of these for each.
    ``folder`` is for trackers; from a folder of ``checkpoints`` a run that was stopped resumes. Under `accelerate
    launch` all processes call this, and each takes its share of a batch.
    Raises UserError where rows lack what the objective learns from, and for a row that the model cannot take.
    """
    settings, parts, record = settings or Training(), objective.parts, TrainingRecord()
    torch.manual_seed(seed)
    if isinstance(source, Buffer):
        sources: list[Source] = [*_of_buffer(policy, objective, source, settings, seed, record)]
    else:
        given = list(source) if isinstance(source, Sequence) else [source]
        check_sources(objective, given)
        views, sources = views_of(objective), []
        split = zip(given, parts, views, shares(settings.batch_size, len(views)), seeds(views, seed), strict=True)
        for one, part, (which, options), size, own in split:
            if isinstance(one, Buffer):
                smaller = settings.model_copy(update={"batch_size": size})
                sources += _of_buffer(policy, part.objective, one, smaller, own, record)
            elif isinstance(one, Source):
                sources.append(one)
            elif callable(one):
                sources.append(FreshSource(one, which, **options))
            else:
                raise UserError(
                    f"a {type(one).__name__} is no source: give a buffer, a Collector, or a source of your own"
                )
    trainer = Trainer(
        policy, objective, sources, settings, callbacks, folder=folder, record=record, checkpoints=checkpoints
    )
    return trainer.run()


def _of_buffer(
    policy: Policy, objective: Objective, buffer: Buffer, settings: Training, seed: int, record: TrainingRecord
) -> list[BufferSource]:
    """A source for each part of an objective from one buffer, with what its rows lack."""
    check_buffer(policy, buffer)
    if settings.behaviour == "current" and any(part.objective.at_sampling_temperature for part in objective.parts):
        buffer, scored = with_behaviour(buffer, policy, settings.token_budget)
        record.events += [scored_event(len(scored))] if scored else []
    sources = buffer_sources(buffer, views_of(objective), settings.batch_size, seed)
    if missing := lacking(buffer, objective, again=True):
        buffer = with_inputs(buffer, missing, policy, settings.token_budget)
        sources = buffer_sources(buffer, views_of(objective), settings.batch_size, seed)
    return sources
