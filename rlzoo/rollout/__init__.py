"""Sampling completions from a policy, and scoring them with a reward."""

from rlzoo.rollout.collector import Collector
from rlzoo.rollout.rollouts import collect_rollouts, cut_short, mismatch, scorable, unscored
from rlzoo.rollout.sampler import (
    Sample,
    Sampler,
    TransformersSampler,
    engine_of,
    list_samplers,
    register_sampler,
    sampler_class,
    sampler_of,
)
from rlzoo.rollout.vllm import VLLMSampler, VLLMServerSampler

__all__ = [
    "Collector",
    "Sample",
    "Sampler",
    "TransformersSampler",
    "VLLMSampler",
    "VLLMServerSampler",
    "collect_rollouts",
    "cut_short",
    "engine_of",
    "list_samplers",
    "mismatch",
    "register_sampler",
    "sampler_class",
    "sampler_of",
    "scorable",
    "unscored",
]
