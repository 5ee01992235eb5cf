"""Evaluation: avg@k and pass@k from samples at temperature T, and the greedy score, on any problem set."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlzoo.bad_rows import BadRows
from rlzoo.config import EvaluationSettings
from rlzoo.errors import UserError
from rlzoo.estimators import pass_at_k
from rlzoo.policy import Policy
from rlzoo.problems import Encoded, Problem, encode_problems
from rlzoo.reward import Reward, get_reward
from rlzoo.reward_call import means
from rlzoo.rollout import Sampler, sampler_of
from rlzoo.rollout.rollouts import judge, within_limits


@dataclass(frozen=True)
class Evaluation:
    """Scores of one policy on one problem set, and the outcome of every sample behind them."""

    metrics: dict[str, float]
    """``avg_at_k``, ``greedy``, ``pass_at_k`` as fractions, ``k``, ``samples``, ``mean_length`` in tokens,
    ``truncated`` as a fraction, and ``reward/NAME`` for what the reward logged as the metric NAME of the samples."""
    outcomes: list[dict[str, Any]]
    """One row per sample: problem_id, prompt, decoding, sample, reward, correct, length, truncated, text; and
    ``logged``, as JSON, where the reward logged anything of it."""


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
) -> Evaluation:
    """Sample each problem ``settings.samples`` times, and once greedily, and score the answers.

    ``reward`` is anything that `get_reward` takes, such as a plain function.

    A sample with a reward of ``settings.correct_at`` or more is correct; a null reward counts as wrong.
    pass@k is the unbiased estimate of arXiv 2107.03374. A problem that cannot be encoded, or that the model cannot
    take, is an error, or goes to ``bad``. Raises UserError for no problems or k > samples.
    """
    settings, reward = settings or EvaluationSettings(), get_reward(reward)
    if not problems:
        raise UserError("there are no problems to evaluate on: give a problem set with at least one row")
    if settings.pass_k > settings.samples:
        raise UserError(f"pass@{settings.pass_k} needs as many samples, and there are {settings.samples}: change one")
    sampler = sampler or sampler_of(policy, settings)
    encoded = within_limits(policy, sampler, encode_problems(policy.tokenizer, problems, bad), settings, bad)
    sampled, logged = _outcomes(sampler, encoded, reward, settings, seed, False, progress)
    best = _outcomes(sampler, encoded, reward, settings, seed, True, progress)[0] if greedy else []
    correct = np.array([row["correct"] for row in sampled]).reshape(len(encoded), settings.samples)
    hits, n = correct.sum(1), np.full(len(encoded), settings.samples)
    metrics = {
        "avg_at_k": float(correct.mean()),
        "pass_at_k": float(np.mean(pass_at_k(hits, n, settings.pass_k))),
        "k": settings.pass_k,
        "samples": settings.samples,
        "mean_length": float(np.mean([row["length"] for row in sampled])),
        "truncated": float(np.mean([row["truncated"] for row in sampled])),
    }
    metrics |= {f"reward/{name}": value for name, value in logged.items()}
    if greedy:
        metrics["greedy"] = float(np.mean([row["correct"] for row in best]))
    return Evaluation(metrics, sampled + best)


def _outcomes(
    sampler: Sampler,
    problems: Sequence[Encoded],
    reward: Reward,
    settings: EvaluationSettings,
    seed: int,
    greedy: bool,
    progress: Callable[[int], None] | None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """One row per sample, and the means of what the reward logged."""
    sampled = sampler.sample([p.ids for p in problems], settings, seed, greedy=greedy, progress=progress)
    flat = [(p, n, s) for p, samples in zip(problems, sampled, strict=True) for n, s in enumerate(samples)]
    scores = judge(reward, [(p, s) for p, _, s in flat])
    rows = [
        {
            "problem_id": problem.problem.id,
            "prompt": problem.text,
            "decoding": "greedy" if greedy else "sample",
            "sample": number,
            "reward": score.value,
            "correct": score.value is not None and score.value >= settings.correct_at,
            "length": len(sample.ids),
            "truncated": sample.truncated,
            "text": sample.text,
            **({"logged": json.dumps(score.extra)} if score.extra else {}),
        }
        for (problem, number, sample), score in zip(flat, scores, strict=True)
    ]
    return rows, means([score.metrics for score in scores])
