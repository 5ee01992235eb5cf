"""Resolves the names in an experiment to objectives, views, rewards and metrics, and checks them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import torch

from rlzoo.buffers import require_table
from rlzoo.buffers.problems import EncodedProblem, Problem, load_problems
from rlzoo.buffers.templates import columns_in
from rlzoo.buffers.views import view_in_place
from rlzoo.comparison.outcomes import OVERALL
from rlzoo.config import BASE, WARM_UP, Benchmark, Experiment, ProblemSource, get_suite, load_experiment
from rlzoo.errors import UserError, unknown
from rlzoo.evaluation import Metric, metric_table
from rlzoo.objective import Objective, get_objective
from rlzoo.policy.loading import DTYPES
from rlzoo.reward import Reward
from rlzoo.reward.isolation import Limits, isolated
from rlzoo.rollout.sampler import Sample, sampler_class
from rlzoo.rollout.scoring import columns_of, score_samples
from rlzoo.training import batches
from rlzoo.training.batches import Views
from rlzoo.training.checks import check_precision
from rlzoo.types import selector_of


def objective_of(experiment: Experiment, algorithm: str) -> Objective:
    """The objective of one row of the comparison, with its options. Raises UserError as `get_objective` does."""
    row = experiment.algorithms[algorithm]
    return get_objective(row.objective or algorithm, **row.options)


def reward_of(
    experiment: Experiment, step: int = 0, max_steps: int = 0, epoch: float = 0.0, benchmark: str | None = None
) -> Reward:
    """The experiment's reward, or that of a benchmark or a retention set, in a separate process.

    It is told the progress of training: ``step`` of ``max_steps``, and ``epoch``.
    """
    limits = Limits(experiment.scoring.seconds, experiment.scoring.memory_gb)
    own = None if benchmark is None else experiment.scored_sets[benchmark].reward
    spec = experiment.reward if own is None else own
    return isolated(spec, limits, experiment.scoring.on_error, experiment.scoring.processes).at(step, max_steps, epoch)


def metrics_of(experiment: Experiment) -> dict[str, Metric]:
    """The metrics of all benchmarks and retention sets, by name. Raises UserError as `metric_table` does."""
    rewards = {name: reward_of(experiment, benchmark=name) for name in experiment.scored_sets}
    tables = [metric_table(experiment.evaluation, reward.components) for reward in rewards.values()]
    return {metric.name: metric for table in tables for metric in table}


def views_of(experiment: Experiment, algorithm: str) -> Views:
    """The view, with its options, that each component of one row of the comparison learns from.

    Raises UserError, which names the row, for an unknown view or option.
    """
    objective, other = objective_of(experiment, algorithm), experiment.algorithms[algorithm].learns_from
    try:
        return batches.views_of(objective) if other is None else [view_in_place(objective, other)]
    except UserError as error:
        raise UserError(f"algorithms.{algorithm}: {error}") from None


def learns_from_samples(views: Views) -> bool:
    """Whether any component learns from samples."""
    return any(selector_of(selection).is_sampled for selection, _ in views)


def check(experiment: Experiment) -> None:
    """Check names, options, problems and the reward before a model is loaded. Raises UserError."""
    check_names(experiment)
    for place, source in sources_of(experiment).items():
        check_source(experiment, place, source)
    if (table := experiment.demonstrations_table) is not None:
        require_table(table.source, table.split)
    metrics_of(experiment)


def check_names(experiment: Experiment) -> None:
    """Check what needs no data: names, options, and the columns in prompts. Raises UserError."""
    try:
        json.dumps(experiment.model_dump(mode="json"))
    except (ValueError, TypeError):
        raise UserError(
            "the reward and the options must be plain data, for experiment.yaml and the worker processes: name your "
            "own reward as package.module:Name or path/to/file.py:Name"
        ) from None
    _check_rows(experiment)
    _check_warm_up(experiment)
    for settings in (experiment.rollouts, experiment.evaluation):
        sampler_class(settings)
    if BASE in experiment.algorithms:
        raise UserError(f"algorithms.{BASE}: this name stands for the untrained model in results; give the row another")
    for place, sets in (("benchmarks", experiment.benchmarks), ("retention", experiment.retention)):
        if OVERALL in sets:
            raise UserError(f"{place}.{OVERALL}: this name stands for the mean in results; give the set another")
    if experiment.baseline is not None and experiment.baseline not in experiment.algorithms:
        raise unknown("baseline", experiment.baseline, experiment.algorithms)
    for place, source in sources_of(experiment).items():
        _check_columns(place, source)


def sources_of(experiment: Experiment) -> dict[str, ProblemSource]:
    """All problem sets of an experiment, by the name of their setting."""
    found: dict[str, ProblemSource | None] = {"train": experiment.train, "validation": experiment.validation}
    found[f"{WARM_UP}.train"] = None if experiment.warm_up is None else experiment.warm_up.train or experiment.train
    found |= {f"benchmarks.{name}": source for name, source in experiment.benchmarks.items()}
    found |= {f"retention.{name}": source for name, source in experiment.retention.items()}
    return {place: source for place, source in found.items() if source is not None}


def check_source(experiment: Experiment, place: str, source: ProblemSource) -> None:
    """Read a problem set, and score empty completions of its first problems. Raises UserError."""
    problems, (section, _, name) = load_problems(source), place.partition(".")
    if section == WARM_UP:
        if not any(problem.solutions for problem in problems):
            raise UserError(f"{place}: its problems have no worked solutions: name their column (solution)")
    elif not isinstance(source, Benchmark) or source.is_scored:
        try:
            _try(reward_of(experiment, benchmark=name or None), problems[:2])
        except UserError as error:
            raise UserError(f"{place}: {error}") from None


def _check_columns(place: str, source: ProblemSource) -> None:
    """Raise UserError for a malformed prompt, and for one with columns that the data set of a suite does not have."""
    try:
        named = columns_in(source.prompt) or [source.prompt]
        if source.solution is not None:
            named += columns_in(source.solution) or [source.solution]
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    suite = get_suite(source.suite) if isinstance(source, Benchmark) and source.suite is not None else None
    if suite is None or source.source != suite.settings["source"]:
        return
    for column in (*named, *source.columns.values()):
        if re.split(r"[.\[]", column)[0] not in suite.fields:
            raise unknown(f"column of {source.source} in {place}", column, suite.fields)


def _check_counterpart(reference: str, objective: str, where: str) -> None:
    """Raise UserError unless a ``reference`` names a row of an experiment that trains this objective online."""
    study, _, name = reference.rpartition("/")
    if not study or not name:
        raise UserError(f"{where}: {reference!r} is not of the form experiment/row, as in own-samples/grpo-online")
    try:
        other = load_experiment(study)
        if name not in other.algorithms:
            raise unknown(f"row of {study}", name, other.algorithms)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if other.algorithms[name].mode != "online" or objective_of(other, name).name != objective:
        raise UserError(f"{where}: {name} of {study} does not train {objective} online: name a row that does")


def _check_rows(experiment: Experiment) -> None:
    for name, row in experiment.single_rows.items():
        objective = objective_of(experiment, name)
        training = experiment.training_of(name)
        if training.lora is None:
            check_precision([DTYPES.get(training.dtype, torch.float32)])
        views = views_of(experiment, name)
        if row.mode == "online" and not learns_from_samples(views):
            raise UserError(
                f"algorithms.{name}: {objective.name!r} learns from demonstrations, so mode must be offline"
            )
        if row.online_counterpart is not None:
            _check_counterpart(row.online_counterpart, objective.name, f"algorithms.{name}.online_counterpart")
    for name in experiment.algorithms.keys() - experiment.single_rows.keys():
        lora = [experiment.training_of(stage).lora for stage in experiment.stages_of(name)]
        if any(one is not None and one.load_in_4bit for one in lora):
            raise UserError(f"algorithms.{name}: lora.load_in_4bit would round the weights between stages: turn it off")


def _check_warm_up(experiment: Experiment) -> None:
    if (alone := experiment.of_warm_up) is None:
        return
    try:
        _check_rows(alone)
    except UserError as error:
        raise UserError(f"{WARM_UP}: {error}") from None
    if learns_from_samples(views_of(alone, WARM_UP)):
        raise UserError(
            f"{WARM_UP}.objective: {alone.algorithms[WARM_UP].objective!r} learns from samples, and a warm-up from "
            "demonstrations: name an objective such as sft"
        )


def _try(reward: Reward, problems: Sequence[Problem]) -> None:
    """Score empty completions, so that a missing column or a broken reward is found before hours of sampling."""
    nothing = Sample([], "", truncated=False)
    encoded = [EncodedProblem(problem, "", []) for problem in problems]
    score_samples(reward, [(one, nothing) for one in encoded], columns_of(encoded))
