"""The sections of the report of a comparison, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rlzoo.comparison.report import completions, method, results, training
from rlzoo.comparison.report.schema import FinishedRun
from rlzoo.config import BASE
from rlzoo.document import Block, Heading, Paragraph

Section = Callable[[FinishedRun, str], Iterator[Block]]
"""The blocks of a section, given a run and the baseline of its differences: none where the run has nothing for it."""
SECTIONS: tuple[Section, ...] = (
    results.answers,
    results.scores,
    results.differences,
    results.further,
    training.curves,
    training.token_probabilities,
    training.costs,
    training.learning_rates,
    training.events,
    completions.samples,
    method.method,
)


def contents(run: FinishedRun, baseline: str | None) -> Iterator[Block]:
    """The blocks of the report, in order. Raises UserError for an unknown baseline or bad outcomes."""
    yield Heading(f"Comparison: {run.results.experiment}", level=1)
    if run.results.description:
        yield Paragraph(run.results.description)
    for section in SECTIONS:
        yield from section(run, baseline_of(run, baseline))


def baseline_of(run: FinishedRun, asked: str | None) -> str:
    """The requested algorithm, if any of its cells succeeded; else the first of several, or the base model."""
    algorithms = run.results.algorithms
    failed = {failure.algorithm for failure in run.results.failed or []} - set(algorithms)
    if asked is not None and asked not in failed:
        return asked
    return algorithms[0] if len(algorithms) > 1 else BASE
