"""What objectives share: base classes over groups of samples and over pairs, and importance ratios."""

from rlzoo.bases.groups import (
    ClippedPolicyGradient,
    EpsilonClipped,
    LogRatioRegression,
    OffPolicyGradient,
    PolicyGradient,
)
from rlzoo.bases.pairs import (
    PairLoss,
    PairObjective,
    ReferencePairObjective,
    Rows,
    check_smoothing,
    length,
    logistic,
    of_margin,
    total,
)

__all__ = [
    "ClippedPolicyGradient",
    "EpsilonClipped",
    "LogRatioRegression",
    "OffPolicyGradient",
    "PairLoss",
    "PairObjective",
    "PolicyGradient",
    "ReferencePairObjective",
    "Rows",
    "check_smoothing",
    "length",
    "logistic",
    "of_margin",
    "total",
]
