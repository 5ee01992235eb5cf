"""What a comparison would do, without doing it: everything is resolved that can be without weights or a connection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets.config
import huggingface_hub.constants
import rich.table

from rlzoo.buffers import require_table
from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.problems import encode_problems, load_problems
from rlzoo.comparison import resolve
from rlzoo.comparison.forecast import forecast
from rlzoo.comparison.plan import cells
from rlzoo.comparison.planning import costs_table
from rlzoo.comparison.report.tables import rate
from rlzoo.comparison.sizes import size_of
from rlzoo.config import Experiment, ProblemSource
from rlzoo.document import Entry, Table
from rlzoo.document.terminal import plain_table
from rlzoo.errors import UnreachableError, UserError
from rlzoo.jobs.pool import counted
from rlzoo.policy import Policy
from rlzoo.policy.encoding import encode_prompt
from rlzoo.policy.loading import load_shape
from rlzoo.types import name_of_view

ASKED = 2
"""How many problems of each set are rendered by the model's chat template."""


@dataclass(frozen=True)
class DryRun:
    """What a comparison would run."""

    experiment: Experiment
    costs: dict[str, Any] | None
    """A `Forecast` as plain data; None if the model's shape or the number of problems is not known."""
    unchecked: list[str]
    """The data sets and models that are not on this machine."""


def dry_run(experiment: Experiment) -> DryRun:
    """Check an experiment as `compare` does before it trains, without the Hub. Raises UserError for what is wrong.

    Names, options and prompts are always checked, and data sets, the model's configuration and its tokenizer if they
    are on this machine.
    """
    with _offline():
        missing = unchecked(experiment)
        try:
            model: Policy | None = load_shape(experiment.model)
        except UnreachableError:
            model = None
        if model is None or model.tokenizer is None:
            missing = [f"the model {experiment.model}", *missing]
        else:
            _check_prompts(experiment, model)
        try:
            costs = None if model is None else forecast(experiment, model).as_dict()
        except UnreachableError:
            costs = None
    return DryRun(experiment, costs, missing)


@contextmanager
def _offline() -> Iterator[None]:
    """In this context, the Hub's clients use only what is on this machine."""
    switches: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in switches]
    try:
        for module in switches:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value


def unchecked(experiment: Experiment) -> list[str]:
    """`check` for all data sets that can be read; returns the others. Raises UserError for what is wrong."""
    resolve.check_names(experiment)
    missing: dict[str, None] = {}
    for place, source in resolve.sources_of(experiment).items():
        try:
            resolve.check_source(experiment, place, source)
        except UnreachableError:
            missing[f"the data set {source.source}"] = None
    if (table := experiment.demonstrations_table) is not None:
        try:
            require_table(table.source, table.split)
        except UnreachableError:
            missing[f"the data set {table.source}"] = None
    resolve.metrics_of(experiment)
    return list(missing)


def _check_prompts(experiment: Experiment, model: Policy) -> None:
    """Raise UserError for a set whose first problems, or any conversations, the model's chat template cannot render."""
    tokenizer = model.tokenizer
    if experiment.training.chat_template is not None:
        tokenizer.chat_template = experiment.training.chat_template
    for place, source in resolve.sources_of(experiment).items():
        try:
            encode_problems(tokenizer, load_problems(source)[:ASKED], BadRows(source.bad_rows))
        except UnreachableError:
            if source.chat:
                turns = [("system", source.system), ("user", "?")]
                asked: Any = [{"role": role, "content": text} for role, text in turns if text is not None]
                try:
                    encode_prompt(tokenizer, asked)
                except UserError as error:
                    raise UserError(f"{place}: {error}") from None


def tables_of(found: DryRun) -> tuple[list[rich.table.Table], list[str]]:
    """A dry run as tables and lines for the terminal."""
    experiment = found.experiment
    missing = {name.removeprefix("the data set ") for name in found.unchecked}
    rows = [_row(experiment, name, found.costs) for name in experiment.algorithms]
    sets = [_set(experiment, place, source, missing) for place, source in resolve.sources_of(experiment).items()]
    header = ["algorithm", "objective", "learns from", "mode", "rates", "steps", "batch"]
    tables = [
        plain_table(Table(header, [[Entry(text) for text in row] for row in rows]), "algorithms"),
        plain_table(
            Table(["set", "source", "problems", "reward"], [[Entry(text) for text in row] for row in sets]), "data"
        ),
    ]
    if found.costs is not None:
        tables.append(plain_table(costs_table(found.costs), "costs per cell, including its evaluation"))
    return tables, _lines(found)


def _row(experiment: Experiment, name: str, costs: Mapping[str, Any] | None) -> list[str]:
    training = experiment.training_of(name)
    steps = f"{training.steps:,}"
    if training.epochs is not None:
        found = [] if costs is None else [f"{one['steps']:,}" for one in costs["rows"] if one["algorithm"] == name]
        steps = " = ".join([f"{training.epochs:g} epoch{'s' * (training.epochs != 1)}", *found])
    stages = experiment.stages_of(name)
    objectives = [resolve.objective_of(experiment, one).name for one in stages]
    views = [", ".join(name_of_view(which) for which, _ in resolve.views_of(experiment, one)) for one in stages]
    modes = [experiment.algorithms[one].mode for one in stages]
    rates = ", ".join(rate(one) for one in experiment.learning_rates_of(name))
    told = [" → ".join(dict.fromkeys(some)) for some in (objectives, views, modes)]
    return [name, *told, rates, steps, f"{training.batch_size:,}"]


def _set(experiment: Experiment, place: str, source: ProblemSource, missing: set[str]) -> list[str]:
    reward = getattr(source, "reward", None) or experiment.reward
    told = reward if isinstance(reward, str) else reward.get("name", "…") if isinstance(reward, dict) else "several"
    split = f" ({source.split})" if source.source in missing else ""
    try:
        with _offline():
            size = f"{size_of(source):,}"
    except UnreachableError:
        size = "unknown"
    return [place, f"{source.source}{split}", size, told]


def _lines(found: DryRun) -> list[str]:
    experiment, grid = found.experiment, cells(found.experiment)
    lines = [
        f"{experiment.name}: {counted(len(experiment.algorithms), 'algorithm')} × "
        f"{counted(len(experiment.seeds), 'seed')}, {counted(len(grid), 'cell')}; model {experiment.model}"
    ]
    if found.costs is None:
        lines.append("Costs: unknown, as the model's shape or the number of problems of a set is not known here.")
    elif assumed := found.costs["lengths"]["assumed"]:
        lines.append(f"Costs assume: {assumed}.")
    if found.unchecked:
        lines.append(f"Not on this machine, and so not checked: {', '.join(found.unchecked)}.")
    lines.append("Nothing was trained, sampled or written.")
    return lines
