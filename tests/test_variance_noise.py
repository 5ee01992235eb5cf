"""Estimators of gradient noise: by hand, unbiased by simulation, and intervals that cover."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlzoo.document.estimates import bound
from rlzoo.experiments.benchmarks.coverage import CASES, Case, gradients, units
from rlzoo.variance.intervals import freedom, normal_score, nothing, rank_correlation, student
from rlzoo.variance.noise import (
    Units,
    against,
    data_noise,
    gradient_squared_norm,
    inner_product,
    trace_cov,
    within,
)


def units_of(gradients: np.ndarray, prompt: Any = None) -> Units:
    """Gradients whose projections are themselves: the exact inner products."""
    return units(gradients, np.arange(len(gradients)) if prompt is None else np.asarray(prompt))


def test_the_estimators_by_hand() -> None:
    # g = (1, 0), (3, 0), (2, 3): mean (2, 1), ‖ḡ‖² = 5, mean ‖g‖² = (1 + 9 + 13)/3 = 23/3.
    # tr Σ = 3/2 (23/3 - 5) = 4, the sum of the sample variances 1 and 3. ‖G‖² = 5 - 4/3 = 11/3.
    units = units_of(np.array([[1.0, 0], [3, 0], [2, 3]]))
    assert trace_cov(3, 23 / 3, 5) == pytest.approx(4)
    assert gradient_squared_norm(3, 23 / 3, 5) == pytest.approx(11 / 3)
    found = data_noise(units)
    values = {name: estimate["value"] for name, estimate in found.items()}
    expected = {"grad_norm_sq": 11 / 3, "trace_cov": 4, "snr": 11 / 12, "noise_scale": 12 / 11}
    assert values == pytest.approx(expected)


def test_paired_inner_products_by_hand() -> None:
    # g = (1, 0), (3, 0), (2, 3) and g' = (0, 2), (1, 1), (2, 0). Over the six ordered pairs of different prompts
    # ⟨g_p, g'_q⟩ is 1, 2, 0, 6, 6 and 5.
    first, other = np.array([[1.0, 0], [3, 0], [2, 3]]), np.array([[0.0, 2], [1, 1], [2, 0]])
    pairs = [first[p] @ other[q] for p in range(3) for q in range(3) if p != q]
    assert pairs == [1, 2, 0, 6, 6, 5]
    of_means = float(first.mean(0) @ other.mean(0))  # (2, 1) · (1, 1) = 3
    same = within(units_of(first), units_of(other))  # 0 + 3 + 4
    assert (of_means, same) == pytest.approx((3, 7))
    assert inner_product(3, 3, 3, of_means, same) == pytest.approx(20 / 6)
    apart = units_of(first), units_of(other, prompt=[5, 6, 7])
    assert within(*apart) == 0 and inner_product(3, 3, 0, of_means, 0.0) == pytest.approx(3)


def test_prompts_are_paired_by_name_whatever_their_order() -> None:
    rng = np.random.default_rng(7)
    first, other = rng.standard_normal((30, 8)) + 1, rng.standard_normal((20, 8)) + np.arange(8) / 3
    other[:10] += 0.5 * (first[:10] - 1)  # ten prompts in common
    order = rng.permutation(20)
    names = np.arange(20) + np.where(np.arange(20) < 10, 0, 100)
    of_means = float(first.mean(0) @ other.mean(0))
    plain = against(units_of(first), units_of(other, prompt=names), of_means)
    shuffled = against(units_of(first), units_of(other[order], prompt=names[order]), of_means)
    for name, estimate in plain.items():
        assert shuffled[name] == pytest.approx(estimate, rel=1e-9), name
    # the mean over all pairs of different prompts, directly
    pairs = [first[p] @ other[q] for p in range(30) for q in range(20) if p != names[q]]
    norms = [
        gradient_squared_norm(len(g), np.square(g).sum(1).mean(), np.square(g.mean(0)).sum()) for g in (first, other)
    ]
    assert plain["cosine"]["value"] == pytest.approx(np.mean(pairs) / np.sqrt(np.prod(norms)))


def test_degrees_of_freedom_follow_the_kurtosis_of_what_is_summed() -> None:
    # 42 terms of ±1 have κ = 1, and never more than P - 1 degrees. Normal terms have κ = 3 and P - 1 too.
    assert freedom(np.resize([1.0, -1.0], 42)) == pytest.approx(41)
    assert freedom(np.random.default_rng(0).standard_normal(40_001)) == pytest.approx(40_000, rel=0.05)
    rare = np.array([1.0, -1.0] + [0.0] * 20)  # mean square 1/11 and mean fourth power 1/11: κ = 11
    assert freedom(rare) == pytest.approx(2 * 21 / 10)
    assert student(20) == pytest.approx(2.0860, abs=1e-4)
    assert student(0.1) == pytest.approx(4.3027, abs=1e-4)  # never fewer than two


def test_normal_scores_of_a_skewed_statistic() -> None:
    # An exponential variable less 1 has the skewness 2, and is below x with the probability 1 - exp(-(1 + x)).
    assert normal_score(np.log(2) - 1, 2.0) == pytest.approx(0, abs=1e-9)
    assert normal_score(-np.log(0.025) - 1, 2.0) == pytest.approx(1.959964, abs=1e-5)
    assert normal_score(1 + np.log(0.025), -2.0) == pytest.approx(-1.959964, abs=1e-5)
    assert normal_score(-1.5, 2.0) == -np.inf, "below all values"
    assert normal_score(1.3, 0.0) == 1.3 == pytest.approx(normal_score(1.3, 1e-3), abs=1e-3)


def test_a_ratio_is_the_inverse_of_the_reverse_ratio() -> None:
    rng = np.random.default_rng(8)
    first, other = rng.standard_normal((2, 50, 20)) + np.array([0.8, 0.5])[:, None, None]
    of_means = float(first.mean(0) @ other.mean(0))
    there, back = (against(units_of(a), units_of(b), of_means) for a, b in ((first, other), (other, first)))
    for end, reverse in (("value", "value"), ("ci_low", "ci_high"), ("ci_high", "ci_low")):
        assert there["norm_ratio"][end] == pytest.approx(1 / back["norm_ratio"][reverse], rel=1e-4)
        assert there["cosine"][end] == pytest.approx(back["cosine"][end], rel=1e-2)


BOUNDS = {"grad_norm_sq": 0.05, "trace_cov": 0.01, "noise_scale": 0.08, "snr": 0.05, "cosine": 0.06, "norm_ratio": 0.06}


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name", ["same prompts, correlated 0.9, orthogonal", "other prompts", "same prompts, 4 rows each"]
)
def test_estimates_are_unbiased_and_their_intervals_cover(name: str) -> None:
    """A short run of experiments/benchmarks/coverage.py."""
    case = replace(CASES[name], prompts=40, others=40, common=40 * (CASES[name].common > 0))
    found = gradients(case, 500, seed=2)
    assert found.keys() == BOUNDS.keys()
    for quantity, numbers in found.items():
        assert 0.92 <= numbers["coverage"] <= 0.98, (quantity, numbers)  # 93 to 97 %, give or take a standard error
        assert abs(numbers["bias"]) <= BOUNDS[quantity], (quantity, numbers)
        assert numbers["shown"] > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("noise", [1.0, 10.0])
def test_intervals_miss_on_either_side_where_noise_is_as_large_as_the_gradient(noise: float) -> None:
    """The estimate of ‖G‖² is skewed there: an interval from its variance alone is never too low."""
    case, rng, draws = Case(noise=noise, prompts=40, others=3, common=0), np.random.default_rng(5), 600
    low, high = np.array(
        [[data_noise(case.draw(rng)[0])["grad_norm_sq"][end] for end in ("ci_low", "ci_high")] for _ in range(draws)]
    ).T
    above, below = np.mean(low > 1), np.mean(high < 1)
    assert min(above, below) > 0.005 and 0.03 <= above + below <= 0.07, (above, below)


@pytest.mark.slow
def test_a_hidden_gradient_has_no_number() -> None:
    case = Case(noise=10, prompts=40, others=40, common=40)
    found = gradients(case, 200, seed=3)
    for quantity, numbers in found.items():
        assert numbers["misleading"] <= 0.08, (quantity, numbers)
    assert found["grad_norm_sq"]["shown"] == 1 and found["noise_scale"]["shown"] < 0.15
    assert found["cosine"]["shown"] < 0.1 and found["cosine"]["coverage"] is None
    first, second = case.draw(np.random.default_rng(0))
    noise, pair = data_noise(first), against(first, second, float(first.sketch.mean(0) @ second.sketch.mean(0)))
    assert pair["cosine"] == pair["norm_ratio"] == nothing("noise hides the gradient: use more rows")
    assert noise["noise_scale"]["value"] is None and "noise hides the gradient" in noise["noise_scale"]["reason"]
    assert noise["noise_scale"]["ci_low"] == pytest.approx(1 / noise["snr"]["ci_high"])
    assert noise["noise_scale"]["ci_high"] is None and noise["snr"]["ci_low"] <= 0


def test_of_very_few_prompts_an_interval_may_have_no_end() -> None:
    """The test rejects no signal at all, however large, as it does not know the noise: no tiny bound on its inverse."""
    rng = np.random.default_rng(0)
    noises = [data_noise(units_of(rng.standard_normal((3, 8)) + shift)) for shift in (0.0, 3.0) for _ in range(20)]
    scales = [noise["noise_scale"] for noise in noises]
    for noise, scale in zip(noises, scales, strict=True):
        if noise["snr"]["ci_high"] is None:
            assert scale["ci_low"] == (None if scale["value"] is None else 0.0)
        else:
            assert scale["ci_low"] is None or scale["ci_low"] > 1e-6
    open_ends = [scale for noise, scale in zip(noises, scales, strict=True) if noise["snr"]["ci_high"] is None]
    assert {bound(scale) for scale in open_ends if scale["value"] is None} == {"–"}
    assert {scale["value"] is None for scale in open_ends} == {True, False}


def test_the_noise_scale_is_the_inverse_of_the_signal() -> None:
    rng = np.random.default_rng(1)
    noise = data_noise(units_of(rng.standard_normal((50, 30)) + 0.5))
    for end, other in (("value", "value"), ("ci_low", "ci_high"), ("ci_high", "ci_low")):
        assert noise["noise_scale"][end] == pytest.approx(1 / noise["snr"][other])


def test_too_few_prompts_give_reasons() -> None:
    two = units_of(np.eye(2))
    assert all(e == nothing("fewer than 3 prompts") for e in data_noise(two).values())
    other = units_of(np.array([[1.0, 0], [1, 0]]))
    assert against(two, other, 0.5)["cosine"]["reason"] == "fewer than 3 prompts"
    zero = units_of(np.zeros((5, 2)))
    assert against(zero, units_of(np.ones((5, 2))), 0.0)["cosine"]["reason"] == "a gradient is 0"


@pytest.mark.filterwarnings("error")
def test_gradients_without_noise_are_what_they_are() -> None:
    first, other = (np.tile(g, (6, 1)) for g in ([1.0, 0.0], [3.0, 4.0]))
    noise, pair = data_noise(units_of(first)), against(units_of(first), units_of(other), 3.0)
    assert noise["grad_norm_sq"] == pytest.approx({"value": 1, "ci_low": 1, "ci_high": 1})
    assert noise["trace_cov"]["value"] == pytest.approx(0) and noise["noise_scale"]["reason"] == "its noise is 0"
    for name, value in (("cosine", 0.6), ("norm_ratio", 0.2)):
        assert pair[name] == pytest.approx({"value": value, "ci_low": value, "ci_high": value}, rel=1e-3)


@pytest.mark.parametrize("factor", [1.0, -0.4])
def test_proportional_gradients_have_their_cosine_whatever_noise_and_projection(factor: float) -> None:
    rng = np.random.default_rng(3)
    gradients = rng.standard_normal((20, 6))  # all noise
    sketch = rng.standard_normal((20, 3))
    size = float(np.square(gradients.mean(0)).sum())
    first = Units(np.square(gradients).sum(1), sketch, size, np.arange(20))
    other = Units(factor**2 * first.squared_norm, factor * sketch, factor**2 * size, np.arange(20))
    found = against(other, first, factor * size)
    for name, value in (("cosine", np.sign(factor)), ("norm_ratio", abs(factor))):
        assert found[name] == pytest.approx({"value": value, "ci_low": value, "ci_high": value})


@pytest.mark.slow
def test_projections_hardly_move_a_cosine_and_no_norm() -> None:
    """Norms are exact, so the only error of one layer's projection is that of ⟨g_p, g'_p⟩ of one prompt."""
    rng = np.random.default_rng(5)
    moved, widths = [], []
    for _ in range(50):
        first = rng.standard_normal((60, 40)) + 0.4
        second = 0.9 * first + 0.4 * rng.standard_normal((60, 40))
        signs = rng.choice([-1, 1], (40, 64)) / 8
        exact = [units_of(g) for g in (first, second)]
        projected = [replace(u, sketch=u.sketch @ signs) for u in exact]
        of_means = float(first.mean(0) @ second.mean(0))
        one, other = (against(a, b, of_means) for a, b in (exact, projected))
        assert one["norm_ratio"]["value"] == other["norm_ratio"]["value"]
        assert data_noise(projected[0])["trace_cov"]["value"] == data_noise(exact[0])["trace_cov"]["value"]
        moved.append(other["cosine"]["value"] - one["cosine"]["value"])
        widths.append([e["cosine"]["ci_high"] - e["cosine"]["ci_low"] for e in (one, other)])
    exact_width, width = np.mean(widths, 0)
    assert np.std(moved) < 0.1 * exact_width and 0.9 < width / exact_width < 1.5


def test_rank_correlation_and_its_interval() -> None:
    x = np.arange(50.0)
    assert rank_correlation(x, np.exp(x / 10))["value"] == pytest.approx(1)
    assert rank_correlation(x, np.ones(50))["value"] is None and rank_correlation(x[:4], x[:4])["value"] is None
    rng = np.random.default_rng(4)
    truth, hits = 6 / np.pi * np.arcsin(0.6 / 2), 0  # Spearman's ρ of a normal pair with correlation 0.6
    for _ in range(400):
        pair = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 80)
        found = rank_correlation(pair[:, 0], pair[:, 1])
        hits += found["ci_low"] <= truth <= found["ci_high"]
    assert 0.92 <= hits / 400 <= 0.98
