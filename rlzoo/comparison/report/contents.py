"""The sections of the report of a comparison, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rlzoo.comparison.report import (
    clipping,
    completions,
    endings,
    learned,
    method,
    noise,
    reported,
    results,
    retention,
    stages,
    training,
)
from rlzoo.comparison.report.schema import FinishedRun
from rlzoo.document import Block, Heading

Section = Callable[[FinishedRun, str], Iterator[Block]]
"""The blocks of a section, given a run and the baseline of its differences: none where the run has nothing for it."""
SECTIONS: tuple[Section, ...] = (
    results.answers,
    results.scores,
    results.differences,
    learned.learned_and_kept,
    results.robustness,
    stages.before_and_after,
    reported.reported,
    results.further,
    retention.retention,
    training.curves,
    training.loss,
    endings.endings,
    clipping.clipping,
    training.token_probabilities,
    noise.gradient_variance,
    training.costs,
    training.learning_rates,
    training.events,
    completions.samples,
    method.method,
)


def contents(run: FinishedRun, baseline: str | None) -> Iterator[Block]:
    """The blocks of the report, in order. Raises UserError for an unknown baseline or bad outcomes."""
    yield Heading(f"Comparison: {run.results.experiment}", level=1)
    for section in SECTIONS:
        yield from section(run, run.results.baseline(baseline))
