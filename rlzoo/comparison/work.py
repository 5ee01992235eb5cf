"""What worker processes do: fill the shared buffer, evaluate the base, train and evaluate one cell.

Every function takes plain data and gives plain data back, so that it can run in any process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlzoo.bad_rows import BadRows, OnBadRow
from rlzoo.buffers import Buffer, OfflineBuffer, read_buffer
from rlzoo.buffers.views import SINGLE_ROW_OPTIONS
from rlzoo.comparison.plan import Cell, has_choice
from rlzoo.config import Experiment, ProblemSource, Training
from rlzoo.errors import UserError
from rlzoo.evaluation import Evaluation, Metric, evaluate, metric_table
from rlzoo.evaluation.evaluation import gold_rows
from rlzoo.evaluation.metrics import AVERAGE
from rlzoo.inputs import Stage
from rlzoo.objective import Objective, get_objective
from rlzoo.outputs import remove
from rlzoo.pieces import Pieces
from rlzoo.policy import Policy, load_policy, score_rows
from rlzoo.policy.loading import save_policy
from rlzoo.policy.memory import release_memory
from rlzoo.problems import demonstrations, encode_problems, load_problems
from rlzoo.ranks import agreed, barrier, is_main
from rlzoo.reward import Reward
from rlzoo.reward_process import Limits, apart
from rlzoo.rollout import Collector, collect_rollouts, cut_short, mismatch, sampler_of, unscored
from rlzoo.rollout.rollouts import within_limits
from rlzoo.training import (
    Trainer,
    TrainingRecord,
    batches,
    check_buffer,
    scored_event,
    stored_inputs,
    with_behaviour,
    with_inputs,
)
from rlzoo.training.batches import BufferSource, FreshSource, Source, Views, seeds, shares
from rlzoo.types import Selection, Trajectory, name_of_view, selector_of

Report = Callable[[float, str], None]
"""Told the share that is done, 0 to 1, and what is being done."""

EDGES = np.linspace(0, 1, 21)
"""Bins of token probabilities."""
PROBED_ROWS = 256
"""Demonstrations whose token probabilities are counted before and after training."""


def objective_of(experiment: Experiment, algorithm: str) -> Objective:
    """The configured objective of one row of the comparison."""
    row = experiment.algorithms[algorithm]
    return get_objective(row.objective or algorithm, **row.options)


def reward_of(
    experiment: Experiment, step: int = 0, max_steps: int = 0, epoch: float = 0.0, benchmark: str | None = None
) -> Reward:
    """The experiment's reward, or a benchmark's own, in a process of its own, told how far training is."""
    limits = Limits(experiment.judging.seconds, experiment.judging.memory_gb)
    own = None if benchmark is None else experiment.benchmarks[benchmark].reward
    spec = experiment.reward if own is None else own
    return apart(spec, limits, experiment.judging.on_error).at(step, max_steps, epoch)


def metrics_of(experiment: Experiment) -> dict[str, Metric]:
    """The metrics of all benchmarks, by name. Raises UserError as `metric_table` does."""
    rewards = {name: reward_of(experiment, benchmark=name) for name in experiment.benchmarks}
    tables = [metric_table(experiment.evaluation, reward.parts) for reward in rewards.values()]
    return {metric.name: metric for table in tables for metric in table}


def check_model(experiment: Experiment, report: Report) -> None:
    """Load the base policy, to know that it can be. Raises UserError."""
    report(0.0, "loading")
    load_policy(experiment.model, experiment.training.dtype)


def views_of(experiment: Experiment, algorithm: str) -> Views:
    """What each part of one row of the comparison learns from: a selection, with the options of that view."""
    objective = objective_of(experiment, algorithm)
    other, own = experiment.algorithms[algorithm].learns_from, batches.views_of(objective)
    if other is None or [Selection(other)] == [selection for selection, _ in own]:
        return own
    if len(own) > 1 or not selector_of(own[0][0]).is_imitated:
        views = " and ".join(name_of_view(selection) for selection, _ in own)
        raise UserError(
            f"algorithms.{algorithm}: learns_from is for objectives of single rows; "
            f"{objective.name!r} learns from {views}"
        )
    return [(Selection(other), {name: value for name, value in own[0][1].items() if name in SINGLE_ROW_OPTIONS})]


def learns_from_samples(views: Views) -> bool:
    """Whether any part learns from samples."""
    return any(selector_of(selection).is_sampled for selection, _ in views)


def fill_buffer(experiment: Experiment, folder: Path, state: Path, seed: int, report: Report) -> dict[str, Any]:
    """Sample the base policy, join the demonstrations, add reference log-probs, and save the buffer in ``folder``."""

    def fill() -> dict[str, Any]:
        return _fill_buffer(experiment, folder, Pieces(state / "samples").within(folder.name), seed, report)

    if not agreed(folder.exists()):  # the piece says that it is there
        return dict(Pieces(state).write(folder.name, fill())) if is_main() else fill()
    return dict(Pieces(state).once(folder.name, fill))


def _fill_buffer(experiment: Experiment, folder: Path, pieces: Pieces, seed: int, report: Report) -> dict[str, Any]:
    policy = load_policy(experiment.model, experiment.training.dtype)
    bad = {name: BadRows(mode) for name, mode in _on_bad_rows(experiment).items()}
    problems = load_problems(experiment.train, bad["train"])
    longest = experiment.training.max_completion_tokens
    if (table := experiment.demonstrations_table) is None:
        rows = demonstrations(policy.tokenizer, problems, longest, bad["train"], policy.row_check())
        buffer: Buffer = OfflineBuffer.from_trajectories(rows)
    else:
        how = longest, table.split, table.columns, bad["demonstrations"], experiment.training.special_tokens
        buffer = read_buffer(table.source, policy.tokenizer, *how, policy.row_check())
    check_buffer(policy, buffer)
    samples: list[Trajectory] = []
    settings, events = experiment.rollouts, list[str]()
    offline = [name for name, row in experiment.algorithms.items() if row.mode == "offline"]
    if any(learns_from_samples(views_of(experiment, name)) for name in offline):
        encoded = encode_problems(policy.tokenizer, problems[: settings.prompts], bad["train"])
        samples = collect_rollouts(
            policy,
            sampler_of(policy, settings),
            encoded,
            reward_of(experiment),
            settings,
            seed=seed,
            token_budget=experiment.training.token_budget,
            progress=_counted(len(encoded), "sampling the base policy", report),
            recompute=not settings.wants_sampler_logp,
            pieces=pieces,
            bad=bad["train"],
        )
        buffer = buffer.concatenate(OfflineBuffer.from_trajectories(samples))
        events += cut_short(samples, settings.max_new_tokens)
    scoring_flops = 0.0
    if experiment.training.behaviour == "current":
        buffer, scored = with_behaviour(buffer, policy, experiment.training.token_budget)
        events += [scored_event(len(scored))] if scored else []
        tokens, completions = (int(buffer.tokens(*names)[scored].sum()) for names in ((), ("completion_ids",)))
        scoring_flops = policy.flops(tokens, completions)
    flops_of: dict[str, float] = {}
    for one in stored_inputs(
        objective_of(experiment, name) for name in offline
    ):  # anew: what is stored may be another's
        report(1.0, f"{one.label} log-probs")
        buffer = with_inputs(buffer, [one], policy, experiment.training.token_budget)
        passes = 1 + (buffer.numbers("temperature") != 1.0)  # one more at the temperature of the sampling
        tokens, completions = (int(passes @ buffer.tokens(*names)) for names in ((), ("completion_ids",)))
        flops_of[one.column] = policy.flops(tokens, completions)
    if is_main():
        buffer.save(folder)
    barrier()
    sampled = sum(len(row.completion_ids) for row in samples)
    tokens = sampled + sum(len(row.prompt_ids) for row in samples)
    return {
        "rows": len(buffer),
        "samples": len(samples),
        "correct": sum((row.reward or 0.0) >= experiment.evaluation.correct_at for row in samples),
        "sampled_tokens": sampled,
        "unscored": unscored((row.reward, row.prompt) for row in samples),
        "mismatch": mismatch(samples),
        "dropped_rows": {name: summary for name, rows in bad.items() if (summary := rows.summary())},
        "events": [*(f"{name}: {event}" for name, rows in bad.items() for event in rows.events()), *events],
        "sampling_flops": 2 * policy.flops(tokens, sampled) + scoring_flops,  # sampled, then scored
        "input_flops": flops_of,
        "token_probabilities": token_probabilities(policy, buffer, experiment.training.token_budget),
    }


def _on_bad_rows(experiment: Experiment) -> dict[str, OnBadRow]:
    """What happens to bad rows of what the shared buffer is filled from."""
    modes = {"train": experiment.train.bad_rows}
    if (table := experiment.demonstrations_table) is not None:
        modes["demonstrations"] = table.bad_rows
    return modes


def evaluate_base(experiment: Experiment, state: Path, report: Report) -> dict[str, Any]:
    """The base policy's scores on all benchmarks, its outcomes, and the first point of the learning curves.

    And what all policies are not evaluated on: the ``dropped_rows`` of benchmarks and validation, and ``events``.
    """
    pieces = Pieces(state)

    def evaluate() -> dict[str, Any]:
        policy = load_policy(experiment.model, experiment.training.dtype)
        bad = _unfit(policy, experiment)
        found = evaluate_all(policy, experiment, "base", -1, None, pieces.within("base"), report)
        drawn = experiment.evaluation.curve_points > 0
        return {
            **found,
            "curve": curve_point(policy, experiment, 0, seed=0) if drawn else None,
            "dropped_rows": {name: summary for name, rows in bad.items() if (summary := rows.summary())},
            "events": [f"{name}: {event}" for name, rows in bad.items() for event in rows.events()],
        }

    return dict(pieces.once("base", evaluate))


def _unfit(policy: Policy, experiment: Experiment) -> dict[str, BadRows]:
    """What is to be told of the rows of each set that policies are evaluated on."""
    sets: dict[str, ProblemSource] = {f"benchmark {name}": source for name, source in experiment.benchmarks.items()}
    sets |= {} if experiment.validation is None else {"validation": experiment.validation}
    bad = {name: BadRows(source.bad_rows) for name, source in sets.items()}
    for name, source in sets.items():
        encoded = encode_problems(policy.tokenizer, load_problems(source, bad[name]), bad[name])
        sampler = sampler_of(policy, experiment.evaluation)
        fit = within_limits(policy, sampler, encoded, experiment.evaluation, bad[name])
        if name != "validation":
            gold_rows(policy, fit, bad[name])
    return bad


def run_cell(
    experiment: Experiment,
    cell: Cell,
    shared: dict[str, Any],
    buffer_path: Path,
    state: Path,
    parts: int,
    report: Report,
) -> dict[str, Any]:
    """Train one cell and evaluate it: on the benchmarks, or on validation where a learning rate is to be chosen.

    In the second case the weights are kept under ``state`` for `evaluate_cell`. Trackers write to logs/ beside it.
    Micro-batches are ``parts`` times smaller than the experiment says, where those did not fit. What was done before
    is taken from ``state``.
    """
    pieces = Pieces(state / "cells")

    def run() -> dict[str, Any]:
        return _run_cell(experiment.in_parts(parts), cell, shared, buffer_path, state, pieces.within(cell.id), report)

    found = dict(pieces.once(cell.id, run))
    if is_main():
        remove(pieces.within(cell.id).folder)
    return found


def _run_cell(
    experiment: Experiment,
    cell: Cell,
    shared: dict[str, Any],
    buffer_path: Path,
    state: Path,
    pieces: Pieces,
    report: Report,
) -> dict[str, Any]:
    import torch

    release_memory()
    torch.manual_seed(cell.seed)
    objective = objective_of(experiment, cell.algorithm)
    settings = experiment.training_of(cell.algorithm).model_copy(update={"learning_rate": cell.learning_rate})
    policy = load_policy(experiment.model, settings.dtype)
    if settings.lora is not None:
        policy.add_lora(**settings.lora.model_dump())
    buffer = OfflineBuffer.load(buffer_path)
    online = experiment.algorithms[cell.algorithm].mode == "online"
    record = TrainingRecord()
    costs = record.costs
    views = views_of(experiment, cell.algorithm)
    sources: list[Source] = []
    split = zip(views, shares(settings.batch_size, len(views)), seeds(views, cell.seed), strict=True)
    for (selection, options), size, own in split:
        if online and selector_of(selection).is_sampled:
            collect = collector_of(experiment, policy, settings, size, own)
            sources.append(FreshSource(collect, selection, **options))
        else:
            sources.append(BufferSource(buffer, buffer.view(selection, **options), size, own))
    if not online:
        if learns_from_samples(views):
            costs.sampled_tokens, costs.flops = shared["sampled_tokens"], shared["sampling_flops"]
        columns = {one.column for one in objective.requires if one.stage is Stage.STORED}
        costs.flops += sum(flops for column, flops in shared["input_flops"].items() if column in columns)
    points = experiment.evaluation.curve_points
    marks = {round(settings.steps * (i + 1) / points) for i in range(points)}

    def along(trainer: Trainer, step: int) -> None:
        report(0.8 * step / settings.steps, f"step {step}/{settings.steps}")
        if step in marks:
            point = curve_point(policy, experiment, step, cell.seed, settings.steps)
            trainer.record.kept.setdefault("curve", []).append(point)

    Trainer(
        policy, objective, sources, settings, [along],
        folder=state.parent / "logs" / cell.id, record=record, checkpoints=pieces.folder / "checkpoints",
    ).run()  # fmt: skip
    result = {
        "algorithm": cell.algorithm,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "costs": record.costs.as_dict(),
        "curve": record.kept.get("curve", []),
        "training": record.plain_steps(),
        "events": record.events,
        "token_probabilities": token_probabilities(policy, buffer, settings.token_budget)["counts"],
    }
    if has_choice(experiment, cell.algorithm):
        assert experiment.validation is not None  # the experiment's validator saw to it
        reward = reward_of(experiment, settings.steps, settings.steps)
        validation = _evaluate(policy, experiment, experiment.validation, reward, cell.seed, brief=True)
        if is_main():
            remove(state / "models" / cell.id)
        save_policy(policy, state / "models" / cell.id)
        return {**result, "validation": validation.metrics["avg_at_k"]}
    found = evaluate_all(
        policy, experiment, cell.algorithm, cell.seed, cell.learning_rate, pieces,
        lambda share, what: report(0.8 + 0.2 * share, what),
    )  # fmt: skip
    return {**result, **found}


def evaluate_cell(experiment: Experiment, cell: Cell, state: Path, parts: int, report: Report) -> dict[str, Any]:
    """The benchmarks of a cell whose learning rate was chosen, from its saved weights."""
    smaller, pieces = experiment.in_parts(parts), Pieces(state / "chosen")

    def evaluate() -> dict[str, Any]:
        policy = load_policy(str(state / "models" / cell.id), experiment.training_of(cell.algorithm).dtype)
        labels = (cell.algorithm, cell.seed, cell.learning_rate)
        return evaluate_all(policy, smaller, *labels, pieces.within(cell.id), report)

    return dict(pieces.once(cell.id, evaluate))


def evaluate_all(
    policy: Policy,
    experiment: Experiment,
    algorithm: str,
    seed: int,
    learning_rate: float | None,
    pieces: Pieces,
    report: Report,
) -> dict[str, Any]:
    """``metrics`` by benchmark and ``outcomes`` of all of them, one row per sample."""
    metrics, outcomes = {}, []
    steps = experiment.training_of(algorithm).steps if algorithm in experiment.algorithms else 0  # the base has none
    for number, (name, source) in enumerate(experiment.benchmarks.items()):
        report(number / len(experiment.benchmarks), f"evaluating {name}")

        def evaluate(name: str = name, source: ProblemSource = source) -> dict[str, Any]:
            reward = reward_of(experiment, steps, steps, benchmark=name)
            return vars(_evaluate(policy, experiment, source, reward, max(seed, 0)))

        found = pieces.once(f"on {name}", evaluate)
        metrics[name] = found["metrics"]
        labels = {"algorithm": algorithm, "seed": seed, "learning_rate": learning_rate, "benchmark": name}
        outcomes += [{**labels, **row} for row in found["outcomes"]]
    return {"metrics": metrics, "outcomes": outcomes}


def curve_point(policy: Policy, experiment: Experiment, step: int, seed: int, max_steps: int = 0) -> dict[str, Any]:
    """A cheap evaluation along training: avg@k on the first problems of each benchmark."""
    settings = experiment.evaluation
    small = settings.model_copy(update={"samples": settings.curve_samples, "k": None})
    metrics = {}
    for name, source in experiment.benchmarks.items():
        problems, bad = load_problems(source)[: settings.curve_problems], BadRows(source.bad_rows)
        reward = reward_of(experiment, step, max_steps, benchmark=name)
        found = evaluate(policy, problems, reward, small, seed, greedy=False, bad=bad, metrics=[AVERAGE])
        metrics[name] = {"avg_at_k": found.metrics["avg_at_k"]}
    return {"step": step, "metrics": metrics}


def token_probabilities(policy: Policy, buffer: Buffer, token_budget: int) -> dict[str, list[float]]:
    """How the probabilities of the demonstrations' tokens are distributed: counts in bins over 0 to 1."""
    sources = buffer.column("source")
    rows = [index for index, source in enumerate(sources) if source == "demonstration"][:PROBED_ROWS]
    picked = [(row.prompt_ids, row.completion_ids) for row in (buffer[index] for index in rows)]
    logps = score_rows(policy, picked, token_budget)
    counts, _ = np.histogram(np.exp([x for row in logps for x in row]), bins=EDGES)
    return {"edges": EDGES.tolist(), "counts": counts.tolist()}


def _evaluate(
    policy: Policy, experiment: Experiment, source: ProblemSource, reward: Reward, seed: int, brief: bool = False
) -> Evaluation:
    """All metrics, or avg@k alone."""
    problems, bad = load_problems(source), BadRows(source.bad_rows)
    metrics = [AVERAGE] if brief else None
    budget = experiment.training.token_budget
    return evaluate(
        policy, problems, reward, experiment.evaluation, seed,
        greedy=not brief, bad=bad, metrics=metrics, token_budget=budget,
    )  # fmt: skip


def collector_of(experiment: Experiment, policy: Policy, training: Training, batch_size: int, seed: int) -> Collector:
    """What samples the training problems anew for a cell in training."""
    bad = BadRows(experiment.train.bad_rows)
    problems, settings = load_problems(experiment.train, bad), experiment.rollouts
    sampler = sampler_of(policy, settings)
    return Collector(policy, sampler, problems, reward_of(experiment), settings, training, seed, batch_size, bad)


def _counted(total: int, what: str, report: Report) -> Callable[[int], None]:
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        report(done / total, f"{what} {done}/{total}")

    return advance
