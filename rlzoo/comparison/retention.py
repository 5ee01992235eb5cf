"""Retention: what fine-tuning costs, as accuracy on problems from before it and as the KL divergence from the base.

The KL divergence is measured on the base model's own text: completions y ~ base(· | x) of a retention set's prompts x,
drawn once at temperature 1, no longer than in an evaluation, and scored under every fine-tuned policy π:

    base-text log-likelihood = Σ log π(y | x) / Σ |y|
    KL(base ‖ π) per token   ≈ Σ [log base(y | x) - log π(y | x)] / Σ |y|

in nats per token, sums over all prompts and completions. The expectation of the second numerator is the KL divergence
of the distributions over completions, which is not negative; the estimate may be, by chance. In this direction the
divergence predicts forgetting (arXiv 2509.04259). A completion cut at the length limit counts up to there: the
divergence is then that of the distributions over completions of at most this length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.problems import encode_problems, load_problems
from rlzoo.comparison.outcomes import (
    BASE_TEXT,
    ResultMatrix,
    difference_of,
    matrices_of,
    ordered,
    pivot,
    retention_rows,
)
from rlzoo.comparison.statistics import crossed_interval, result_interval
from rlzoo.config import BASE, Experiment, TokenBudget
from rlzoo.errors import UserError
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.jobs.ranks import agreed
from rlzoo.policy import Policy, log_probs
from rlzoo.rollout import sampler_of
from rlzoo.rollout.rollouts import within_limits

LIKELIHOOD, KL, CHANGE = "base_text_log_likelihood", "kl_from_base", "avg_at_k_from_base"
"""Metrics of retention besides those of benchmarks; `CHANGE` is avg@k minus that of the base."""
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


def summarise_retention(outcomes: pa.Table, k: int | Mapping[str, int]) -> list[dict[str, Any]]:
    """The mean and 95 % interval of every algorithm × retention set × metric; the rows have the keys of `summarise`.

    ``benchmark`` is the retention set. The metrics are those of benchmarks and `CHANGE`, as fractions, and `LIKELIHOOD`
    and `KL`, in nats per token. Intervals are over further seeds and problems of the same kind. Raises UserError as
    `result_matrices` does.
    """
    table = retention_rows(outcomes)
    if not len(table):
        return []
    is_text = pc.equal(table["decoding"], BASE_TEXT)
    scored = matrices_of(table.filter(pc.invert(is_text)), k)
    rows = []
    for (algorithm, name, metric), matrix in ordered(scored):
        rows.append(_row(algorithm, name, metric, matrix, result_interval(matrix.values)))
        other = scored.get((BASE, name, metric))
        if metric == "avg_at_k" and algorithm != BASE and other is not None:
            change = difference_of(matrix, other)
            if change is not None:
                rows.append(_row(algorithm, name, CHANGE, change, crossed_interval(change.values)))
    for algorithm, name, metric, matrix in _text_matrices(table.filter(is_text)):
        rows.append(_row(algorithm, name, metric, matrix, crossed_interval(matrix.values)))
    return rows


def _row(algorithm: str, name: str, metric: str, matrix: ResultMatrix, interval: Any) -> dict[str, Any]:
    row = {"algorithm": algorithm, "benchmark": name, "metric": metric, "mean": interval.mean}
    return row | {"ci_low": interval.low, "ci_high": interval.high, "seeds": len(matrix.seeds)}


def _text_matrices(table: pa.Table) -> list[tuple[str, str, str, ResultMatrix]]:
    """Per algorithm and retention set: the log-likelihood of the base's text and, but for the base, the divergence."""
    column = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    found: list[tuple[str, str, str, ResultMatrix]] = []
    for name in dict.fromkeys(column["benchmark"]):
        logps = {}
        for algorithm in dict.fromkeys(column["algorithm"]):
            rows = (column["benchmark"] == name) & (column["algorithm"] == algorithm)
            if rows.any():
                own = [column[key][rows] for key in ("base_text_logp", "seed", "problem_id")]
                logps[algorithm] = pivot(own[0].astype(float), own[1], own[2], f"{algorithm!r} on {name!r}")
        rows = (column["benchmark"] == name) & (column["algorithm"] == BASE)
        counts = dict(zip(column["problem_id"][rows], column["base_text_tokens"][rows], strict=True))
        if (base := logps.get(BASE)) is None:
            raise UserError(f"outcomes on {name!r} lack the base model: repeat the comparison")
        for algorithm, logp in logps.items():
            if logp.problems != base.problems:
                raise UserError(
                    f"outcomes of {algorithm!r} on {name!r} are not of the base's text: run that cell again"
                )
            tokens = np.array([float(counts[problem]) for problem in logp.problems])
            kinds = [(LIKELIHOOD, logp.values), *([(KL, base.values - logp.values)] if algorithm != BASE else [])]
            for metric, values in kinds:
                found.append(
                    (algorithm, name, metric, ResultMatrix(per_token(values, tokens), logp.seeds, logp.problems))
                )
    return found


def per_token(sums: Float[np.ndarray, "S P"], tokens: Float[np.ndarray, " P"]) -> Float[np.ndarray, "S P"]:
    """A matrix whose mean is R = Σ sums / Σ tokens (each over seeds and problems), and whose spread is that of R.

    R + (sums - R tokens) / mean tokens: the ratio's linear approximation, because a problem with more tokens has more
    weight. Source: Cochran, Sampling techniques, 1977, chapter 6.
    """
    ratio = sums.mean() / tokens.mean()
    values: Float[np.ndarray, "S P"] = ratio + (sums - ratio * tokens) / tokens.mean()
    return values
