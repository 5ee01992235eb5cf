"""The speed of a comparison: measured on this machine for a few seconds, or estimated from a GPU's data sheet."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch

from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.problems import encode_problems, load_problems
from rlzoo.comparison.forecast import Forecast
from rlzoo.comparison.shared_buffer import demonstrations_of
from rlzoo.config import Experiment
from rlzoo.errors import unknown
from rlzoo.objective import Objective
from rlzoo.policy.loading import load_for
from rlzoo.rollout import sampler_of
from rlzoo.training import train
from rlzoo.types import Coefficients, TokenBatch, Trajectory

PROMPTS = 32
"""The number of prompts for measuring the speed of training and of sampling."""
OF_TRAINING, OF_SAMPLING = 0.4, 0.1
"""The assumed fractions of a GPU's peak bf16 throughput that training and sampling with vLLM reach."""


@dataclass(frozen=True)
class Card:
    """A GPU according to its data sheet."""

    flops: float
    """Peak FLOPs per second of dense bf16 matrix products."""
    bytes: float
    """The size of its memory, in bytes."""


GPUS = {
    "a10": Card(125e12, 24e9),
    "a100-40gb": Card(312e12, 40e9),
    "a100-80gb": Card(312e12, 80e9),
    "b200": Card(2250e12, 180e9),
    "h100": Card(989e12, 80e9),
    "h200": Card(989e12, 141e9),
    "l4": Card(121e12, 24e9),
    "l40s": Card(362e12, 48e9),
    "mi300x": Card(1307e12, 192e9),
    "rtx-4090": Card(165e12, 24e9),
}
"""GPUs by name. Source: the vendors' data sheets, without sparsity."""


@dataclass(frozen=True)
class Speed:
    """The speed of one worker."""

    flops: float
    """FLOPs per second of forward and backward passes."""
    tokens: float
    """Sampled tokens per second."""
    sample_tokens: float | None = None
    """The mean length of the base model's samples; None if it was not measured."""


def speed_of_gpu(name: str, forecast: Forecast) -> Speed:
    """The estimated speed of a GPU. Raises UserError for an unknown name."""
    card = card_of(name)
    return Speed(OF_TRAINING * card.flops, OF_SAMPLING * card.flops / forecast.flops_per_token)


def card_of(name: str) -> Card:
    """The GPU with this name. Raises UserError for an unknown one."""
    if name.lower() not in GPUS:
        raise unknown("GPU", name, GPUS)
    return GPUS[name.lower()]


class _Plain(Objective):
    """The likelihood of demonstrations: one forward and one backward pass."""

    name: ClassVar[str] = "likelihood"

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(torch.ones_like(batch.logp))


def measured_speed(experiment: Experiment) -> Speed:
    """The speed on this machine of two training steps on a few rows and of sampling the base model, after a first one.

    For an experiment with a warm-up, the model before it is measured: its speed is the same, but the length of its
    samples is not, and is left out. Raises UserError as `load_policy` and `load_problems` do.
    """
    policy = load_for(experiment.model, experiment.training)
    problems, bad = load_problems(experiment.train)[:PROMPTS], BadRows(experiment.train.bad_rows)
    prompts = [one.ids for one in encode_problems(policy.tokenizer, problems, bad)]
    samples = experiment.evaluation
    sampler = sampler_of(policy, samples)
    sampler.sample(prompts[:1], samples, 0)
    started = time.perf_counter()
    drawn = [len(one.ids) for some in sampler.sample(prompts, samples, 0) for one in some]
    sampled = time.perf_counter() - started
    rows = list(islice(demonstrations_of(policy, problems, experiment.training, bad), PROMPTS))
    rows = rows or [Trajectory("", "", ids, ids, str(place)) for place, ids in enumerate(prompts)]
    settings: dict[str, Any] = {
        "batch_size": len(rows),
        "checkpoint_seconds": None,
        "trackers": (),
        "learning_rate": 1e-9,
    }
    brief = experiment.training.model_copy(update={**settings, "steps": 1})
    buffer = OfflineBuffer.from_trajectories(rows)
    train(policy, _Plain(), buffer, brief)
    costs = train(policy, _Plain(), buffer, brief.model_copy(update={"steps": 2})).costs
    length = sum(drawn) / len(drawn) if experiment.warm_up is None else None
    return Speed(costs.flops / costs.wall_seconds, sum(drawn) / sampled, length)
