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

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

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
from rlzoo.config import BASE
from rlzoo.errors import UserError

LIKELIHOOD, KL, CHANGE = "base_text_log_likelihood", "kl_from_base", "avg_at_k_from_base"
"""Metrics of retention besides those of benchmarks; `CHANGE` is avg@k minus that of the base."""


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
