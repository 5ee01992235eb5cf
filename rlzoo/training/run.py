"""Training on a fixed buffer, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rlzoo.bad_rows import BadRows
from rlzoo.buffers import Buffer
from rlzoo.config import Training
from rlzoo.objective import Objective
from rlzoo.policy import Policy
from rlzoo.policy.policy import score_rows
from rlzoo.training.batches import buffer_sources, views_of
from rlzoo.training.record import TrainingRecord
from rlzoo.training.trainer import Callback, Trainer
from rlzoo.types import Need


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


def with_reference(buffer: Buffer, policy: Policy, token_budget: int = 8192) -> Buffer:
    """The buffer with log-probs of ``policy`` as the reference, computed once.

    Rows that were sampled at a temperature other than 1 get them at that temperature too.
    """
    heats = buffer.numbers("temperature")
    values: list[np.ndarray] = []
    tempered: list[np.ndarray | None] = []
    for rows in buffer.ids():
        values += [np.asarray(logp, np.float32) for logp in score_rows(policy, rows, token_budget)]
        some = heats[len(tempered) : len(tempered) + len(rows)]
        hot = np.flatnonzero(some != 1.0).tolist()
        scores = score_rows(policy, [rows[i] for i in hot], token_budget, some[hot].tolist())
        found = dict(zip(hot, scores, strict=True))
        tempered += [np.asarray(found[i], np.float32) if i in found else None for i in range(len(rows))]
    return buffer.with_reference_logp(values, tempered)


def lacks_reference(buffer: Buffer, *objectives: Objective) -> bool:
    """Whether rows have no log-probs of the frozen reference where one of the objectives takes them."""
    parts = [part.objective for objective in objectives for part in objective.parts]
    needy = [objective for objective in parts if Need.REFERENCE in objective.requires]
    if needy and not buffer.is_complete("reference_logp"):
        return True
    if not any(objective.at_sampling_temperature for objective in needy):
        return False
    hot = buffer.numbers("temperature") != 1.0
    return bool((hot & ~buffer.has("tempered_reference_logp")).any())


def with_behaviour(buffer: Buffer, policy: Policy, token_budget: int = 8192) -> tuple[Buffer, list[int]]:
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


def train(
    policy: Policy,
    objective: Objective,
    buffer: Buffer,
    settings: Training | None = None,
    seed: int = 0,
    callbacks: Sequence[Callback] = (),
    folder: Path | None = None,
    checkpoints: Path | None = None,
) -> TrainingRecord:
    """Train ``policy`` in place on a fixed buffer; missing reference log-probs are those of ``policy`` as it comes.

    ``folder`` is for trackers; from a folder of ``checkpoints`` a run that was stopped resumes. Under `accelerate
    launch` all processes call this, and each takes its share of a batch.
    Raises UserError where the buffer lacks what the objective learns from, and for a row that the model cannot take.
    """
    settings = settings or Training()
    check_buffer(policy, buffer)
    torch.manual_seed(seed)
    record = TrainingRecord()
    if settings.behaviour == "current" and any(part.objective.at_sampling_temperature for part in objective.parts):
        buffer, scored = with_behaviour(buffer, policy, settings.token_budget)
        record.events += [scored_event(len(scored))] if scored else []
    sources = buffer_sources(buffer, views_of(objective), settings.batch_size, seed)
    # stored log-probs may be another policy's, and those of mismatched rows are of this one
    mismatched = {Need.REFERENCE, Need.MISMATCHED} <= objective.requires
    if mismatched or lacks_reference(buffer, objective):
        buffer = with_reference(buffer, policy, settings.token_budget)
        sources = buffer_sources(buffer, views_of(objective), settings.batch_size, seed)
    trainer = Trainer(
        policy, objective, sources, settings, callbacks, folder=folder, record=record, checkpoints=checkpoints
    )
    return trainer.run()
