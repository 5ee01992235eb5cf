"""Experiments: their settings, the validation of these, and the files that hold them."""

from rlzoo.config.files import (
    EXPERIMENTS,
    lay,
    list_experiments,
    load_experiment,
    read_yaml,
)
from rlzoo.config.settings import (
    BASE,
    Algorithm,
    Budget,
    EvaluationSettings,
    Experiment,
    Lora,
    Packing,
    Rollouts,
    Sampling,
    Scoring,
    TokenBudget,
    Training,
)
from rlzoo.config.sources import Benchmark, OnBadRow, Positive, ProblemSource, TableSource
from rlzoo.config.stages import WARM_UP, WarmUp
from rlzoo.config.validation import validated

__all__ = [
    "BASE",
    "EXPERIMENTS",
    "WARM_UP",
    "Algorithm",
    "Benchmark",
    "Budget",
    "EvaluationSettings",
    "Experiment",
    "Lora",
    "OnBadRow",
    "Packing",
    "Positive",
    "ProblemSource",
    "Rollouts",
    "Sampling",
    "Scoring",
    "TableSource",
    "TokenBudget",
    "Training",
    "WarmUp",
    "lay",
    "list_experiments",
    "load_experiment",
    "read_yaml",
    "validated",
]
