"""Evaluation: sample each problem at temperature T and once greedily, score the samples, and compute metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rlzoo.buffers.bad_rows import BadRows, collecting
from rlzoo.buffers.problems import EncodedProblem, Problem, demonstrations, encode_problems
from rlzoo.config import EvaluationSettings, TokenBudget
from rlzoo.errors import UserError
from rlzoo.evaluation.metrics import ProblemSamples, get_metrics, metric_table
from rlzoo.policy import Policy, log_probs
from rlzoo.reward import get_reward
from rlzoo.reward.calling import means
from rlzoo.rollout import Sample, Sampler, sampler_of
from rlzoo.rollout.rollouts import within_limits
from rlzoo.rollout.scoring import Scored, Scorer
from rlzoo.types import Trajectory


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a policy on a problem set, and the outcome of every sample."""

    metrics: dict[str, float]
    """Metrics by name, such as ``avg_at_k``, with ``k`` and ``samples``; and ``reward/NAME`` for the metric NAME that
    the reward logged."""
    outcomes: list[dict[str, Any]]
    """One row per sample: problem_id, prompt, decoding, sample, reward, correct, length, truncated, text. Where they
    exist, also ``logged`` and ``components`` of the reward as JSON, the ``answer`` that the reward extracts from the
    text, the ``reference`` of the problem, and ``gold_logp``, the sum of the log-probs of the problem's ``gold_tokens``
    gold tokens, in nats."""


def evaluate(
    policy: Policy,
    problems: Sequence[Problem],
    reward: Any,
    settings: EvaluationSettings | None = None,
    seed: int = 0,
    sampler: Sampler | None = None,
    greedy: bool = True,
    progress: Callable[[int], None] | None = None,
    bad: BadRows | None = None,
    metrics: Sequence[Any] | None = None,
    token_budget: TokenBudget = 8192,
) -> Evaluation:
    """Sample each problem ``settings.samples`` times, and once greedily, score the completions, and compute metrics.

    ``reward`` is anything that `get_reward` takes, such as a plain function; each of ``metrics`` is anything that
    `get_metrics` takes (None: all of `metric_table`). ``token_budget`` applies to micro-batches of gold completions.
    ``progress`` is called with the number of sequences that were sampled since its last call.

    A sample is correct if its reward is at least ``settings.correct_at``; without a reward it counts as wrong. A
    problem that cannot be encoded, or that the model cannot take, is an error unless ``bad`` drops it; solutions of
    that kind are left out of the log-likelihood. Raises UserError for an empty set of problems, k > samples, and a
    metric that fails.
    """
    settings, reward = settings or EvaluationSettings(), get_reward(reward)
    if not problems:
        raise UserError("there are no problems to evaluate on: give a problem set with at least one row")
    if (most := max(settings.pass_ks)) > settings.samples:
        raise UserError(f"pass@{most} needs as many samples, and there are {settings.samples}: change k or samples")
    table = (
        metric_table(settings, reward.components)
        if metrics is None
        else [metric for spec in metrics for metric in get_metrics(spec)]
    )
    sampler = sampler or sampler_of(policy, settings)
    encoded = within_limits(policy, sampler, encode_problems(policy.tokenizer, problems, bad), settings, bad)
    needs = {need for metric in table for need in metric.needs}
    gold: Sequence[Sequence[Sequence[float]]] = [()] * len(encoded)
    with ExitStack() as stack:  # samples are scored while greedy ones are sampled, and these beside the last
        passes = []
        for of in (False, True) if greedy else (False,):
            scorer = stack.enter_context(Scorer(reward, encoded, "answer" in needs))
            with sampler.reporting_to(scorer.begin):
                each = _in_sequences(progress, 1 if of else settings.samples)
                made = sampler.sample([one.ids for one in encoded], settings, seed, greedy=of, progress=each)
            scorer.begin_all(made)
            passes.append((made, scorer))
        sampler.rest()
        if "gold_logp" in needs:
            gold = _gold_logp(policy, encoded, bad, token_budget)
        (sampled, logged), *others = [
            _outcomes(encoded, made, scorer.end(), settings, decoding)
            for (made, scorer), decoding in zip(passes, ("sample", "greedy"), strict=False)
        ]
    best = [row for rows, _ in others for row in rows]
    n = settings.samples
    seen = []
    for i, one in enumerate(encoded):
        of_problem = sampled[n * i : n * (i + 1)]
        if gold[i]:
            told = {"gold_logp": sum(map(sum, gold[i])), "gold_tokens": sum(map(len, gold[i]))}
            for row in (*of_problem, *best[i : i + 1]):
                row |= told
        seen.append(ProblemSamples(one.problem, of_problem, best[i] if greedy else None, gold[i]))
    numbers = {metric.name: metric.average(seen) for metric in table}
    found = {name: value for name, value in numbers.items() if value is not None}
    found |= {"k": settings.pass_k, "samples": n, **{f"reward/{name}": value for name, value in logged.items()}}
    return Evaluation(found, sampled + best)


