"""Rewards: finding them by name, calling them, and isolating them in their own processes."""

from rlzoo.reward.finding import (
    CompositeReward,
    OnError,
    Reward,
    Score,
    failed,
    get_reward,
    list_rewards,
    missing_column,
    one_by_one,
    register_reward,
)

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
