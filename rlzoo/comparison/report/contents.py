"""The content of the report of a comparison, in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc
import yaml

from rlzoo.buffers.bad_rows import dropped_line
from rlzoo.comparison.outcomes import OVERALL, compare_to, result_matrices
from rlzoo.comparison.report import plots, stages, tables
from rlzoo.comparison.report.answer import answer
from rlzoo.comparison.report.schema import FinishedRun, Results
from rlzoo.config import BASE
from rlzoo.document import Block, Code, Figure, Heading, Paragraph

SHOWN_PROBLEMS = 3
SHOWN_CHARACTERS = 700


def contents(run: FinishedRun, baseline: str | None) -> Iterator[Block]:
    """The blocks of the report, in order. Raises UserError for an unknown baseline or bad outcomes."""
    results = run.results
    yield Heading(f"Comparison: {results.experiment}", level=1)
    if results.description:
        yield Paragraph(results.description)
    yield from _answers(run)
    yield from _results(results)
    yield from _differences(run, _baseline(results, baseline))
    yield from _further(results)
    yield from _curves(results)
    yield from _token_probabilities(results)
    yield from _costs(results)
    yield from _samples(run)
    yield from _method(results)


def _answers(run: FinishedRun) -> Iterator[Block]:
    matrices = result_matrices(run.outcomes, run.results.k)
    for benchmark in run.results.overall:
        yield Paragraph(answer(run.results, matrices, benchmark), lead=True)
    yield Paragraph(
        "avg@k at temperature 1 rewards an objective for sharpening the model's distribution, whether or "
        "not the model can solve more problems. Greedy decoding and pass@k do not: read the three "
        "together. Which two algorithms lead is known only from the results, so the p-value of their difference "
        "is corrected for all pairs."
    )


def _results(results: Results) -> Iterator[Block]:
    yield Heading("Results")
    yield Paragraph(
        "Per cent correct, with 95 % intervals over further seeds and problems of the same kind. The best "
        f"algorithm in each metric is bold. {stages.start(results)}"
    )
    yield Paragraph(_left_out(results))
    for index, benchmark in enumerate(results.overall):
        yield Heading(benchmark, level=3)
        if benchmark == OVERALL:
            yield Paragraph(
                "All benchmarks have equal weight, however many problems they have. The intervals are over further "
                "seeds and problems of the same kinds."
            )
        yield tables.result_table(results, benchmark)
        best = ", ".join(
            f"{name} {tables.percent(row.mean)} %"
            for name in (BASE, *results.algorithms)
            if (row := results.row(name, benchmark, "avg_at_k"))
        )
        yield Figure(
            f"results-{index}",
            plots.result_bars(results, benchmark),
            f"Bars of the results {tables.on(benchmark)}; {results.label('avg_at_k', benchmark)}: {best}.",
            "The mean of each metric over seeds and problems with its 95 % interval; the dashed line is "
            "the base model.",
            "Overlapping intervals do not mean that two algorithms are equal, because they share problems "
            "and seeds: the paired differences below answer that.",
        )


def _further(results: Results) -> Iterator[Block]:
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


def _left_out(results: Results) -> str:
    """What the intervals do not cover."""
    rollouts = results.config.get("rollouts") if isinstance(results.config, dict) else None
    shared = not (isinstance(rollouts, dict) and rollouts.get("per_seed"))
    buffer = (
        "one buffer (samples that were drawn once; rollouts.per_seed draws them anew for each seed), " if shared else ""
    )
    return (
        f"What the intervals do not cover: every cell started from one base model, learned from {buffer}"
        "one set of training problems, and used one setting of every hyper-parameter that was not tuned. "
        "No interval here shows how much results vary with these."
    )


def _baseline(results: Results, asked: str | None) -> str:
    """The requested algorithm, if any of its cells succeeded; else the first of several, or the base model."""
    failed = {failure.algorithm for failure in results.failed or []} - set(results.algorithms)
    if asked is not None and asked not in failed:
        return asked
    return results.algorithms[0] if len(results.algorithms) > 1 else BASE


def _differences(run: FinishedRun, baseline: str) -> Iterator[Block]:
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
        yield tables.difference_table(rows, run.results, benchmark)
        yield Figure(
            f"differences-{index}",
            plots.differences(rows, run.results, benchmark),
            f"Paired differences from {baseline} {tables.on(benchmark)}, as in the table above.",
            f"Points to the right of the line are better than {baseline}, with the uncorrected 95 % interval of the "
            "paired difference; filled points are distinguishable from zero after Holm's correction.",
            "It does not show that a difference carries over to another model, data set or budget.",
        )


def _curves(results: Results) -> Iterator[Block]:
    drawn = [(b, svg) for b in results.benchmarks if (svg := plots.learning_curves(results, b))]
    if not drawn:
        return
    yield Heading("Learning curves")
    for index, (benchmark, svg) in enumerate(drawn):
        yield Heading(benchmark, level=3)
        yield Figure(
            f"curves-{index}",
            svg,
            f"Learning curves on {benchmark}, one line per algorithm.",
            "Evaluations in the course of training: lines are means over seeds, bands range from the lowest to the "
            "highest seed.",
            "A band is not a confidence interval, and evaluations during training may use fewer problems "
            "than the tables.",
        )


def _token_probabilities(results: Results) -> Iterator[Block]:
    svg = plots.token_probabilities(results)
    if svg is None:
        return
    yield Heading("Token probabilities")
    yield Figure(
        "token-probabilities",
        svg,
        "Histograms of the probability of each token of the demonstrations, before and after training.",
        "How many tokens of the demonstrations have a given probability: grey before training, the line "
        "after, averaged over seeds, counts on a log scale (as in arXiv 2508.05629).",
        "It does not show whether a probability moved in the right direction: mass at both ends can come "
        "from learning or from forgetting.",
    )


def _costs(results: Results) -> Iterator[Block]:
    if results.cells:
        yield Heading("Costs")
        yield Paragraph(
            "The cost of one cell (an algorithm, a seed and a learning rate): the mean over an algorithm's cells, and "
            "the maximum for peak memory."
        )
        yield tables.cost_table(results)
    if sweep := tables.learning_rate_table(results):
        yield Heading("Learning rates")
        yield Paragraph(
            "Per cent correct on the validation problems for each learning rate; the one that is reported on the "
            "test problems is bold."
        )
        yield sweep
    dropped = [f"{name}: {dropped_line(summary)}" for name, summary in results.dropped_rows.items()]
    if dropped or results.events:
        yield Heading("Events before training")
        yield from map(Paragraph, dropped + results.events)
    if events := tables.event_table(results):
        yield Heading("Events in training")
        yield Paragraph("What the cells report about their training, such as skipped steps and rows not learned from.")
        yield events
    if failures := tables.failure_table(results):
        yield Heading("Failed cells")
        yield Paragraph("These cells did not finish, and are not part of any number above.")
        yield failures


def _samples(run: FinishedRun) -> Iterator[Block]:
    shown = [(problem, rows) for problem in _problems(run) if (rows := _completions(run, *problem))]
    if not shown:
        return
    yield Heading("Sample completions")
    yield Paragraph(
        "Not selected by content: the first problems in order of their names, and the first sample of the first seed."
    )
    for (benchmark, problem), rows in shown:
        yield Heading(f"{benchmark}: {problem}", level=3)
        yield Code(_shortened(rows[0]["prompt"]))
        for row in rows:
            verdict = ("correct" if row["correct"] else "wrong") + (", truncated" if row["truncated"] else "")
            yield Paragraph(f"{row['algorithm']} ({verdict})")
            yield Code(_shortened(row["text"]))


def _shortened(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"


def _problems(run: FinishedRun) -> list[tuple[str, str]]:
    """The first problems by name, taken from each benchmark in turn."""
    pairs = run.outcomes.select(["benchmark", "problem_id"]).group_by(["benchmark", "problem_id"]).aggregate([])
    ranked: dict[str, list[str]] = {}
    for row in sorted(pairs.to_pylist(), key=lambda row: row["problem_id"]):
        ranked.setdefault(row["benchmark"], []).append(row["problem_id"])
    turns = [(place, b, p) for b in run.results.benchmarks for place, p in enumerate(ranked.get(b, []))]
    return [(b, p) for _, b, p in sorted(turns, key=lambda turn: turn[0])[:SHOWN_PROBLEMS]]


def _completions(run: FinishedRun, benchmark: str, problem: str) -> list[dict[str, Any]]:
    """One sampled completion of the base model and of each algorithm, if there is one."""
    table = run.outcomes.filter(
        (pc.field("benchmark") == benchmark) & (pc.field("problem_id") == problem) & (pc.field("decoding") == "sample")
    )
    first: dict[str, dict[str, Any]] = {}
    for row in table.sort_by([("seed", "ascending"), ("sample", "ascending")]).to_pylist():
        first.setdefault(row["algorithm"], row)
    return [first[name] for name in dict.fromkeys((BASE, *run.results.algorithms)) if name in first]


def _method(results: Results) -> Iterator[Block]:
    yield Heading("How to reproduce this")
    took = f", in {tables.seconds(results.wall_seconds)}" if results.wall_seconds is not None else ""
    yield Paragraph(f"Created {results.created}{took}. To repeat it:")
    yield Code("rlzoo compare experiment.yaml  # the file next to this report", "sh")
    if results.config is not None:
        yield Paragraph("The experiment, with every default filled in:")
        yield Code(yaml.safe_dump(results.config, sort_keys=False, allow_unicode=True).rstrip(), "yaml")
    if results.versions:
        yield Paragraph("Versions:")
        yield Code("\n".join(f"{name} {version}" for name, version in sorted(results.versions.items())))
