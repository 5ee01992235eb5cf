"""From a policy and problems to buffer rows: sampling, scoring and behaviour log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np

from rlzoo.buffers.bad_rows import BadRows, collecting
from rlzoo.buffers.files import BATCH
from rlzoo.buffers.problems import EncodedProblem, trajectory
from rlzoo.buffers.spooled import kept
from rlzoo.config import Sampling, TokenBudget
from rlzoo.errors import UserError
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.policy import Policy
from rlzoo.policy.microbatches import log_probs, log_probs_and_nuclei
from rlzoo.policy.sequences import learned
from rlzoo.reward import Reward, get_reward
from rlzoo.rollout.sampler import Finished, Sample, Sampler, by_length, room_after
from rlzoo.rollout.scoring import Scorer, columns_of, score_samples
from rlzoo.types import Trajectory


def collect_rollouts(
    policy: Policy,
    sampler: Sampler,
    problems: Sequence[EncodedProblem],
    reward: Any,
    settings: Sampling,
    seed: int,
    version: int = 0,
    token_budget: TokenBudget = 8192,
    progress: Callable[[int], None] | None = None,
    recompute: bool = True,
    cached: CachedResults | None = None,
    bad: BadRows | None = None,
) -> list[Trajectory]:
    """Sample ``settings.samples`` completions per problem and score them; ``reward`` is what `get_reward` takes.

    Behaviour log-probs are those of the policy at the sampling temperature, as in training, so that ratios start at 1;
    they do not include ``top_p`` (docs/interface.md says why). The policy recomputes them with the trainer's numerics,
    whichever engine sampled; without ``recompute`` they are the engine's own, if it reports them. Those are relative to
    the nucleus, so the policy's log-probability of the nucleus is added to them.

    Samples are cached in ``cached``, if given. ``progress`` is called with the number of prompts just done. Values that
    a reward logs for a completion become columns of its row; metrics of a call are stored with the reward's components.
    Raises UserError for a problem that the model cannot take, unless ``bad`` drops it, and as `Reward.score` does.
    """
    problems = within_limits(policy, sampler, problems, settings, bad)
    with Scorer(get_reward(reward), problems) as scorer:
        sampled = _sampled(
            sampler, [problem.ids for problem in problems], settings, seed, progress, cached, scorer.begin
        )
        flat = [(problem, sample) for problem, samples in zip(problems, sampled, strict=True) for sample in samples]
        scorer.begin_all(sampled)
        sampler.rest()
        recomputed, engine, recompute = _behaviour(policy, flat, settings, token_budget, recompute)
        scores = [score for score, _ in scorer.end()]
    return [
        trajectory(
            problem,
            sample.text,
            sample.ids,
            source="policy",
            reward=score.value,
            reward_components={**score.metrics, **score.components},
            logged=score.extra,
            behaviour_logp=behaviour,
            sampler_logp=other if recompute else None,  # no mismatch to measure if it is the behaviour log-prob itself
            policy_version=version,
            truncated=sample.truncated,
            completion_mask=sample.mask,
            completion_messages=sample.messages,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        for (problem, sample), score, behaviour, other in zip(
            flat, scores, recomputed if recompute else engine, engine, strict=True
        )
    ]


def _behaviour(
    policy: Policy,
    flat: Sequence[tuple[EncodedProblem, Sample]],
    settings: Sampling,
    token_budget: TokenBudget,
    recompute: bool,
) -> tuple[list[list[float]], list[list[float] | None], bool]:
    """Log-probs of the policy and of the engine, the latter without top-p, and whether the former are used."""
    rows = [(problem.ids, sample.ids) for problem, sample in flat]
    engine = [sample.logp for _, sample in flat]
    recompute = recompute or None in engine
    recomputed: list[list[float]] = []
    if settings.top_p < 1.0 and any(engine):
        found = log_probs_and_nuclei(policy, rows, token_budget, settings.temperature, settings.top_p)
        recomputed = [logp for logp, _ in found]
        engine = [logp and _sums(logp, nucleus) for logp, (_, nucleus) in zip(engine, found, strict=True)]
    elif recompute:
        recomputed = log_probs(policy, rows, token_budget, settings.temperature)
    return recomputed, engine, recompute


def _sums(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _sampled(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    settings: Sampling,
    seed: int,
    progress: Callable[[int], None] | None,
    cached: CachedResults | None,
    finished: Finished,
) -> list[list[Sample]]:
    """The samples of each prompt; with ``cached``, in portions that do not depend on interruptions."""
    if cached is None:
        with sampler.reporting_to(finished):
            return sampler.sample(prompts, settings, seed, progress=progress)
    order, size = by_length(prompts, range(len(prompts))), sampler.portion(settings)
    found: dict[int, list[Sample]] = {}
    for start in range(0, len(order), size):
        places = order[start : start + size]

        def sample(places: list[int] = places) -> list[Any]:
            with sampler.reporting_to(lambda at, some: finished(places[at], some)):
                made = sampler.sample([prompts[i] for i in places], settings, seed, progress=progress, numbers=places)
            return [[[astuple(one) for one in some] for some in made], sampler.state()]

        made, state = cached.once(f"samples-{seed}-{start}", sample)
        sampler.restore(state)
        for place, some in zip(places, made, strict=True):
            found[place] = [Sample(*one) for one in some]
            finished(place, found[place])
    return [found[place] for place in range(len(prompts))]


def mismatch(rows: Sequence[Trajectory]) -> dict[str, float] | None:
    """The mismatch between the log-probs of the sampling engine and the trainer, over all learned tokens.

    With Δ = log π - log π_engine: ``mean_absolute`` and ``largest`` |Δ| in nats, ``mean_ratio`` of exp(Δ) (1 in
    expectation if the engine samples from the distribution that it reports), and ``kl``, the k3 estimate
    exp(Δ) - 1 - Δ of KL(π_engine ‖ π) per token, in nats. None if no row has the engine's log-probs.
    """
    both = [
        (np.asarray(row.behaviour_logp)[learned(row)], np.asarray(row.sampler_logp)[learned(row)])
        for row in rows
        if row.behaviour_logp and row.sampler_logp
    ]
    if not both:
        return None
    ours, theirs = map(np.concatenate, zip(*both, strict=True))
    gap = ours - theirs
    return {
        "tokens": len(gap),
        "mean_absolute": float(np.abs(gap).mean()),
        "largest": float(np.abs(gap).max()),
        "mean_ratio": float(np.exp(gap).mean()),
        "kl": float((np.expm1(gap) - gap).mean()),
    }


def within_limits(
    policy: Policy, sampler: Sampler, problems: Sequence[EncodedProblem], settings: Sampling, bad: BadRows | None = None
) -> Sequence[EncodedProblem]:
    """The problems that the model can take: each token has an embedding, and the prompt leaves room for a completion.

    Problems after which a sampler with ``bound_by_context`` has less room than ``max_new_tokens`` are counted in
    ``bad``. Raises UserError for a problem that the model cannot take, by name, unless ``bad`` drops it.
    """
    with collecting(bad) as bad:
        fit = kept(_fit(policy, problems, settings, sampler.bound_by_context, bad))
        if problems:
            bad.require_some(len(fit))
    return fit


def _fit(
    policy: Policy, problems: Sequence[EncodedProblem], settings: Sampling, bound: bool, bad: BadRows
) -> Iterator[EncodedProblem]:
    for encoded in problems:
        room, size = settings.max_new_tokens, len(encoded.ids)
        good = False
        with bad.at(encoded.problem.label):
            policy.check_range(max(encoded.ids), min(encoded.ids))
            if bound or policy.positions is not None:
                room = room_after(policy, size, settings)
            good = True
        if good and bound and room < settings.max_new_tokens:
            kind = (
                f"completions have less room than max_new_tokens, as the model's context is {policy.context:,} tokens"
            )
            bad.note(encoded.problem.label, {kind: f"{room} tokens after a prompt of {size}"})
        if good:
            yield encoded


def scorable(reward: Reward, problems: Sequence[EncodedProblem], bad: BadRows) -> Sequence[EncodedProblem]:
    """The problems with completions that the reward gives a value, if ``bad`` drops bad rows; else all.

    If the reward of an empty completion is None, as for a gold answer that it cannot read, so are those of the samples,
    from which nothing could be learned; ``bad`` counts these problems. Raises UserError if no other problem is left.
    """
    if bad.mode != "drop" or not problems:
        return problems
    found = kept(_scorable(reward, problems, bad))
    if not found:
        raise UserError("the reward is None for every problem, as for gold answers that it cannot read: change column")
    return found


def _scorable(reward: Reward, problems: Sequence[EncodedProblem], bad: BadRows) -> Iterator[EncodedProblem]:
    names, nothing = columns_of(problems), Sample([], "", truncated=False)
    for start in range(0, len(problems), BATCH):
        some = problems[start : start + BATCH]
        for one, score in zip(some, score_samples(reward, [(p, nothing) for p in some], names), strict=True):
            if score.value is not None:
                yield one
                continue
            kind = "problems not sampled, because their reward is None, as for an unreadable gold answer"
            bad.note(one.problem.label, {kind: "its reward is None"})


def cut_short(rows: Sequence[Trajectory], limit: int) -> list[str]:
    """A line with the number of samples that reached ``max_new_tokens``, the ``limit``; empty if there are none."""
    cut = sum(row.truncated for row in rows)
    return [f"{cut:,} of {len(rows):,} samples were truncated at max_new_tokens ({limit})"] if cut else []


def unscored(scored: Iterable[tuple[float | None, str]]) -> str | None:
    """A line about samples without a reward, given pairs of reward and prompt; None if all have one."""
    rows = list(scored)
    without = [prompt for reward, prompt in rows if reward is None]
    if not without:
        return None
    first = " ".join(without[0].split())
    cause = "the reward returned None, as it does for a missing gold answer"
    return f"{len(without)} of {len(rows)} samples have no reward ({cause}); the first has the prompt {first[-100:]!r}"
