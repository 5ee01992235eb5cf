"""How far the estimators of `rlzoo.variance.noise` scatter: their covariance over new prompts, as pure functions.

‖G‖² and ⟨G, G'⟩ are estimated by U-statistics of degree two, means of ⟨g_i, g'_j⟩ over all pairs of different prompts.
Hoeffding's decomposition cuts their variance in two. The *second-order* part, 2 tr Σ²/(n(n-1)) of ‖G‖², does not depend
on G and is all that is left where noise dominates; the *first-order* part, 4 GᵀΣG/n, grows with G. A jackknife adds
the second-order part twice (Efron and Stein 1981), so intervals from it are too wide just where noise dominates.
Source: Hoeffding 1948, doi 10.1214/aoms/1177730196; the centring that makes the second-order part unbiased: Székely and
Rizzo 2014, doi 10.1214/14-AOS1255.

a and b are the gradients of two objectives by prompt, n and m of them; x holds ⟨a_i, b_j⟩ of different prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

Matrix = Float[np.ndarray, "n m"]
Vector = Float[np.ndarray, " n"]
Values = Float[np.ndarray, "..."]


def centred(products: Matrix, valid: Bool[np.ndarray, "n m"]) -> Matrix:
    """Inner products less what row and column explain, scaled so that sums of squares are unbiased; 0 where not valid.

    What is left of ⟨a_i, b_j⟩ is ⟨a_i - G, b_j - G'⟩.
    """
    found = np.where(valid, products, 0.0).astype(float)  # cubes would overflow float32
    counts = [np.maximum(valid.sum(axis, keepdims=True), 1) for axis in (0, 1)]
    for axis in (1, 0, 1, 0):  # one turn is exact without common prompts, two are to O(1/n²) with
        found -= found.sum(axis, keepdims=True) / counts[axis]
        found *= valid
    count = int(valid.sum())
    scaled: Matrix = found * np.sqrt(count / max(count - sum(valid.shape) + 1, 1))
    return scaled


def row_means(products: Matrix, valid: Bool[np.ndarray, "n m"], axis: int = 1) -> Vector:
    """⟨a_i, G'⟩ of each prompt, from all prompts but itself, less their mean."""
    found = np.where(valid, products, 0).sum(axis) / np.maximum(valid.sum(axis), 1)
    moved: Vector = found - found.mean()
    return moved


@dataclass(frozen=True)
class Side:
    """One objective's part in a covariance."""

    centred: Matrix
    """Of ⟨a_i, a_j⟩."""
    along: Vector
    """⟨a_i, G⟩ less its mean."""
    grad_norm_sq: float
    trace_cov: float

    @property
    def count(self) -> int:
        return len(self.along)

    @cached_property
    def squares(self) -> float:
        """Σ of the centred products' squares: n(n-1) tr Σ²."""
        return float(np.vdot(self.centred, self.centred))

    @cached_property
    def second(self) -> float:
        """The second-order variance of ‖G‖²: 2 tr Σ²/(n(n-1))."""
        return 2 * self.squares / (self.count * (self.count - 1)) ** 2

    @cached_property
    def uncertain(self) -> float:
        """What noise alone makes of ‖G‖²: the standard error of its estimate where G = 0."""
        return float(np.sqrt(self.second))

    @cached_property
    def average(self) -> float:
        """tr Σ²/tr Σ: the noise along a direction that has more where the noise has more, which G's is taken for."""
        return self.squares / (self.count * (self.count - 1)) / self.trace_cov if self.trace_cov > 0 else 0.0

    @cached_property
    def cubes(self) -> float:
        """The trace of the centred products' cube: about n³ tr Σ³."""
        return float(np.vdot(self.centred @ self.centred, self.centred))

    @cached_property
    def along_noise(self) -> float:
        """tr Σ³/tr Σ²: how much more noise is measured along ḡ per unit by which chance makes ‖G‖² too large.

        Chance lengthens ḡ in directions that have much noise.
        """
        return self.cubes / self.squares / (self.count - 1) if self.squares > 0 else 0.0

    def first(self, size: Values | float) -> Values:
        """The first-order variance 4 GᵀΣG/n of the estimate of ‖G‖², if ‖G‖² is ``size`` ≥ 0.

        GᵀΣG is measured along ḡ, less what chance added to it if the estimate differs from ``size``. Where G drowns,
        its direction is unknown and nothing can be measured along it: there the average direction stands for it.
        """
        size = np.asarray(size, float)
        chance = self.squares / (self.count * (self.count - 1) ** 2)
        measured = float(self.along.var(ddof=1)) - chance - self.along_noise * (self.grad_norm_sq - size)
        whole = size + self.uncertain
        weighted = size * np.maximum(measured, 0) + self.uncertain * self.average * size
        along: Values = np.divide(weighted, whole, out=np.zeros_like(size), where=whole > 0)
        return 4 / self.count * along

    def third(self, size: Values | float) -> Values:
        """The third cumulant of the estimate of ‖G‖², if ‖G‖² is ``size``: 8 tr Σ³/n³ + 24 GᵀΣ²G/n²."""
        own = 8 * self.cubes / (self.count * (self.count - 1)) ** 3
        found: Values = own + 6 * self.first(size) * self.along_noise / self.count
        return found

    @cached_property
    def size(self) -> float:
        """‖G‖² as first-order covariances are scaled by: not less than the noise of its estimate."""
        return max(self.grad_norm_sq, 0.0) + self.uncertain

    def slack(self, size: float) -> float:
        """The noise to expect along a direction that is known only to ``size``'s uncertainty."""
        return self.average * size


