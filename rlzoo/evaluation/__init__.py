"""Evaluation of a policy on a problem set: a table of metrics, and the samples behind them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlzoo.evaluation.metrics import (
    Metric,
    ProblemSamples,
    Total,
    get_metric,
    get_metrics,
    list_metrics,
    mean_over_benchmarks,
    metric_table,
    pass_at_k,
    register_metric,
)

if TYPE_CHECKING:
    from rlzoo.evaluation.evaluation import Evaluation, evaluate

__all__ = [
    "Evaluation",
    "Metric",
    "ProblemSamples",
    "Total",
    "evaluate",
    "get_metric",
    "get_metrics",
    "list_metrics",
    "mean_over_benchmarks",
    "metric_table",
    "pass_at_k",
    "register_metric",
]


def __getattr__(name: str) -> Any:
    """Import names that need torch only when they are used."""
    if name not in ("Evaluation", "evaluate"):
        raise AttributeError(f"module 'rlzoo.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module("rlzoo.evaluation.evaluation"), name)
