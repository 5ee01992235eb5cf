"""The variance analyzer: how noisy an objective's gradient is, per token and over the data."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlzoo.variance.analyzer import analyze_variance
    from rlzoo.variance.classes import register_token_classes
    from rlzoo.variance.probe import VarianceProbe

_HOMES = {"VarianceProbe": "probe", "analyze_variance": "analyzer", "register_token_classes": "classes"}

__all__ = ["VarianceProbe", "analyze_variance", "register_token_classes"]


def __getattr__(name: str) -> Any:
    """Import names that need torch only when they are used: a report is read without."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rlzoo.variance' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rlzoo.variance.{_HOMES[name]}"), name)