@dataclass(frozen=True)
class Joint:
    """The covariance of the estimates of ‖G‖², ‖G'‖² and ⟨G, G'⟩, as a function of hypotheses on ‖G‖² and ‖G'‖²."""

    second: Float[np.ndarray, "3 3"]
    sides: tuple[Side, Side]
    levers: Float[np.ndarray, "4 4"]
    """Covariance of the means of ⟨u, a⟩, ⟨v, b⟩, ⟨v, a⟩ and ⟨u, b⟩, u and v being the directions of G and G'."""

    def at(self, first: Vector, other: Vector) -> Float[np.ndarray, "3 3 N"]:
        """The covariance for each pair of hypothesised ‖G‖² and ‖G'‖² ≥ 0.

        The estimate of ‖G‖² moves by 2 ‖G‖ ⟨u, ·⟩ with the mean of a, that of ⟨G, G'⟩ by ‖G'‖ ⟨v, ·⟩ with the mean of
        a and by ‖G‖ ⟨u, ·⟩ with that of b.
        """
        one, two, lever = np.sqrt(first), np.sqrt(other), self.levers
        # along its own direction an objective's noise depends on the hypothesis: `Side.first`
        own = [np.sqrt(side.first(size)) / 2 for side, size in zip(self.sides, (first, other), strict=True)]
        one_own, two_own = (x / np.sqrt(max(lever[k, k], 1e-300)) for k, x in enumerate(own))
        found = np.empty((3, 3, len(first)))
        found[0, 0] = 4 * own[0] ** 2
        found[1, 1] = 4 * own[1] ** 2
        found[2, 2] = other * lever[2, 2] + 2 * one * two * lever[2, 3] + first * lever[3, 3]
        found[0, 1] = found[1, 0] = 4 * one_own * two_own * lever[0, 1]
        found[0, 2] = found[2, 0] = 2 * one_own * (two * lever[0, 2] + one * lever[0, 3])
        found[1, 2] = found[2, 1] = 2 * two_own * (two * lever[1, 2] + one * lever[1, 3])
        found += self.second[:, :, None]
        return found


