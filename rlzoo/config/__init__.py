"""Experiments: their settings, the validation of these, and the files that hold them."""

from rlzoo.config.analysis import LEAST_DRAWS, VarianceSettings
from rlzoo.config.files import EXPERIMENTS, list_experiments, load_experiment
from rlzoo.config.reading import lay, read_yaml
from rlzoo.config.sampling import Rollouts, Sampling, Scoring
from rlzoo.config.settings import (
    BASE,
    Algorithm,
    Budget,
    EvaluationSettings,
    Experiment,
    Lora,
    Packing,
    TokenBudget,
    Training,
)
from rlzoo.config.sources import Benchmark, OnBadRow, ProblemSource, Reported, TableSource
from rlzoo.config.stages import WARM_UP, WarmUp
from rlzoo.config.suites import get_suite, list_suites
from rlzoo.config.validation import Positive, Seed, Strict, validated

__all__ = [
    "BASE",
    "EXPERIMENTS",
    "LEAST_DRAWS",
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
    "Reported",
    "Rollouts",
    "Sampling",
    "Scoring",
    "Seed",
    "Strict",
    "TableSource",
    "TokenBudget",
    "Training",
    "VarianceSettings",
    "WarmUp",
    "get_suite",
    "lay",
    "list_experiments",
    "list_suites",
    "load_experiment",
    "read_yaml",
    "validated",
]
