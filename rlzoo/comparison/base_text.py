"""The base model's own text, on which the KL divergence from the base is measured: see `rlzoo.comparison.retention`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.problems import encode_problems, load_problems
from rlzoo.comparison.outcomes import BASE_TEXT
from rlzoo.comparison.retention import KL, LIKELIHOOD
from rlzoo.config import Experiment, TokenBudget
from rlzoo.errors import UserError
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.jobs.ranks import agreed
from rlzoo.policy import Policy, log_probs
from rlzoo.rollout import sampler_of
from rlzoo.rollout.rollouts import within_limits

BaseText = Mapping[str, Sequence[Mapping[str, Any]]]
"""The base's text as plain data: retention set → per problem its id, prompt, ids, completions and their log-probs."""


def base_text(load: Callable[[], Policy], experiment: Experiment, state: Path) -> BaseText:
    """Completions of the retention sets' prompts by the base policy, with its log-probs; kept under ``state``.

    ``load`` loads the policy, if anything is to be sampled. Completions are drawn with the seed and the settings of the
    base's evaluation, but at temperature 1 and top_p 1. Raises UserError for problems that cannot be encoded.
    """

    def draw(name: str) -> list[dict[str, Any]]:
        policy = load()
        source = experiment.retention[name]
        bad = BadRows(source.bad_rows)
        settings = experiment.evaluation_on(source).model_copy(update={"temperature": 1.0, "top_p": 1.0})
        sampler = sampler_of(policy, settings)
        encoded = encode_problems(policy.tokenizer, load_problems(source, bad), bad)
        encoded = within_limits(policy, sampler, encoded, settings, bad)
        if not encoded:
            raise UserError(f"retention.{name}: there are no problems to evaluate on: give a set with at least one row")
        sampled = sampler.sample([one.ids for one in encoded], settings, 0)
        sampler.rest()
        text = [
            {
                "problem_id": one.problem.id,
                "prompt": one.text,
                "prompt_ids": list(one.ids),
                "completions": [list(sample.ids) for sample in samples],
                "masks": [sample.mask for sample in samples],
            }
            for one, samples in zip(encoded, sampled, strict=True)
        ]
        logps = _log_probs(policy, text, experiment.training.token_budget)
        return [one | {"logp": logp} for one, logp in zip(text, logps, strict=True)]

    cached = CachedResults(state)
    return {name: cached.once(f"base text of {name}", partial(draw, name)) for name in experiment.retention}


def saved_text(experiment: Experiment, state: Path) -> BaseText:
    """What `base_text` kept. Raises UserError if it is damaged."""
    cached = CachedResults(state)
    text = {name: agreed(cached.read(f"base text of {name}")) for name in experiment.retention}
    if damaged := [name for name, some in text.items() if some is None]:
        raise UserError(
            f"the base's text for {damaged[0]!r} cannot be read: repeat the command, which samples it again"
        )
    return text


def text_results(
    policy: Policy, text: Sequence[Mapping[str, Any]], token_budget: TokenBudget
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics of a policy on a retention set's base text, and one row of outcomes per problem."""
    logps = _log_probs(policy, text, token_budget)
    rows = [
        {
            "problem_id": one["problem_id"],
            "prompt": one["prompt"],
            "decoding": BASE_TEXT,
            "sample": 0,
            "base_text_logp": logp,
            "base_text_tokens": sum(
                len(completion) if mask is None else sum(mask)
                for completion, mask in zip(one["completions"], _masks(one), strict=True)
            ),
        }
        for one, logp in zip(text, logps, strict=True)
    ]
    tokens = sum(row["base_text_tokens"] for row in rows)
    own, of_base = sum(logps), sum(one["logp"] for one in text)
    return {LIKELIHOOD: own / tokens, KL: (of_base - own) / tokens}, rows


def _log_probs(policy: Policy, text: Sequence[Mapping[str, Any]], token_budget: TokenBudget) -> list[float]:
    """log π of all completions of each problem, at temperature 1, in nats: of the tokens that the base sampled."""
    flat = [(one["prompt_ids"], completion) for one in text for completion in one["completions"]]
    masks = (mask for one in text for mask in _masks(one))
    found = zip(log_probs(policy, flat, token_budget), masks, strict=True)
    each = (sum(logp if mask is None else compress(logp, mask)) for logp, mask in found)
    return [float(sum(next(each) for _ in one["completions"])) for one in text]


def _masks(one: Mapping[str, Any]) -> Sequence[list[bool] | None]:
    """Which tokens of a problem's completions the base model sampled; None: all, as in results of earlier versions."""
    return one.get("masks") or [None] * len(one["completions"])
