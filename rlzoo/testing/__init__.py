"""The contract of objectives and rewards, for plug-in authors: one call checks it, an AssertionError says what failed.

from rlzoo.testing import check_objective

def test_mine() -> None:
    check_objective("mine.py:Mine", loss)
"""

from rlzoo.testing.batches import random_batch
from rlzoo.testing.logits import LossInLogits
from rlzoo.testing.objectives import Loss, check_objective
from rlzoo.testing.rewards import check_reward

__all__ = ["Loss", "LossInLogits", "check_objective", "check_reward", "random_batch"]
