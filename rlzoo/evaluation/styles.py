"""Accuracy by derivation style: what share of a policy's samples has each style, and how many of these are correct.

An objective that sharpens the distribution may gain by preferring the style in which the policy is most often right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlzoo.evaluation.metrics import Metric, ProblemSamples, Total
from rlzoo.worlds import arithmetic

StyleOf = Callable[[str], str | None]
"""The style of a completion, or None if it has none of the known ones."""
OTHER = "other"
"""The samples in no known style."""


def style_metrics(style_of: StyleOf, styles: Sequence[str]) -> list[Metric]:
    """Two metrics per style, and for samples in none of them (`OTHER`), with n samples of which n_s have the style s.

    ``share/s``: Σ n_s / Σ n over problems. ``accuracy/s``: Σ (correct ones among the n_s) / Σ n_s; a style that no
    sample has is left out. A list of metrics can be named in ``evaluation.metrics`` as one.
    """
    return [metric for style in (*styles, OTHER) for metric in (_share(style_of, style), _accuracy(style_of, style))]


def _share(style_of: StyleOf, style: str) -> Metric:
    def share(problem: ProblemSamples) -> Total:
        return Total(len(_correct(style_of, style, problem)), len(problem.samples))

    return Metric(f"share/{style}", share, f"share of {style}")


def _accuracy(style_of: StyleOf, style: str) -> Metric:
    def accuracy(problem: ProblemSamples) -> Total | None:
        correct = _correct(style_of, style, problem)
        return Total(sum(correct), len(correct)) if correct else None

    return Metric(f"accuracy/{style}", accuracy, f"accuracy of {style}")


def _correct(style_of: StyleOf, style: str, problem: ProblemSamples) -> list[bool]:
    """Whether each of the samples in a style is correct."""
    return [one["correct"] for one in problem.samples if (style_of(one["text"]) or OTHER) == style]


CHAIN_SUMS = style_metrics(arithmetic.style_of, arithmetic.STYLES)
"""The styles of the built-in chain sums."""
