"""What worker processes do once the shared buffer is filled: evaluate the base, and train and evaluate cells.

The functions that they run take and return plain data, so that they can run in any process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.problems import encode_problems, load_problems
from rlzoo.comparison import base_text
from rlzoo.comparison.curves import costs_at, ends_the_curve, logged_at, result_at
from rlzoo.comparison.one_stage import Given, logs_of, train_cell, train_first
from rlzoo.comparison.plan import Cell, FirstStages, has_choice
from rlzoo.comparison.resolve import reward_of
from rlzoo.comparison.shared_buffer import token_probabilities
from rlzoo.comparison.warm_up import save_whole
from rlzoo.config import Experiment, ProblemSource
from rlzoo.evaluation import Evaluation, evaluate
from rlzoo.evaluation.evaluation import gold_rows
from rlzoo.evaluation.metrics import AVERAGE
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.jobs.memory import release_memory
from rlzoo.jobs.outputs import remove
from rlzoo.jobs.progress import Report
from rlzoo.jobs.ranks import is_main
from rlzoo.policy import Policy
from rlzoo.policy.loading import load_for
from rlzoo.reward import Reward
from rlzoo.rollout import sampler_of
from rlzoo.rollout.rollouts import within_limits
from rlzoo.training import Costs
from rlzoo.training.trackers import log_results


def evaluate_base(experiment: Experiment, state: Path, report: Report) -> dict[str, Any]:
    """The base policy's metrics on all benchmarks, its outcomes, and the first point of the learning curves.

    Also the ``dropped_rows`` of benchmarks and validation, on which no policy is evaluated, and their ``events``.
    """
    cached, load = CachedResults(state), cache(lambda: load_for(experiment.model, experiment.training))
    text = base_text.base_text(load, experiment, state)

    def evaluate() -> dict[str, Any]:
        policy = load()
        bad = _unfit(policy, experiment)
        found = evaluate_all(policy, experiment, "base", -1, None, cached.within("base"), report, text)
        log_results(policy.device, experiment.training, logs_of(state, "base"), -1, _measured(found))  # at step 0
        curve = None
        if experiment.evaluation.curve_points > 0:
            if ends_the_curve(experiment.evaluation):
                curve = {"step": 0, **costs_at(Costs()), "metrics": known_results(experiment, found["outcomes"])}
            else:
                curve = curve_point(policy, experiment, 0, seed=0)
        return {
            **found,
            "curve": curve,
            "dropped_rows": {name: summary for name, rows in bad.items() if (summary := rows.summary())},
            "events": [f"{name}: {event}" for name, rows in bad.items() for event in rows.events()],
        }

    return dict(cached.once("base", evaluate))


def _unfit(policy: Policy, experiment: Experiment) -> dict[str, BadRows]:
    """The bad rows of each problem set that policies are evaluated on."""
    sets: dict[str, ProblemSource] = {f"benchmark {name}": source for name, source in experiment.benchmarks.items()}
    sets |= {f"retention set {name}": source for name, source in experiment.retention.items()}
    sets |= {} if experiment.validation is None else {"validation": experiment.validation}
    bad = {name: BadRows(source.bad_rows) for name, source in sets.items()}
    for name, source in sets.items():
        encoded = encode_problems(policy.tokenizer, load_problems(source, bad[name]), bad[name])
        sampler = sampler_of(policy, experiment.evaluation)
        fit = within_limits(policy, sampler, encoded, experiment.evaluation_on(source), bad[name])
        if name != "validation":
            gold_rows(policy, fit, bad[name])
    return bad


def run_cell(
    experiment: Experiment,
    cell: Cell,
    shared: dict[str, Any],
    buffer_path: Path,
    state: Path,
    divisor: int,
    report: Report,
) -> dict[str, Any]:
    """Train one cell and evaluate it: on the benchmarks, or on validation if its learning rate is yet to be chosen.

    In the second case the weights are kept under ``state`` for `evaluate_cell`, until the learning rate has lost.
    Trackers write to logs/ next to it. Micro-batches are ``divisor`` times smaller than in the experiment, for cells
    that ran out of memory. Results cached under ``state`` are not computed again, whatever became of the weights.
    """
    cached = CachedResults(state / "cells")

    def run() -> dict[str, Any]:
        smaller = experiment.with_smaller_batches(divisor)
        return _run_cell(smaller, cell, shared, buffer_path, state, cached.within(cell.id), report)

    found = dict(cached.once(cell.id, run))
    if is_main():
        remove(cached.within(cell.id).folder)
    return found


def _run_cell(
    experiment: Experiment,
    cell: Cell,
    shared: dict[str, Any],
    buffer_path: Path,
    state: Path,
    cached: CachedResults,
    report: Report,
) -> dict[str, Any]:
    release_memory()
    buffer = OfflineBuffer.load(buffer_path)
    is_chosen = has_choice(experiment, cell.algorithm)

    def evaluated(policy: Policy, step: int, most: int, costs: Costs, is_last: bool) -> dict[str, Any]:
        if is_last and not is_chosen and ends_the_curve(experiment.evaluation):
            return {"step": step, **costs_at(costs)}  # its results are those of the evaluation that follows
        return curve_point(policy, experiment, step, cell.seed, most, costs)

    policy, made = train_cell(
        experiment, cell,
        Given(shared, buffer, state, evaluated, lambda share, what: report(0.8 * share, what)),
        cached.folder / "checkpoints",
    )  # fmt: skip
    steps, most, budget = (
        len(made["training"]),
        made["planned_steps"],
        experiment.training_of(cell.algorithm).token_budget,
    )
    result = {
        "algorithm": cell.algorithm,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        **made,
        "token_probabilities": token_probabilities(policy, buffer, budget)["counts"],
    }
    if is_chosen:
        assert experiment.validation is not None  # checked by the experiment's validator
        reward = reward_of(experiment, steps, most)
        validation = _evaluate(policy, experiment, experiment.validation, reward, cell.seed, brief=True)
        save_whole(policy, state / "models" / cell.id)
        measured = {"validation": {"avg_at_k": validation.metrics["avg_at_k"]}, "costs": made["costs"]}
        log_results(policy.device, experiment.training_of(cell.algorithm), logs_of(state, cell.id), steps, measured)
        return {**result, "validation": validation.metrics["avg_at_k"]}
    found = evaluate_all(
        policy, experiment, cell.algorithm, cell.seed, cell.learning_rate, cached,
        lambda share, what: report(0.8 + 0.2 * share, what), base_text.saved_text(experiment, state), steps, most,
    )  # fmt: skip
    late = [point for point in made["curve"] if "metrics" not in point]
    for point in late:
        point["metrics"] = known_results(experiment, found["outcomes"])
    measured = {**_measured(found), "costs": made["costs"], **(logged_at(late[-1]) if late else {})}
    log_results(policy.device, experiment.training_of(cell.algorithm), logs_of(state, cell.id), steps, measured)
    return {**result, **found}


def run_first(
    experiment: Experiment,
    first: FirstStages,
    shared: dict[str, Any],
    buffer_path: Path,
    state: Path,
    divisor: int,
    report: Report,
) -> dict[str, Any]:
    """Train stages that several cells continue from (see `train_first`), with micro-batches as in `run_cell`."""
    release_memory()
    smaller = experiment.with_smaller_batches(divisor)

    def evaluated(policy: Policy, step: int, most: int, costs: Costs, is_last: bool) -> dict[str, Any]:
        return curve_point(policy, smaller, step, first.seed, most, costs)

    return train_first(smaller, first, Given(shared, OfflineBuffer.load(buffer_path), state, evaluated, report))


def evaluate_cell(experiment: Experiment, cell: Cell, state: Path, divisor: int, report: Report) -> dict[str, Any]:
    """Evaluate a cell on the benchmarks, from its saved weights, once its learning rate has been chosen."""
    smaller, cached = experiment.with_smaller_batches(divisor), CachedResults(state / "chosen")
    trained = CachedResults(state / "cells").read(cell.id) or {"training": (), "planned_steps": 0}

    def evaluate() -> dict[str, Any]:
        settings = experiment.training_of(cell.algorithm).model_copy(update={"lora": None})  # merged, and whole
        policy = load_for(str(state / "models" / cell.id), settings)
        labels = (cell.algorithm, cell.seed, cell.learning_rate)
        text, steps = base_text.saved_text(experiment, state), (len(trained["training"]), trained["planned_steps"])
        found = evaluate_all(policy, smaller, *labels, cached.within(cell.id), report, text, *steps)
        log_results(
            policy.device, settings, logs_of(state, cell.id), steps[0] + 1, _measured(found)
        )  # after validation
        return found

    return dict(cached.once(cell.id, evaluate))


def _measured(found: Mapping[str, Any]) -> dict[str, Any]:
    """What trackers receive of the results of `evaluate_all`."""
    return {"evaluation": found["metrics"], "retention": found.get("retention", {})}


def evaluate_all(
    policy: Policy,
    experiment: Experiment,
    algorithm: str,
    seed: int,
    learning_rate: float | None,
    cached: CachedResults,
    report: Report,
    text: base_text.BaseText,
    step: int = 0,
    most: int = 0,
) -> dict[str, Any]:
    """Evaluate on all problem sets: ``metrics`` by benchmark, and ``outcomes`` with one row per sample.

    With retention sets, also ``retention``, the metrics by retention set, those of the base's ``text`` among them.
    ``step`` is the number of steps that the policy was trained for, of the ``most`` that were planned.
    """
    metrics, kept, outcomes = dict[str, Any](), dict[str, Any](), list[dict[str, Any]]()
    sets = experiment.scored_sets

    def add(name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        labels = {"algorithm": algorithm, "seed": seed, "learning_rate": learning_rate, "benchmark": name}
        labels |= {"retention": name in experiment.retention}
        outcomes.extend({**labels, **row} for row in rows)

    for number, (name, source) in enumerate(sets.items()):
        report(number / len(sets), f"evaluating {name}")

        def evaluate(name: str = name, source: ProblemSource = source) -> dict[str, Any]:
            reward = reward_of(experiment, step, most, benchmark=name)
            return vars(_evaluate(policy, experiment, source, reward, max(seed, 0)))

        found = cached.once(f"on {name}", evaluate)
        (kept if name in experiment.retention else metrics)[name] = found["metrics"]
        add(name, found["outcomes"])
    for name, own in text.items():
        found, rows = base_text.text_results(policy, own, experiment.training.token_budget)
        kept[name] = {**kept.get(name, {}), **found}
        add(name, rows)
    return {"metrics": metrics, "outcomes": outcomes, **({"retention": kept} if text else {})}


def curve_point(
    policy: Policy, experiment: Experiment, step: int, seed: int, max_steps: int = 0, costs: Costs | None = None
) -> dict[str, Any]:
    """A cheap evaluation in the course of training: avg@k on the first problems of each benchmark, and costs so far.

    Also on those of ``validation``, if cells end when their curve is flat.
    """
    settings = experiment.evaluation

    def result(source: ProblemSource, benchmark: str | None) -> dict[str, Any]:
        small = experiment.evaluation_on(source).model_copy(update={"samples": settings.curve_samples, "k": None})
        problems, bad = load_problems(source)[: settings.curve_problems], BadRows(source.bad_rows)
        reward = reward_of(experiment, step, max_steps, benchmark=benchmark)
        found = evaluate(policy, problems, reward, small, seed, greedy=False, bad=bad, metrics=[AVERAGE])
        return result_at(found.outcomes, small.samples)

    metrics = {name: result(source, name) for name, source in experiment.benchmarks.items()}
    point = {"step": step, **costs_at(costs or Costs()), "metrics": metrics}
    if settings.until_flat is not None and experiment.validation is not None:
        point["validation"] = result(experiment.validation, None)
    return point


def known_results(experiment: Experiment, outcomes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results that `curve_point` would get, from the ``outcomes`` of `evaluate_all`: by benchmark."""
    settings, results = experiment.evaluation, dict[str, Any]()
    for name, source in experiment.benchmarks.items():
        first = {problem.id for problem in load_problems(source)[: settings.curve_problems]}
        own = [row for row in outcomes if row["benchmark"] == name and row["problem_id"] in first]
        results[name] = result_at(own, settings.curve_samples)
    return results


def _evaluate(
    policy: Policy, experiment: Experiment, source: ProblemSource, reward: Reward, seed: int, brief: bool = False
) -> Evaluation:
    """All metrics, or avg@k alone."""
    problems, bad = load_problems(source), BadRows(source.bad_rows)
    metrics = [AVERAGE] if brief else None
    budget = experiment.training.token_budget
    return evaluate(
        policy, problems, reward, experiment.evaluation_on(source), seed,
        greedy=not brief, bad=bad, metrics=metrics, token_budget=budget,
    )  # fmt: skip
