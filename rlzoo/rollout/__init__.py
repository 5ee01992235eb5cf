"""Sampling completions and judging them."""

from rlzoo.config import Sampling
from rlzoo.policy import Policy
from rlzoo.rollout.rollouts import collect_rollouts, cut_short, mismatch, unscored
from rlzoo.rollout.sampler import Sample, Sampler, TransformersSampler
from rlzoo.rollout.vllm import VLLMSampler, VLLMServerSampler

__all__ = [
    "Sample",
    "Sampler",
    "TransformersSampler",
    "VLLMSampler",
    "VLLMServerSampler",
    "collect_rollouts",
    "cut_short",
    "mismatch",
    "sampler_of",
    "unscored",
]


def sampler_of(policy: Policy, settings: Sampling) -> Sampler:
    """The sampler that the settings ask for. Raises UserError where it cannot be had."""
    if settings.engine == "transformers":
        return TransformersSampler(policy)
    if settings.url is not None:
        return VLLMServerSampler(policy, settings.url)
    return VLLMSampler(policy, **settings.engine_options)
