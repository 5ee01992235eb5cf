"""Experiments: their settings, the validation of these, and the files that hold them."""

from rlzoo.config.files import EXPERIMENTS, list_experiments, load_experiment
from rlzoo.config.reading import lay, read_yaml
from rlzoo.config.settings import (
    BASE,
    Algorithm,
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
from rlzoo.config.sources import Benchmark, OnBadRow, ProblemSource, Reported, TableSource
from rlzoo.config.suites import get_suite, list_suites
from rlzoo.config.validation import Positive, validated

__all__ = [
    "BASE",
    "EXPERIMENTS",
    "Algorithm",
    "Benchmark",
    "EvaluationSettings",
    "Experiment",
    "Lora",
    "OnBadRow",
    "Packing",
    "Positive",
    "ProblemSource",
    "Reported",
    "Rollouts",
    "Sampling",
    "Scoring",
    "TableSource",
    "TokenBudget",
    "Training",
    "get_suite",
    "lay",
    "list_experiments",
    "list_suites",
    "load_experiment",
    "read_yaml",
    "validated",
]
