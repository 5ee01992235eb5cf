"""Estimators of gradient noise: by hand, unbiased by simulation, and intervals that cover."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlzoo.variance.noise import (
    Units,
    against,
    data_noise,
    gradient_squared_norm,
    nothing,
    rank_correlation,
    trace_cov,
)


def units_of(gradients: np.ndarray) -> Units:
    """Gradients whose projections are themselves: the exact inner products."""
    return Units(np.square(gradients).sum(1), gradients, float(np.square(gradients.mean(0)).sum()))


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


def test_the_jackknife_by_hand() -> None:
    # Leaving one of the three out, tr Σ is that of a pair, half its squared distance: 5, 5 and 2 for
    # g_1, g_2, g_3. In logs, (n-1)/n Σ (x - x̄)² is their variance.
    units = units_of(np.array([[1.0, 0], [3, 0], [2, 3]]))
    left_out = np.log([10 / 2, 10 / 2, 4 / 2])
    reach = 4.302653 * np.sqrt(2 * np.var(left_out))  # Student's t with 2 degrees of freedom
    found = data_noise(units)["trace_cov"]
    assert found["ci_low"] == pytest.approx(4 * np.exp(-reach), rel=1e-6)
    assert found["ci_high"] == pytest.approx(4 * np.exp(reach), rel=1e-6)


def simulate(repeats: int, units: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    mean = np.zeros(20)
    mean[:2] = 0.5, 1.0
    scale = np.linspace(0.2, 1.5, 20)
    draws = mean + scale * rng.standard_normal((repeats, units, 20))
    truth = {"grad_norm_sq": float(mean @ mean), "trace_cov": float(scale @ scale)}
    truth["snr"] = truth["grad_norm_sq"] / truth["trace_cov"]
    return {"truth": truth, "found": [data_noise(units_of(g)) for g in draws]}


def test_the_estimators_are_unbiased_and_their_intervals_cover() -> None:
    simulated = simulate(2000, 40)
    # the jackknife overstates the variance of what is quadratic in the gradients' noise (Efron and Stein 1981)
    bounds = {"trace_cov": (0.93, 0.97), "grad_norm_sq": (0.95, 0.99), "snr": (0.95, 0.99)}
    for name, truth in simulated["truth"].items():
        estimates = [found[name] for found in simulated["found"]]
        values = np.array([e["value"] for e in estimates])
        assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(len(values)), name
        covered = np.mean([e["ci_low"] <= truth <= e["ci_high"] for e in estimates])
        low, high = bounds[name]
        assert low <= covered <= high, (name, covered)


def test_a_drowned_gradient_has_no_noise_scale() -> None:
    rng = np.random.default_rng(1)
    found = data_noise(units_of(rng.standard_normal((30, 50))))
    scale = found["noise_scale"]
    assert (scale["value"] is None) == (found["snr"]["value"] <= 0)
    weak = data_noise(units_of(rng.standard_normal((30, 50)) + 0.05))["noise_scale"]
    assert weak["ci_high"] is None  # the interval of the signal reaches 0


def test_too_few_units_give_reasons() -> None:
    two = units_of(np.eye(2))
    assert all(e == nothing("fewer than 3 units") for e in data_noise(two).values())
    assert against(two, two, 0.5, paired=True)["cosine"]["reason"] == "fewer than 3 units"
    zero = units_of(np.zeros((5, 2)))
    assert against(zero, units_of(np.ones((5, 2))), 0.0, paired=True)["cosine"]["reason"] == "a gradient is 0"


@pytest.mark.parametrize("paired", [True, False])
def test_cosine_and_norm_ratio_cover_the_truth(paired: bool) -> None:
    rng = np.random.default_rng(2)
    a, b = np.array([2.0, 1.0, 0, 0]), np.array([1.0, 2.0, 1.0, 0])
    cosine, ratio = a @ b / np.sqrt(a @ a * (b @ b)), np.sqrt(a @ a / (b @ b))
    hits = np.zeros(2)
    for _ in range(400):
        shared = rng.standard_normal((60, 4))
        own = shared if paired else rng.standard_normal((60, 4))
        first, second = a + own, b + 0.5 * shared + 0.5 * rng.standard_normal((60, 4))
        found = against(units_of(first), units_of(second), float(first.mean(0) @ second.mean(0)), paired)
        hits += [e["ci_low"] <= t <= e["ci_high"] for e, t in zip(found.values(), (cosine, ratio), strict=True)]
    assert ((hits / 400 >= 0.92) & (hits / 400 <= 0.985)).all(), hits / 400


def test_the_same_gradient_has_cosine_one_whatever_the_projection() -> None:
    rng = np.random.default_rng(3)
    gradients = rng.standard_normal((20, 6)) + 1
    units = Units(np.square(gradients).sum(1), rng.standard_normal((20, 3)), float(np.square(gradients.mean(0)).sum()))
    found = against(units, units, units.mean_squared_norm, paired=True)
    assert found["cosine"] == {"value": 1.0, "ci_low": 1.0, "ci_high": 1.0}
    assert found["norm_ratio"] == {"value": 1.0, "ci_low": 1.0, "ci_high": 1.0}


def test_projections_widen_intervals_and_move_no_value() -> None:
    """Close gradients too: intervals of cosines near 1 exist and hold the truth."""
    rng = np.random.default_rng(5)
    hits, wider = 0, []
    for _ in range(100):
        first = rng.standard_normal((60, 40)) + 1
        second = first + 0.05 * rng.standard_normal((60, 40))
        signs = rng.choice([-1, 1], (40, 64)) / 8
        exact = [units_of(g) for g in (first, second)]
        projected = [Units(u.squared_norm, u.sketch @ signs, u.mean_squared_norm) for u in exact]
        inner = float(first.mean(0) @ second.mean(0))
        one, other = (against(a, b, inner, paired=True)["cosine"] for a, b in (exact, projected))
        assert one["value"] == other["value"] > 0.99
        hits += other["ci_low"] <= 1 / np.sqrt(1 + 0.0025 * 40 / 60 / 40) <= other["ci_high"]
        wider.append((other["ci_high"] - other["ci_low"]) / (one["ci_high"] - one["ci_low"]))
        noise = data_noise(projected[0])
        assert noise["trace_cov"]["value"] == data_noise(exact[0])["trace_cov"]["value"]
    assert hits >= 85 and 0.8 < np.median(wider) < 3


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
