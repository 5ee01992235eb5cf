"""How far the estimators of `rlzoo.variance.noise` scatter: their covariance over new prompts, as pure functions.

‖G‖² and ⟨G, G'⟩ are estimated by U-statistics of degree two, means of ⟨g_i, g'_j⟩ over all pairs of different prompts.
Hoeffding's decomposition splits their variance in two. The *second-order* part, 2 tr Σ²/(n(n-1)) of ‖G‖², does not
depend on G and is all that is left where noise dominates; the *first-order* part, 4 GᵀΣG/n, grows with G. A jackknife
adds the second-order part twice (Efron and Stein 1981), so intervals from it are too wide just where noise dominates.
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

from rlzoo.variance.intervals import freedom

Matrix = Float[np.ndarray, "n m"]
Vector = Float[np.ndarray, " n"]
Values = Float[np.ndarray, "..."]


def centred(products: Matrix, valid: Bool[np.ndarray, "n m"]) -> Matrix:
    """Doubly centred inner products, scaled so that sums of squares are unbiased; 0 where not valid.

    What is left of ⟨a_i, b_j⟩ is ⟨a_i - G, b_j - G'⟩.
    """
    found = np.where(valid, products, 0.0).astype(float)  # cubes would overflow float32
    counts = [np.maximum(valid.sum(axis, keepdims=True), 1) for axis in (0, 1)]
    for axis in (1, 0, 1, 0):  # one pass is exact without common prompts, two are exact to O(1/n²) with them
        found -= found.sum(axis, keepdims=True) / counts[axis]
        found *= valid
    count = int(valid.sum())
    scaled: Matrix = found * np.sqrt(count / max(count - sum(valid.shape) + 1, 1))
    return scaled


def row_means(products: Matrix, valid: Bool[np.ndarray, "n m"], axis: int = 1) -> Vector:
    """⟨a_i, G'⟩ of each prompt, estimated from all other prompts, minus the mean over prompts."""
    found = np.where(valid, products, 0).sum(axis) / np.maximum(valid.sum(axis), 1)
    moved: Vector = found - found.mean()
    return moved


@dataclass(frozen=True)
class Side:
    """What one objective contributes to a covariance."""

    centred: Matrix
    """⟨a_i, a_j⟩, as `centred` returns it."""
    along: Vector
    """⟨a_i, G⟩ minus its mean."""
    grad_norm_sq: float
    """The estimate of ‖G‖²."""
    trace_cov: float
    """The estimate of tr Σ."""

    @property
    def count(self) -> int:
        """The number of prompts."""
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
        """The standard error of the estimate of ‖G‖² if G = 0."""
        return float(np.sqrt(self.second))

    @cached_property
    def average(self) -> float:
        """tr Σ²/tr Σ: the noise along a direction drawn in proportion to the noise, which G's is assumed to be like."""
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

    @cached_property
    def measured(self) -> float:
        """‖G‖² times the noise along ḡ."""
        return float(self.along.var(ddof=1)) - self.squares / (self.count * (self.count - 1) ** 2)

    @cached_property
    def freedom(self) -> float:
        """Degrees of freedom of that variance along ḡ."""
        return freedom(self.along)

    def first(self, size: Values | float) -> Values:
        """The first-order variance 4 GᵀΣG/n of the estimate of ‖G‖², if ‖G‖² is ``size`` ≥ 0."""
        found: Values = 4 / self.count * size * self.towards(size, self.measured, self.along_noise, self.average)
        return found

    def towards(self, size: Values | float, measured: float, drift: float, average: float) -> Values:
        """The noise of a gradient, this objective's or another's, along the direction u of G, if ‖G‖² is ``size`` ≥ 0.

        ``measured`` is ‖G‖² times the noise along ḡ, to which chance added ``drift`` per unit by which the estimate of
        ‖G‖² exceeds ``size``. Where noise hides G, its direction is unknown and nothing can be measured along it: the
        noise along an ``average`` direction takes its place.
        """
        size = np.asarray(size, float)
        left = np.maximum(measured - drift * (self.grad_norm_sq - size), 0) + self.uncertain * average
        whole = size + self.uncertain
        found: Values = np.divide(left, whole, out=np.zeros_like(size), where=whole > 0)
        return found

    def third(self, size: Values | float) -> Values:
        """The third cumulant of the estimate of ‖G‖², if ‖G‖² is ``size``: 8 tr Σ³/n³ + 24 GᵀΣ²G/n²."""
        own = 8 * self.cubes / (self.count * (self.count - 1)) ** 3
        found: Values = own + 6 * self.first(size) * self.along_noise / self.count
        return found

    @cached_property
    def size(self) -> float:
        """‖G‖² plus the noise of its estimate: the scale of first-order covariances."""
        return max(self.grad_norm_sq, 0.0) + self.uncertain

    def slack(self, size: float) -> float:
        """The expected noise along a direction that is known only up to an uncertainty of ``size``."""
        return self.average * size


