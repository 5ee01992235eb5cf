"""What an experiment says: its settings, how they are checked, and the files that hold them."""

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
    Benchmark,
    EvaluationSettings,
    Experiment,
    Judging,
    Lora,
    OnBadRow,
    Positive,
    ProblemSource,
    Rollouts,
    Sampling,
    TableSource,
    Training,
)
from rlzoo.config.validation import validated

__all__ = [
    "BASE",
    "EXPERIMENTS",
    "Algorithm",
    "Benchmark",
    "EvaluationSettings",
    "Experiment",
    "Judging",
    "Lora",
    "OnBadRow",
    "Positive",
    "ProblemSource",
    "Rollouts",
    "Sampling",
    "TableSource",
    "Training",
    "lay",
    "list_experiments",
    "load_experiment",
    "read_yaml",
    "validated",
]