def joint(
    a: Side,
    b: Side,
    x: Matrix,
    valid: Bool[np.ndarray, "n m"],
    in_a: Int[np.ndarray, " o"],
    in_b: Int[np.ndarray, " o"],
    inner: float,
) -> Joint:
    """The covariance of two objectives' estimates; prompt ``in_a[k]`` of one is prompt ``in_b[k]`` of the other.

    ``inner`` is the estimate of ⟨G, G'⟩.

    What the two share of a prompt's noise counts wherever the same one or two prompts enter both.
    """
    n, m, both, pairs = a.count, b.count, len(in_a), int(valid.sum())
    left = centred(x, valid)
    common = left[np.ix_(in_a, in_b)]
    aa, bb, xx, xt = a.squares, b.squares, float(np.vdot(left, left)), float(np.vdot(common, common.T))
    ab = float(np.vdot(a.centred[np.ix_(in_a, in_a)], b.centred[np.ix_(in_b, in_b)]))
    ax = float(np.vdot(a.centred[:, in_a], left[:, in_b]))
    bx = float(np.vdot(b.centred[in_b], left[in_a]))
    weight_a, weight_b, weight_x = 1 / (n * (n - 1)), 1 / (m * (m - 1)), 1 / pairs
    second = np.array(
        [
            [2 * aa * weight_a**2, 2 * ab * weight_a * weight_b, 2 * ax * weight_a * weight_x],
            [2 * ab * weight_a * weight_b, 2 * bb * weight_b**2, 2 * bx * weight_b * weight_x],
            [2 * ax * weight_a * weight_x, 2 * bx * weight_b * weight_x, (xx + xt) * weight_x**2],
        ]
    )
    # first order: what prompts' gradients have along the two directions, less what chance puts there
    along = (a.along, b.along, row_means(x, valid), row_means(x, valid, 0))
    of_a, others = (True, False, True, False), (n - 1, m - 1, pairs / n, pairs / m)
    chance = {(0, 0): aa, (1, 1): bb, (2, 2): xx, (3, 3): xx, (0, 2): ax, (1, 3): bx}
    chance |= {(0, 1): ab, (0, 3): ax, (1, 2): bx, (2, 3): xt}
    levers = np.zeros((4, 4))
    by_chance = np.zeros((4, 4))
    for (s, t), products in chance.items():
        if of_a[s] == of_a[t]:
            count = n if of_a[s] else m
            measured, share = float(along[s] @ along[t]) / (count - 1), 1 / count
        else:
            count = both
            one, two = (along[k][in_a if of_a[k] else in_b] for k in (s, t))
            measured = float(np.cov(one, two)[0, 1]) if both > 1 else 0.0
            share = both / (n * m)
        random = products / (count * others[s] * others[t]) if count else 0.0
        levers[s, t] = levers[t, s] = (measured - random) * share
        by_chance[s, t] = by_chance[t, s] = random * share
    levers = _positive(levers, np.diag(by_chance))
    noise = float(np.mean(x[in_a, in_b])) - inner if both else 0.0  # tr Σ of one objective with the other
    noises = max(a.trace_cov, 0.0) * max(b.trace_cov, 0.0)
    levers += _slack(a, b, inner, noise / noises**0.5 if noises else 0.0, both)
    sizes = np.sqrt([a.size, b.size, b.size, a.size])
    with np.errstate(divide="ignore", invalid="ignore"):
        levers = np.nan_to_num(levers / np.outer(sizes, sizes))
    return Joint(_positive(second, np.diag(second)), (a, b), levers)


def _slack(a: Side, b: Side, inner: float, alike: float, both: int) -> Float[np.ndarray, "4 4"]:
    """`Side.slack` of the four means, for two objectives whose noise on a prompt has the correlation ``alike``."""
    spread = np.sqrt(
        [side.slack(float(np.sqrt(other.second))) / side.count for side, other in ((a, a), (b, b), (a, b), (b, a))]
    )
    cosine = float(np.clip(inner / np.sqrt(a.size * b.size), -1, 1)) if a.size and b.size else 0.0
    noise = float(np.clip(alike, -1, 1)) * both / np.sqrt(a.count * b.count)
    correlation = np.array(
        [
            [1, cosine * noise, cosine, noise],
            [cosine * noise, 1, noise, cosine],
            [cosine, noise, 1, cosine * noise],
            [noise, cosine, cosine * noise, 1],
        ]
    )
    found: Float[np.ndarray, "4 4"] = np.outer(spread, spread) * correlation
    return found


def _positive(matrix: Float[np.ndarray, "k k"], scale: Sequence[float] | Vector) -> Float[np.ndarray, "k k"]:
    """The nearest positive semi-definite matrix, entries measured in ``scale``."""
    size = np.sqrt(np.maximum(scale, 1e-300))
    values, vectors = np.linalg.eigh(matrix / np.outer(size, size))
    found: Float[np.ndarray, "k k"] = (vectors * np.maximum(values, 0)) @ vectors.T * np.outer(size, size)
    return found
