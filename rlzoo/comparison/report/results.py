"""The sections of a report that say what came out: the answer, results and differences."""

from __future__ import annotations

from collections.abc import Iterator

from rlzoo.comparison.outcomes import OVERALL, check_robustness, compare_to
from rlzoo.comparison.report import plots, stages, tables
from rlzoo.comparison.report.answer import answer, headline, unfinished
from rlzoo.comparison.report.differences import checks_explained, detectable, difference_table, robustness_table
from rlzoo.comparison.report.endings import rising_at_the_end
from rlzoo.comparison.report.schema import FinishedRun, Results
from rlzoo.config import BASE
from rlzoo.document import Block, Figure, Heading, Paragraph


def answers(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """The answer on the first benchmark, and one figure."""
    if run.results.overall:
        first = run.results.overall[0]
        yield Paragraph(headline(run.results, run.matrices, first), lead=True)
        yield _bars(run.results, first)
    if (failures := unfinished(run.results)) is not None:
        yield Paragraph(failures)
    if (warning := rising_at_the_end(run.results)) is not None:
        yield Paragraph(warning)
    if run.results.description:
        yield Paragraph(run.results.description)


def _bars(results: Results, benchmark: str) -> Figure:
    best = ", ".join(
        f"{name} {tables.percent(row.mean)} %"
        for name in (BASE, *results.algorithms)
        if (row := results.row(name, benchmark, "avg_at_k"))
    )
    return Figure(
        f"results-{results.overall.index(benchmark)}",
        plots.result_bars(results, benchmark),
        f"Bars of the results {tables.on(benchmark)}; {results.label('avg_at_k', benchmark)}: {best}.",
        f"Results {tables.on(benchmark)}: the mean of each metric over seeds and problems with its 95 % interval; the "
        "dashed line is the base model.",
        "Overlapping intervals do not mean that two algorithms are equal, because they share problems and seeds: the "
        "paired differences below answer that.",
    )


def scores(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """Mean and interval of every algorithm by each metric."""
    results = run.results
    yield Heading("Results")
    yield Paragraph(
        "Per cent correct, with 95 % intervals over further seeds and problems of the same kind. The best "
        f"algorithm in each metric is bold. {stages.start(results)}"
    )
    if (note := tables.online_counterparts(results)) is not None:
        yield Paragraph(note)
    yield Paragraph(_left_out(results))
    yield Paragraph(
        "avg@k at temperature 1 rewards an objective for sharpening the model's distribution, whether or "
        "not the model can solve more problems. Greedy decoding and pass@k do not: read the three "
        "together. Which two algorithms lead is known only from the results, so the p-value of their difference "
        "is corrected for all pairs."
    )
    for benchmark in results.overall:
        yield Heading(benchmark, level=3)
        yield Paragraph(answer(results, run.matrices, benchmark))
        if benchmark == OVERALL:
            yield Paragraph(
                "All benchmarks have equal weight, however many problems they have. The intervals are over further "
                "seeds and problems of the same kinds."
            )
        yield tables.result_table(results, benchmark)
        if benchmark != results.overall[0]:
            yield _bars(results, benchmark)


def _left_out(results: Results) -> str:
    """What the intervals do not cover."""
    rollouts = results.settings.get("rollouts")
    shared = not (isinstance(rollouts, dict) and rollouts.get("per_seed"))
    buffer = (
        "one buffer (samples that were drawn once; rollouts.per_seed draws them anew for each seed), " if shared else ""
    )
    return (
        f"What the intervals do not cover: every cell started from one base model, learned from {buffer}"
        "one set of training problems, and used one setting of every hyper-parameter that was not tuned. "
        "No interval here shows how much results vary with these."
    )


def differences(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """Paired differences from the baseline, corrected for their number."""
    rows = compare_to(run.outcomes, baseline, run.results.k)
    if not rows:
        return
    yield Heading(f"Differences from {baseline}")
    yield Paragraph(
        "Each algorithm's result minus the baseline's on the same problems and seeds, in percentage points. Each "
        "95 % interval is that of a single difference. p-values are corrected for the number of differences in the "
        "table (Holm); those below 0.05 are bold, and only these are called distinguishable from zero."
    )
    for index, benchmark in enumerate(run.results.overall):
        if not any(row["benchmark"] == benchmark for row in rows):
            continue
        yield Heading(benchmark, level=3)
        yield difference_table(rows, run.results, benchmark)
        yield Paragraph(detectable(rows, run.results, benchmark))
        yield Figure(
            f"differences-{index}",
            plots.differences(rows, run.results, benchmark),
            f"Paired differences from {baseline} {tables.on(benchmark)}, as in the table above.",
            f"Points to the right of the line are better than {baseline}, with the uncorrected 95 % interval of the "
            "paired difference; filled points are distinguishable from zero after Holm's correction.",
            "It does not show that a difference carries over to another model, data set or budget.",
        )


def robustness(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """Permutation tests, interquartile means and probabilities of improvement."""
    rows = check_robustness(run.outcomes, baseline, run.results.k)
    compared = [row for row in rows if "better" in row]
    if not compared:
        return
    yield Heading("Robustness")
    yield Paragraph(f"Checks that assume less than the intervals above, against {baseline}.")
    yield from map(Paragraph, checks_explained(max(row["seeds"] for row in compared)))
    for benchmark in run.results.overall:
        if any(row["benchmark"] == benchmark for row in compared):
            yield Heading(benchmark, level=3)
            yield robustness_table(rows, run.results, benchmark, baseline)


def further(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """The metrics that have no interval."""
    results = run.results
    found = {name: tables.further_table(results, name) for name in results.benchmarks}
    if not any(found.values()):
        return
    yield Heading("Further metrics")
    yield Paragraph(
        "Means over seeds, without intervals: they help to explain results, but do not show which algorithm is better. "
        "maj@k is the majority vote of k samples; the held-out log-likelihood is that of the benchmark's gold "
        "completions, if it has any."
    )
    for name, table in [*found.items(), ("mean over benchmarks", tables.further_table(results, None))]:
        if table is not None:
            yield Heading(name, level=3)
            yield table
        if name in results.benchmarks and (drawing := plots.likelihoods(results, name)) is not None:
            yield Figure(
                f"likelihood-{results.benchmarks.index(name)}",
                drawing,
                f"Accuracy {tables.on(name)} against the held-out log-likelihood of its gold completions.",
                f"Each algorithm's accuracy {tables.on(name)}, with its 95 % interval, against the log-likelihood of "
                "the gold completions; both are means over seeds.",
                "The log-likelihood has no interval here. It rewards reproducing the gold completion, of which other "
                "correct ones may exist.",
            )
