"""A causal language model as a policy: log-probs and inputs of its forward pass, micro-batches, frozen references."""

from rlzoo.policy.assembly import Assembler, Models
from rlzoo.policy.loading import load_policy
from rlzoo.policy.microbatches import MicroBatches, score_rows
from rlzoo.policy.policy import Policy, TokenScores
from rlzoo.policy.sequences import Sequences

__all__ = ["Assembler", "MicroBatches", "Models", "Policy", "Sequences", "TokenScores", "load_policy", "score_rows"]
