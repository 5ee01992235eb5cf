"""What objectives share: base classes over groups of samples and over pairs, and importance ratios."""

from rlzoo.bases.groups import ClippedPolicyGradient, LogRatioRegression, OffPolicyGradient, PolicyGradient
from rlzoo.bases.pairs import (
    PairLoss,
    PairObjective,
    Rows,
    check_smoothing,
    length,
    logistic,
    of_margin,
    total,
)

__all__ = [
    "ClippedPolicyGradient",
    "LogRatioRegression",
    "OffPolicyGradient",
    "PairLoss",
    "PairObjective",
    "PolicyGradient",
    "Rows",
    "check_smoothing",
    "length",
    "logistic",
    "of_margin",
    "total",
]
