"""Estimators of success from counted samples: pure numpy."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from rlzoo.errors import UserError


def pass_at_k(correct: Int[np.ndarray, "*n"], n: Int[np.ndarray, "*n"], k: int) -> Float[np.ndarray, "*n"]:
    """The unbiased chance that one of k samples is correct, from c of n correct: 1 - C(n-c, k) / C(n, k).

    Computed as 1 - Π_{j<k} (n-c-j)/(n-j), which neither overflows nor cancels. Source: arXiv 2107.03374.
    Raises UserError for k < 1 or k > n, ValueError for counts that are not 0 ≤ c ≤ n.
    """
    correct, n = np.asarray(correct), np.asarray(n)
    if np.any(correct < 0) or np.any(correct > n):
        raise ValueError("pass_at_k needs 0 ≤ correct ≤ n")
    if k < 1 or (n.size and k > n.min()):
        fewest = int(n.min()) if n.size else 0
        raise UserError(f"pass@{k} needs 1 ≤ k ≤ samples per problem, which is {fewest}: change k or take more samples")
    drawn = np.arange(k)
    failures = np.maximum((n - correct)[..., None] - drawn, 0)
    missed: Float[np.ndarray, "*n"] = 1.0 - np.prod(failures / (n[..., None] - drawn), axis=-1)
    return missed