def _in_sequences(progress: Callable[[int], None] | None, copies: int) -> Callable[[int], None] | None:
    """A sampler's ``progress``, which is told of prompts, in sequences: ``copies`` per prompt."""
    return None if progress is None else lambda prompts: progress(copies * prompts)


def gold_rows(policy: Policy, problems: Sequence[EncodedProblem], bad: BadRows | None = None) -> list[list[Trajectory]]:
    """The gold completions of each problem, without those that cannot be encoded or that the model cannot take."""
    rows: dict[str, list[Trajectory]] = {encoded.problem.id: [] for encoded in problems}
    unfit = BadRows("drop")
    for row in demonstrations(policy.tokenizer, [one.problem for one in problems], None, unfit, policy.row_check()):
        rows[row.prompt_id].append(row)
    with collecting(bad) as bad:
        for place in unfit.places:
            reason = unfit.first[0].removeprefix(place).lstrip(": ")  # `note` names the place again
            bad.note(place, {"gold completions without a log-likelihood": reason})
    return [rows[encoded.problem.id] for encoded in problems]


def _gold_logp(
    policy: Policy, problems: Sequence[EncodedProblem], bad: BadRows | None, token_budget: TokenBudget
) -> list[list[list[float]]]:
    """The log-probs, per token, of each problem's gold completions, at temperature 1 and in nats."""
    rows = gold_rows(policy, problems, bad)
    flat = [(row.prompt_ids, row.completion_ids) for some in rows for row in some]
    logps = iter(log_probs(policy, flat, token_budget))
    return [[next(logps) for _ in some] for some in rows]


def _reference(problem: Problem) -> str | None:
    """What a reader compares completions with: the first worked solution, else the column ``answer``, if any."""
    answer = problem.columns.get("answer")
    return problem.solutions[0] if problem.solutions else None if answer is None else str(answer)


def _outcomes(
    problems: Sequence[EncodedProblem],
    sampled: Sequence[list[Sample]],
    scored: Sequence[Scored],
    settings: EvaluationSettings,
    decoding: str,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """One row per sample, and the means of the metrics that the reward logged."""
    flat = [(p, n, s) for p, samples in zip(problems, sampled, strict=True) for n, s in enumerate(samples)]
    rows = [
        {
            "problem_id": problem.problem.id,
            "prompt": problem.text,
            "decoding": decoding,
            "sample": number,
            "reward": score.value,
            "correct": score.value is not None and score.value >= settings.correct_at,
            "length": sample.length,
            "truncated": sample.truncated,
            "text": sample.text,
            **({"logged": json.dumps(score.extra)} if score.extra else {}),
            **({"components": json.dumps(score.components)} if len(score.components) > 1 else {}),
            **({} if answer is None else {"answer": answer}),
            **({} if (reference := _reference(problem.problem)) is None else {"reference": reference}),
        }
        for (problem, number, sample), (score, answer) in zip(flat, scored, strict=True)
    ]
    return rows, means([score.metrics for score, _ in scored])
