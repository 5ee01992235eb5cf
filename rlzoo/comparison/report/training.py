"""The sections of a report on training: its curves, its costs, and what happened in it."""

from __future__ import annotations

from collections.abc import Iterator

from rlzoo.comparison.report import plots, tables
from rlzoo.comparison.report.schema import FinishedRun, Results
from rlzoo.document import Block, Figure, Heading, Paragraph


def curves(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """Evaluations in the course of training."""
    results = run.results
    drawn = [(name, drawing) for name in results.benchmarks if (drawing := plots.learning_curves(results, name))]
    if not drawn:
        return
    yield Heading("Learning curves")
    for index, (benchmark, drawing) in enumerate(drawn):
        yield Heading(benchmark, level=3)
        yield Figure(
            f"curves-{index}",
            drawing,
            f"Learning curves on {benchmark}, one line per algorithm.",
            "Evaluations in the course of training, against steps and, where they were recorded, gradient tokens and "
            "FLOPs: lines are means over seeds, bands range from the lowest to the highest seed. A line ends where its "
            "first seed ended.",
            "A band is not a confidence interval, and evaluations during training may use fewer problems "
            "than the tables.",
        )


def loss(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """The loss in the course of training, beside what it hides."""
    drawing = plots.training_loss(run.results, baseline)
    if drawing is None:
        return
    yield Heading("Training loss")
    yield tables.loss_table(plots.loss_curves(run.results, baseline))
    yield Figure(
        "training-loss",
        drawing,
        "The loss and the perplexity of the training batches at each step, one line per algorithm.",
        f"Left: the loss that each algorithm minimises. Right: its perplexity exp(−log π per token) on the same "
        f"batches. Means over seeds; the rows shown learn from the same batches as {baseline}.",
        "Losses of different objectives are different quantities: a weight below 1 makes a loss small, and it may fall "
        "while the perplexity rises. Neither ranks algorithms by accuracy.",
    )


def token_probabilities(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """The probabilities of the demonstrations' tokens, before and after."""
    drawing = plots.token_probabilities(run.results)
    if drawing is None:
        return
    yield Heading("Token probabilities")
    yield Figure(
        "token-probabilities",
        drawing,
        "Histograms of the probability of each token of the demonstrations, before and after training.",
        "How many tokens of the demonstrations have a given probability: grey before training, the line "
        "after, averaged over seeds, counts on a log scale (as in arXiv 2508.05629).",
        "It does not show whether a probability moved in the right direction: mass at both ends can come "
        "from learning or from forgetting.",
    )


def costs(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """What a cell cost."""
    results = run.results
    if results.cells:
        yield Heading("Costs")
        yield Paragraph(
            "The cost of one cell (an algorithm, a seed and a learning rate): the mean over an algorithm's cells, and "
            "the maximum for peak memory."
        )
        yield tables.cost_table(results)
        yield Heading("All cells of each algorithm", level=3)
        yield Paragraph(
            "The sum over all seeds and learning rates, those that were tried and not reported included, without "
            "evaluation. Samples of a shared buffer count for each cell that learns from them."
        )
        yield tables.total_cost_table(results)


def learning_rates(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """Which learning rates were tried, with what result on validation."""
    if sweep := tables.learning_rate_table(run.results):
        yield Heading("Learning rates")
        yield Paragraph(
            "Per cent correct on the validation problems for each learning rate; the one that is reported on the "
            "test problems is bold."
        )
        yield sweep


def events(run: FinishedRun, baseline: str) -> Iterator[Block]:
    """What a reader should know of the data and of the training, and the cells that failed."""
    results = run.results
    dropped = _dropped(results)
    if dropped or results.events:
        yield Heading("Events before training")
        yield from map(Paragraph, dropped + results.events)
    if told := tables.event_table(results):
        yield Heading("Events in training")
        yield Paragraph("What the cells report about their training, such as skipped steps and rows not learned from.")
        yield told
    if failures := tables.failure_table(results):
        yield Heading("Failed cells")
        yield Paragraph("These cells did not finish, and are not part of any number above.")
        yield failures


def _dropped(results: Results) -> list[str]:
    if not results.dropped_rows:
        return []
    from rlzoo.buffers.bad_rows import dropped_line  # here, as its package needs torch, and few reports need it

    return [f"{name}: {dropped_line(summary)}" for name, summary in results.dropped_rows.items()]
