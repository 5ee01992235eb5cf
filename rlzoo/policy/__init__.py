"""A causal language model as a policy: log-probs and token statistics, a critic, a frozen reference."""

from rlzoo.policy.loading import load_policy
from rlzoo.policy.policy import Policy, Sequences, TokenScores

__all__ = ["Policy", "Sequences", "TokenScores", "load_policy"]
