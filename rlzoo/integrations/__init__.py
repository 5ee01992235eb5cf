"""Objectives in other trainers: transformers, TRL, verl, prime-rl and slime; and the variance of their gradients.

`rlzoo.integrations.verl`, ``prime_rl`` and ``slime`` have the functions for these stacks.
"""

from rlzoo.integrations.loss_function import compute_loss_func
from rlzoo.integrations.probe import VarianceCallback
from rlzoo.integrations.subclass import with_objective

__all__ = ["VarianceCallback", "compute_loss_func", "with_objective"]
