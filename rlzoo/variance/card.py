"""The card of a finished analysis: what was measured, on which rows, what came out, and how to repeat it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import DatasetCardData

from rlzoo.buffers.bad_rows import dropped_line
from rlzoo.buffers.card import SHARDS
from rlzoo.comparison.resolve import objective_of
from rlzoo.config import Experiment
from rlzoo.document import Block, Heading, Paragraph
from rlzoo.document.cards import TAG, card, data_sets_of, facts, how_it_was_made
from rlzoo.document.estimates import number
from rlzoo.jobs.pool import counted
from rlzoo.jobs.sharing import public
from rlzoo.training.card import objective_table
from rlzoo.variance.report import summary

FILES = {
    "report.md, report.html": "the whole report, with figures, and how everything was measured",
    "variance.json": "every number, with its interval where it has one",
    "buffer": "the rows that the objectives were measured on, with a card of their own",
}
"""What a folder of an analysis holds."""


def analysis_card(
    experiment: Experiment, found: Mapping[str, Any], buffer: str | None, configuration: Mapping[str, Any]
) -> str:
    """The card for the folder of an analysis, whose variance.json is ``found``.

    ``buffer`` is what it was measured on in place of the experiment's data, ``configuration`` all settings.
    """
    return card(_metadata(experiment, buffer), _blocks(experiment, found, buffer, configuration))


def _metadata(experiment: Experiment, buffer: str | None) -> DatasetCardData:
    table = experiment.demonstrations_table
    made_from = [experiment.train.source] if table is None else [experiment.train.source, table.source]
    sources = made_from if buffer is None else [buffer]
    return DatasetCardData(
        pretty_name=f"Gradient variance: {experiment.name}",
        tags=[TAG, "offline-rl", "gradient-variance", *experiment.algorithms],
        source_datasets=list(dict.fromkeys(name for source in sources for name in data_sets_of(source))) or None,
        configs=[{"config_name": "buffer", "data_files": [{"split": "train", "path": f"buffer/{SHARDS}"}]}],
    )


def _blocks(
    experiment: Experiment, found: Mapping[str, Any], buffer: str | None, configuration: Mapping[str, Any]
) -> Iterator[Block]:
    measured = list(found["objectives"])
    yield Heading(f"Gradient variance: {experiment.name}", level=1)
    yield Paragraph(
        f"The variance of the gradients of {counted(len(measured), 'objective')} at one model on one buffer, measured "
        "by rlzoo, with 95 % intervals for new prompts of the same kind."
    )
    yield from summary(found)
    yield Heading("Objectives")
    yield objective_table({name: objective_of(experiment, name) for name in measured})
    yield Heading("Model and data")
    warm = found["warm_up"]
    after = f", after {warm['steps']:,} steps of {warm['objective']}" if warm else ""
    yield facts(
        {
            "model": f"{public(experiment.model)}{after}",
            "rows": str(public(experiment.train.source if buffer is None else buffer)),
            "steps of training measured": f"every {found['settings']['every']}" if found["training"] else "none",
            **{f"left out, {name}": dropped_line(rows) or "" for name, rows in public(found["dropped_rows"]).items()},
            "time": f"{number(found['wall_seconds'])} s",
        }
    )
    yield Heading("Files")
    yield facts(FILES, "file")
    yield from how_it_was_made(configuration)
