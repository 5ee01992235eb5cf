"""Sampling completions and judging them."""

from rlzoo.rollout.rollouts import collect_rollouts
from rlzoo.rollout.sampler import Sample, Sampler, TransformersSampler

__all__ = ["Sample", "Sampler", "TransformersSampler", "collect_rollouts"]
