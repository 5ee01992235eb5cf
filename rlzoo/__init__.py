"""rlzoo: an offline-RL algorithm zoo that compares fine-tuning objectives of language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlzoo.buffers import Importer, OfflineBuffer, RolloutBuffer, import_log, list_importers, register_importer
    from rlzoo.comparison.runner import compare
    from rlzoo.evaluation import Metric, evaluate, list_metrics, register_metric
    from rlzoo.inputs import Input
    from rlzoo.objective import Objective, get_objective, list_objectives, register, surrogate
    from rlzoo.policy import Policy, load_policy
    from rlzoo.reward import get_reward, list_rewards, register_reward
    from rlzoo.rollout import Collector, Sampler, list_samplers, register_sampler
    from rlzoo.training import train
    from rlzoo.types import Coefficients, Selection, Selector, TokenBatch, list_views, register_view
    from rlzoo.variance import analyze_variance, register_token_classes

_HOMES = {
    "Coefficients": "rlzoo.types",
    "Collector": "rlzoo.rollout",
    "Importer": "rlzoo.buffers",
    "Input": "rlzoo.inputs",
    "Metric": "rlzoo.evaluation",
    "Objective": "rlzoo.objective",
    "OfflineBuffer": "rlzoo.buffers",
    "Policy": "rlzoo.policy",
    "RolloutBuffer": "rlzoo.buffers",
    "Sampler": "rlzoo.rollout",
    "Selection": "rlzoo.types",
    "Selector": "rlzoo.types",
    "TokenBatch": "rlzoo.types",
    "analyze_variance": "rlzoo.variance",
    "compare": "rlzoo.comparison.runner",
    "evaluate": "rlzoo.evaluation",
    "get_objective": "rlzoo.objective",
    "get_reward": "rlzoo.reward",
    "import_log": "rlzoo.buffers",
    "list_importers": "rlzoo.buffers",
    "list_metrics": "rlzoo.evaluation",
    "list_objectives": "rlzoo.objective",
    "list_rewards": "rlzoo.reward",
    "list_samplers": "rlzoo.rollout",
    "list_views": "rlzoo.types",
    "load_policy": "rlzoo.policy",
    "register": "rlzoo.objective",
    "register_importer": "rlzoo.buffers",
    "register_metric": "rlzoo.evaluation",
    "register_reward": "rlzoo.reward",
    "register_sampler": "rlzoo.rollout",
    "register_token_classes": "rlzoo.variance",
    "register_view": "rlzoo.types",
    "surrogate": "rlzoo.objective",
    "train": "rlzoo.training",
}

__all__ = [
    "Coefficients",
    "Collector",
    "Importer",
    "Input",
    "Metric",
    "Objective",
    "OfflineBuffer",
    "Policy",
    "RolloutBuffer",
    "Sampler",
    "Selection",
    "Selector",
    "TokenBatch",
    "analyze_variance",
    "compare",
    "evaluate",
    "get_objective",
    "get_reward",
    "import_log",
    "list_importers",
    "list_metrics",
    "list_objectives",
    "list_rewards",
    "list_samplers",
    "list_views",
    "load_policy",
    "register",
    "register_importer",
    "register_metric",
    "register_reward",
    "register_sampler",
    "register_token_classes",
    "register_view",
    "surrogate",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import public names only when they are used: the command line answers before torch is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rlzoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
