"""From a policy and problems to buffer rows: sampled, judged, with behaviour log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlzoo.config import Sampling
from rlzoo.policy import Policy
from rlzoo.policy.policy import score_rows
from rlzoo.problems import Encoded, trajectory
from rlzoo.ranks import agreed
from rlzoo.reward import Reward, Score
from rlzoo.rollout.sampler import Sample, Sampler
from rlzoo.types import Trajectory


def collect_rollouts(
    policy: Policy,
    sampler: Sampler,
    problems: Sequence[Encoded],
    reward: Reward,
    settings: Sampling,
    seed: int,
    version: int = 0,
    token_budget: int = 8192,
    progress: Callable[[int], None] | None = None,
    recompute: bool = True,
) -> list[Trajectory]:
    """Sample each problem ``settings.samples`` times and judge the completions.

    Behaviour log-probs are those of the distribution that was sampled from (temperature and top_p applied),
    recomputed by the policy itself: in the trainer's numerics, whatever engine sampled. Without ``recompute`` they are
    the engine's own, where it gives any.
    """
    sampled = sampler.sample([p.ids for p in problems], settings, seed, progress=progress)
    flat = [(problem, sample) for problem, samples in zip(problems, sampled, strict=True) for sample in samples]
    scores = agreed(judge(reward, flat))
    own = [sample.logp for _, sample in flat]
    logps = [logp for logp in own if logp is not None]
    recompute = recompute or len(logps) < len(own)
    if recompute:
        rows = [(p.ids, s.ids) for p, s in flat]
        logps = score_rows(policy, rows, token_budget, settings.temperature, settings.top_p)
    return [
        trajectory(
            problem,
            sample.text,
            sample.ids,
            source="policy",
            reward=score.value,
            reward_parts=score.parts,
            behaviour_logp=logp,
            sampler_logp=sample.logp if recompute else None,  # held against itself it would say that all is well
            policy_version=version,
            truncated=sample.truncated,
        )
        for (problem, sample), score, logp in zip(flat, scores, logps, strict=True)
    ]


def mismatch(rows: Sequence[Trajectory]) -> dict[str, float] | None:
    """How far the sampling engine's log-probs are from those of the trainer, over all tokens; None if there are none.

    ``mean_absolute`` and ``largest`` |Δ| in nats, ``mean_ratio`` of π/π_engine (1 if the engine samples from what it
    says), and ``kl``, the k3 estimate of KL(π_engine, π) a token, in nats.
    """
    both = [(r.behaviour_logp, r.sampler_logp) for r in rows if r.behaviour_logp and r.sampler_logp]
    if not both:
        return None
    ours, theirs = (np.concatenate([np.asarray(pair[side]) for pair in both]) for side in (0, 1))
    gap = ours - theirs
    return {
        "tokens": len(gap),
        "mean_absolute": float(np.abs(gap).mean()),
        "largest": float(np.abs(gap).max()),
        "mean_ratio": float(np.exp(gap).mean()),
        "kl": float((np.expm1(gap) - gap).mean()),
    }


def judge(reward: Reward, answered: Sequence[tuple[Encoded, Sample]]) -> list[Score]:
    """The reward of each completion; conversational problems get conversational completions, as in TRL."""
    prompts = [p.problem.prompt for p, _ in answered]
    completions = [
        s.text if isinstance(p.problem.prompt, str) else [{"role": "assistant", "content": s.text}] for p, s in answered
    ]
    names = {name for p, _ in answered for name in p.problem.columns}
    columns = {name: [p.problem.columns.get(name) for p, _ in answered] for name in sorted(names)}
    return reward.score(prompts, completions, columns, completion_ids=[s.ids for _, s in answered])
