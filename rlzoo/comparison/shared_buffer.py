"""The buffer that all cells of a comparison, or all objectives of an analysis, learn from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlzoo.buffers import Buffer, OfflineBuffer, read_buffer
from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.card import buffer_card
from rlzoo.buffers.problems import Problem, each_demonstration, encode_problems, load_problems
from rlzoo.comparison.resolve import learns_from_samples, objective_of, reward_of, views_of
from rlzoo.config import Experiment, OnBadRow, TokenBudget, Training
from rlzoo.document.estimates import number
from rlzoo.inputs import Stage
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.jobs.outputs import write_atomically
from rlzoo.jobs.progress import Report, counting
from rlzoo.jobs.ranks import agreed, barrier, is_main
from rlzoo.jobs.sharing import CARD
from rlzoo.objective import Objective
from rlzoo.policy import Policy, log_probs
from rlzoo.policy.defaults import resolved
from rlzoo.policy.loading import load_for
from rlzoo.policy.sequences import learned, learned_tokens, length
from rlzoo.rollout import collect_rollouts, cut_short, engine_of, mismatch, sampler_of, scorable, unscored
from rlzoo.training import Costs, behaviour_event, check_buffer, stored_inputs, with_behaviour, with_inputs
from rlzoo.training.schedule import check_budget
from rlzoo.types import Trajectory

EDGES = np.linspace(0, 1, 21)
"""The edges of the bins for token probabilities."""
PROBED_ROWS = 256
"""How many demonstrations have their token probabilities counted before and after training."""


def check_model(experiment: Experiment, report: Report) -> None:
    """Load the base policy, so that a failure is found early. Raises UserError if it cannot be loaded."""
    report(0.0, "loading")
    load_for(experiment.model, experiment.training)


def fill_buffer(experiment: Experiment, folder: Path, state: Path, seed: int, report: Report) -> dict[str, Any]:
    """Make the shared buffer in ``folder``: demonstrations, samples of the base policy, and reference log-probs.

    Returns plain data about it, such as the number of rows; results cached under ``state`` are not computed again.
    """

    def fill() -> dict[str, Any]:
        return _fill_buffer(experiment, folder, CachedResults(state / "samples").within(folder.name), seed, report)

    if not agreed(folder.exists()):  # even if there is a cached result
        return dict(CachedResults(state).write(folder.name, fill())) if is_main() else fill()
    return dict(CachedResults(state).once(folder.name, fill))


def costs_before(experiment: Experiment, algorithm: str, shared: Mapping[str, Any]) -> Costs:
    """What a cell of an algorithm costs before its first step: the work for the ``shared`` buffer that it needs.

    Samples are charged to each cell that learns from them, stored inputs to each cell whose objective requests them.
    """
    costs = Costs()
    if experiment.algorithms[algorithm].mode == "offline":
        if learns_from_samples(views_of(experiment, algorithm)):
            costs.sampled_tokens, costs.flops = shared["sampled_tokens"], shared["sampling_flops"]
        requires = objective_of(experiment, algorithm).requires
        columns = {one.column for one in requires if one.stage is Stage.STORED}
        costs.flops += sum(flops for column, flops in shared["input_flops"].items() if column in columns)
    return costs


def check_budgets(experiment: Experiment, shared: Mapping[str, Any]) -> None:
    """Raise UserError naming a row whose budget is spent by its part in the ``shared`` buffer."""
    for name in experiment.single_rows:
        if (budget := experiment.training_of(name).budget) is not None:
            check_budget(budget, getattr(costs_before(experiment, name, shared), budget.cost), name)


def _fill_buffer(
    experiment: Experiment, folder: Path, cached: CachedResults, seed: int, report: Report
) -> dict[str, Any]:
    policy = load_for(experiment.model, experiment.training)
    bad = {name: BadRows(mode) for name, mode in _on_bad_rows(experiment).items()}
    problems = load_problems(experiment.train, bad["train"])
    longest, whole = experiment.training.max_completion_tokens, experiment.training.max_length
    if (table := experiment.demonstrations_table) is None:
        rows = demonstrations_of(policy, problems, experiment.training, bad["train"])
        buffer: Buffer = OfflineBuffer.from_trajectories(rows)
    else:
        how = longest, table.split, table.columns, bad["demonstrations"], experiment.training.special_tokens
        buffer = read_buffer(table.source, policy.tokenizer, *how, policy.row_check(), whole, experiment.training.turns)
    check_buffer(policy, buffer)
    samples: list[Trajectory] = []
    settings, events = experiment.rollouts, list[str]()
    offline = [name for name, row in experiment.single_rows.items() if row.mode == "offline"]
    if any(learns_from_samples(views_of(experiment, name)) for name in offline):
        encoded = encode_problems(policy.tokenizer, problems[: settings.prompts], bad["train"])
        encoded = scorable(reward_of(experiment), encoded, bad["train"])
        samples = collect_rollouts(
            policy,
            sampler_of(policy, settings),
            encoded,
            reward_of(experiment),
            settings,
            seed=seed,
            token_budget=experiment.training.token_budget,
            progress=counting(len(encoded), "sampling the base policy", report),
            recompute=not settings.wants_sampler_logp,
            cached=cached,
            bad=bad["train"],
        )
        buffer = buffer.concatenate(OfflineBuffer.from_trajectories(samples))
        events += cut_short(samples, settings.max_new_tokens)
    behaviour_flops = 0.0
    if experiment.training.behaviour == "current":
        buffer, computed = with_behaviour(buffer, policy, experiment.training.token_budget)
        events += [behaviour_event(len(computed))] if computed else []
        tokens, completions = (int(buffer.tokens(*names)[computed].sum()) for names in ((), ("completion_ids",)))
        behaviour_flops = policy.flops(tokens, completions)
    buffer, flops_of = with_stored_inputs(
        buffer, [objective_of(experiment, name) for name in offline], policy, experiment.training.token_budget, report
    )
    if is_main():
        buffer.save(folder)
    barrier()
    return {
        "rows": len(buffer),
        "samples": len(samples),
        "correct": sum((row.reward or 0.0) >= experiment.evaluation.correct_at for row in samples),
        "sampled_tokens": sum(map(learned_tokens, samples)),
        "unscored": unscored((row.reward, row.prompt) for row in samples),
        "mismatch": mismatch(samples),
        "dropped_rows": {name: summary for name, rows in bad.items() if (summary := rows.summary())},
        "events": [*(f"{name}: {event}" for name, rows in bad.items() for event in rows.events()), *events],
        "sampling_flops": flops_of_sampling(policy, samples) + behaviour_flops,
        "input_flops": flops_of,
        "resolved": resolved(policy, experiment.training, engine_of(settings, policy)),
        "token_probabilities": token_probabilities(policy, buffer, experiment.training.token_budget),
    }


def flops_of_sampling(policy: Policy, samples: Sequence[Trajectory]) -> float:
    """The FLOPs of sampling rows, and then computing their log-probs."""
    return 2 * policy.flops(sum(map(length, samples)), sum(map(learned_tokens, samples)))


def write_card(experiment: Experiment, folder: Path, seed: int, shared: Mapping[str, Any], lead: str) -> None:
    """Write the card of a shared buffer into its folder, where ``lead`` says in a sentence what it is.

    ``experiment`` is as the user gave it, with its warm-up.
    """
    if is_main():
        flops = shared["sampling_flops"] + sum(shared["input_flops"].values())
        name, buffer = f"{experiment.name}, {folder.name}", OfflineBuffer.load(folder)
        card = card_of(experiment, buffer, name, lead, seed, shared["sampled_tokens"], flops)
        write_atomically(folder / CARD, card)


def card_of(
    experiment: Experiment, buffer: Buffer, name: str, lead: str, seed: int, sampled_tokens: int, flops: float
) -> str:
    """The card of a buffer that was filled as an experiment says, at these costs; see `buffer_card`."""
    config = experiment.model_dump(mode="json")
    parts = ("model", "warm_up", "train", "demonstrations", "reward", "scoring", "rollouts")
    table, sampling, train = experiment.demonstrations_table, experiment.rollouts, experiment.train
    origin: dict[str, Any] = {
        "problems": train.source if train.source.startswith("world:") else f"{train.source}, split {train.split}",
        "demonstrations": None if table is None else table.source,
    }
    if sampled_tokens:
        origin |= {
            "sampled from": f"{experiment.model} after a warm-up" if experiment.warm_up else experiment.model,
            "samples per prompt": sampling.samples,
            "temperature": f"{sampling.temperature:g}",
            "top_p": f"{sampling.top_p:g}",
            "length limit": f"{sampling.max_new_tokens:,} tokens",
            "reward": config["reward"],
            "seed": str(seed),
            "cost": f"{sampled_tokens:,} sampled tokens, {number(flops)} FLOPs",
        }
    sources = train.source, None if table is None else table.source
    asked = {key: config[key] for key in parts} | {"seed": seed}
    return buffer_card(buffer, name, lead, origin, asked, sources)


def demonstrations_of(
    policy: Policy, problems: Sequence[Problem], training: Training, bad: BadRows
) -> Iterator[Trajectory]:
    """The worked solutions of problems as rows that fit the model, cut to the limits of ``training``.

    Raises UserError for a bad row, unless ``bad`` drops it.
    """
    limits = training.max_completion_tokens, bad, policy.row_check(), training.max_length
    return each_demonstration(policy.tokenizer, problems, *limits)


def with_stored_inputs(
    buffer: Buffer, objectives: Iterable[Objective], policy: Policy, token_budget: TokenBudget, report: Report
) -> tuple[Buffer, dict[str, float]]:
    """The buffer with the stored inputs of objectives, computed from ``policy``, and the FLOPs of each by column.

    Those that the buffer has are computed again: they may be of another model.
    """
    flops_of: dict[str, float] = {}
    for one in stored_inputs(objectives):
        report(1.0, f"{one.label} log-probs")
        buffer = with_inputs(buffer, [one], policy, token_budget)
        passes = 1 + (buffer.numbers("temperature") != 1.0)  # one more at the sampling temperature
        tokens, completions = (int(passes @ buffer.tokens(*names)) for names in ((), ("completion_ids",)))
        flops_of[one.column] = policy.flops(tokens, completions)
    return buffer, flops_of


def _on_bad_rows(experiment: Experiment) -> dict[str, OnBadRow]:
    """What happens to bad rows in each of the tables that fill the shared buffer."""
    modes = {"train": experiment.train.bad_rows}
    if (table := experiment.demonstrations_table) is not None:
        modes["demonstrations"] = table.bad_rows
    return modes


def token_probabilities(policy: Policy, buffer: Buffer, token_budget: TokenBudget) -> dict[str, list[float]]:
    """A histogram of the probabilities of the demonstrations' learned tokens over [0, 1]: ``edges`` and ``counts``."""
    sources = buffer.column("source")
    rows = [index for index, source in enumerate(sources) if source == "demonstration"][:PROBED_ROWS]
    picked = buffer.at(rows)
    logps = log_probs(policy, [(row.prompt_ids, row.completion_ids) for row in picked], token_budget)
    own = [logp[at] for row, logp in zip(picked, logps, strict=True) for at in learned(row)]
    counts, _ = np.histogram(np.exp(own), bins=EDGES)
    return {"edges": EDGES.tolist(), "counts": counts.tolist()}
