"""The variance analyzer: how noisy an objective's gradient is, per token and over the data."""

from rlzoo.variance.analyzer import analyze_variance
from rlzoo.variance.classes import register_token_classes
from rlzoo.variance.probe import VarianceProbe

__all__ = ["VarianceProbe", "analyze_variance", "register_token_classes"]
