"""Rewards: finding them by name, calling them, and isolating them in separate processes."""

from rlzoo.reward.calling import missing_column
from rlzoo.reward.finding import get_reward, list_rewards, register_reward
from rlzoo.reward.scoring import CompositeReward, OnError, Reward, Score, failed, one_by_one

__all__ = [
    "CompositeReward",
    "OnError",
    "Reward",
    "Score",
    "failed",
    "get_reward",
    "list_rewards",
    "missing_column",
    "one_by_one",
    "register_reward",
]
