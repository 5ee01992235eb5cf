"""The card of a finished comparison, a data set on the Hub: what was compared, results, costs, and how to repeat it."""

from __future__ import annotations

from collections.abc import Iterator

from huggingface_hub import DatasetCardData

from rlzoo.buffers.bad_rows import dropped_line
from rlzoo.comparison.report import tables
from rlzoo.comparison.report.retention import retention_table
from rlzoo.comparison.report.schema import Results
from rlzoo.comparison.resolve import objective_of, sources_of
from rlzoo.config import Experiment
from rlzoo.document import Block, Heading, Paragraph
from rlzoo.document.cards import TAG, card, data_sets_of, facts, how_it_was_made
from rlzoo.jobs.pool import counted
from rlzoo.jobs.sharing import public
from rlzoo.training.card import objective_table

FILES = {
    "report.md, report.html": "the whole report: differences from the baseline with corrected p-values, learning "
    "curves, costs, samples",
    "results.json": "results, costs and metrics of each training step, per cell",
    "outcomes.parquet": "every sampled answer, with its reward",
    "experiment.yaml": "the configuration",
}
"""What a folder of a comparison holds."""


def comparison_card(experiment: Experiment, results: Results) -> str:
    """The card for the folder of a comparison."""
    return card(_metadata(experiment), _blocks(experiment, results))


def _metadata(experiment: Experiment) -> DatasetCardData:
    sources = [source.source for source in sources_of(experiment).values()]
    if (table := experiment.demonstrations_table) is not None:
        sources.append(table.source)
    known = dict.fromkeys(name for source in sources for name in data_sets_of(source))
    return DatasetCardData(
        pretty_name=f"Comparison: {experiment.name}",
        tags=[TAG, "offline-rl", "evaluation-results", *experiment.algorithms],
        source_datasets=list(known) or None,
        configs=[{"config_name": "outcomes", "data_files": [{"split": "train", "path": "outcomes.parquet"}]}],
    )


def _blocks(experiment: Experiment, results: Results) -> Iterator[Block]:
    yield Heading(f"Comparison: {experiment.name}", level=1)
    if experiment.description:
        yield Paragraph(str(public(experiment.description)))
    yield Paragraph(
        f"{counted(len(results.algorithms), 'objective')}, trained by rlzoo from one base model on one buffer with one "
        f"budget, on {counted(len(experiment.seeds), 'seed')} each. Results are means with 95 % intervals; report.md "
        "tests the differences."
    )
    for benchmark in results.overall:
        yield Heading(f"Results: {benchmark}")
        yield tables.result_table(results, benchmark)
    if results.retention is not None and results.retention.summary:
        for name in results.retention.base:
            yield Heading(f"Retention: {name}")
            yield retention_table(results, name)
    if (failed := tables.failure_table(results)) is not None:
        yield Heading("Cells that failed")
        yield failed
    yield Heading("Objectives")
    yield Paragraph(
        "The coefficient is the factor of ∇ log π_θ(y_t) in the gradient, for each token y_t that is learned from; p_t "
        "is π_θ(y_t), the probability of the token under the policy in training."
    )
    yield objective_table({name: objective_of(experiment, name) for name in experiment.single_rows})
    for name, row in experiment.algorithms.items():
        if row.stages:
            yield Paragraph(f"{name} is {', then '.join(row.stages)}, each from the weights of the one before.")
    yield Heading("Model and data")
    warm = f", after {results.warm_up.steps:,} steps of {results.warm_up.objective}" if results.warm_up else ""
    table = experiment.demonstrations_table
    rates = {name: _rates(results, name) for name in results.algorithms}
    yield facts(
        {
            "base model": f"{public(experiment.model)}{warm}",
            **{place.replace(".", " "): str(public(one.source)) for place, one in sources_of(experiment).items()},
            "demonstrations": "" if table is None else str(public(table.source)),
            "reward": str(public(experiment.model_dump(mode="json")["reward"])),
            **{f"learning rate, {name}": rate for name, rate in rates.items()},
            **{f"left out, {name}": dropped_line(found) or "" for name, found in public(results.dropped_rows).items()},
        }
    )
    yield Heading("Costs")
    yield Paragraph("The mean of a cell:")
    yield tables.cost_table(results)
    yield Paragraph("The sum of all cells, those with other learning rates among them:")
    yield tables.total_cost_table(results)
    yield Heading("Files")
    yield facts(FILES, "file")
    repeat = "rlzoo compare experiment.yaml  # the same, from the file beside this card"
    yield from how_it_was_made(experiment.model_dump(mode="json"), repeat)


def _rates(results: Results, algorithm: str) -> str:
    used = dict.fromkeys(tables.rate(cell.learning_rate) for cell in results.cells if cell.algorithm == algorithm)
    tried = list((results.learning_rates or {}).get(algorithm, ()))
    chosen = ", ".join(used)
    return f"{chosen}, chosen on validation among {', '.join(tried)}" if len(tried) > 1 else chosen
