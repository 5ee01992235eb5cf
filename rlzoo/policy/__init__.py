"""A causal language model as a policy: log-probs and inputs of its forward pass, micro-batches, frozen references."""

from rlzoo.policy.assembly import Assembler, Models
from rlzoo.policy.loading import load_policy
from rlzoo.policy.microbatches import FirstPass, MicroBatches, log_probs
from rlzoo.policy.policy import ForwardPass, Policy
from rlzoo.policy.sequences import Sequences

__all__ = [
    "Assembler",
    "FirstPass",
    "ForwardPass",
    "MicroBatches",
    "Models",
    "Policy",
    "Sequences",
    "load_policy",
    "log_probs",
]
