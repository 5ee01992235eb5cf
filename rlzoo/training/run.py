"""Training on a fixed buffer, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from rlzoo.buffers import Buffer
from rlzoo.config import Training
from rlzoo.objective import Objective
from rlzoo.policy import Policy
from rlzoo.policy.policy import score_rows
from rlzoo.training.batches import buffer_sources, views_of
from rlzoo.training.record import TrainingRecord
from rlzoo.training.trainer import Callback, Trainer
from rlzoo.types import Need


def with_reference(buffer: Buffer, policy: Policy, token_budget: int = 8192) -> Buffer:
    """The buffer with log-probs of ``policy`` as the reference, computed once."""
    values = [np.asarray(logp, np.float32) for rows in buffer.ids() for logp in score_rows(policy, rows, token_budget)]
    return buffer.with_reference_logp(values)


def with_behaviour(buffer: Buffer, policy: Policy, token_budget: int = 8192) -> tuple[Buffer, list[int]]:
    """The buffer with log-probs of ``policy`` as the behaviour's in samples that have none, and the rows of those."""
    known = buffer.column("behaviour_logp")
    sources = zip(buffer.column("source"), known, strict=True)
    lacking = [index for index, (source, logp) in enumerate(sources) if source != "demonstration" and logp is None]
    rows = [(row.prompt_ids, row.completion_ids) for row in (buffer[index] for index in lacking)]
    for index, logp in zip(lacking, score_rows(policy, rows, token_budget), strict=True):
        known[index] = logp
    return (buffer.with_behaviour_logp(known) if lacking else buffer), lacking


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

    ``folder`` is for trackers; from a folder of ``checkpoints`` a run that was stopped goes on. Under `accelerate
    launch` all processes call this, and each takes its share of a batch.
    Raises UserError where the buffer lacks what the objective learns from.
    """
    settings = settings or Training()
    torch.manual_seed(seed)
    record = TrainingRecord()
    if settings.behaviour == "current" and Need.BEHAVIOUR in objective.requires:
        buffer, scored = with_behaviour(buffer, policy, settings.token_budget)
        record.events += [scored_event(len(scored))] if scored else []
    sources = buffer_sources(buffer, views_of(objective), settings.batch_size, seed)
    # stored log-probs may be another policy's, and those of mismatched rows are of this one
    known = buffer.is_complete("reference_logp") and Need.MISMATCHED not in objective.requires
    if Need.REFERENCE in objective.requires and not known:
        buffer = with_reference(buffer, policy, settings.token_budget)
        sources = buffer_sources(buffer, views_of(objective), settings.batch_size, seed)
    trainer = Trainer(
        policy, objective, sources, settings, callbacks, folder=folder, record=record, checkpoints=checkpoints
    )
    return trainer.run()