@dataclass(frozen=True)
class _Mean:
    """The mean of one objective's gradients along the direction of an expected gradient, its own or another's."""

    direction: Side
    """The objective whose expected gradient has that direction; the next three are those of `Side.towards`."""
    measured: float
    drift: float
    average: float
    count: int
    """Prompts in the mean."""

    def variance(self, size: Values) -> Values:
        """The variance of this mean, if ‖G‖² of ``direction`` is ``size``."""
        found: Values = self.direction.towards(size, self.measured, self.drift, self.average) / self.count
        return found


@dataclass(frozen=True)
class Joint:
    """The covariance of the estimates of ‖G‖², ‖G'‖² and ⟨G, G'⟩, as a function of hypotheses on ‖G‖² and ‖G'‖²."""

    second: Float[np.ndarray, "3 3"]
    means: tuple[_Mean, ...]
    """The means of ⟨u, a⟩, ⟨v, b⟩, ⟨v, a⟩ and ⟨u, b⟩, where u and v are the directions of G and G'."""
    correlation: Float[np.ndarray, "4 4"]
    """The correlations of the four means, taken at the estimates; their variances are taken at the hypothesis."""

    def at(self, first: Vector, other: Vector) -> Float[np.ndarray, "3 3 N"]:
        """The covariance for each pair of hypothesised ‖G‖² and ‖G'‖² ≥ 0.

        The estimate of ‖G‖² moves by 2 ‖G‖ ⟨u, ·⟩ with the mean of a, that of ⟨G, G'⟩ by ‖G'‖ ⟨v, ·⟩ with the mean of
        a and by ‖G‖ ⟨u, ·⟩ with that of b.
        """
        sizes = (first, other, other, first)
        scale = [np.sqrt(size * mean.variance(size)) for mean, size in zip(self.means, sizes, strict=True)]
        moves = np.zeros((3, 4, len(first)))
        moves[0, 0], moves[1, 1], moves[2, 2], moves[2, 3] = 2 * scale[0], 2 * scale[1], scale[2], scale[3]
        first_order = np.einsum("ikn,kl,jln->ijn", moves, self.correlation, moves)
        found: Float[np.ndarray, "3 3 N"] = first_order + self.second[:, :, None]
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
    noise_along = np.zeros(4)
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
        if s == t:
            noise_along[s] = measured - random
        levers[s, t] = levers[t, s] = (measured - random) * share
        by_chance[s, t] = by_chance[t, s] = random * share
    levers = _positive(levers, np.diag(by_chance))
    noise = float(np.mean(x[in_a, in_b])) - inner if both else 0.0  # tr Σ of one objective with the other
    noises = max(a.trace_cov, 0.0) * max(b.trace_cov, 0.0)
    levers += _slack(a, b, inner, noise / noises**0.5 if noises else 0.0, both)
    size = np.sqrt(np.diag(levers))
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = np.nan_to_num(levers / np.outer(size, size))
    # tr Σ_a Σ_b²/tr Σ_b² for the noise of a along v, as for its own of parallel gradients, whose estimates then move
    # together under any hypothesis; for others only in part, as it would be too uncertain a correction
    norms = a.grad_norm_sq * b.grad_norm_sq
    parallel = min(inner**2 / norms, 1.0) if norms > 0 else 0.0
    drifts = (
        a.along_noise,
        b.along_noise,
        parallel * float(np.vdot(left @ b.centred, left)) / max(bb * pairs / m, 1e-300),
        parallel * float(np.vdot(a.centred @ left, left)) / max(aa * pairs / n, 1e-300),
    )
    ends = zip((a, b, b, a), noise_along.tolist(), drifts, (a, b, a, b), strict=True)
    means = tuple(_Mean(to, noise, drift, side.average, side.count) for to, noise, drift, side in ends)
    return Joint(_positive(second, np.diag(second)), means, correlation)


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
