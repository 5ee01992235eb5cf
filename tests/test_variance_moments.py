"""Token moments against enumerated cases, Monte Carlo, statistics of coefficients: numbers known in advance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from rlzoo.experiments import tabular
from rlzoo.variance import moments
from rlzoo.variance.coefficients import coefficient_statistics, ess_fraction, hill
from rlzoo.variance.moments import TokenTable

LOGITS = torch.tensor([3.0, 1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
SECOND = torch.stack([LOGITS.roll(i) * (1 - 0.1 * i) for i in range(5)])
WEIGHTS: Mapping[str, tabular.Weight] = {**tabular.OBJECTIVES, "square": lambda p: p**2}
over_weights = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)


def table_of(rows: list[list[tuple[torch.Tensor, int]]]) -> TokenTable:
    """A table from the logits and the expert's token at each position of each row."""
    flat = [(i, logits.softmax(0), token) for i, row in enumerate(rows) for logits, token in row]
    return TokenTable(
        np.array([i for i, _, _ in flat]),
        np.array([math.log(p[token]) for _, p, token in flat]),
        np.array([float(1 - p[token]) for _, p, token in flat]),
        np.array([float(p.square().sum() - p[token] ** 2) for _, p, token in flat]),
    )


def by_logp(row: Any, logp: Any, others: Any = 0.1) -> TokenTable:
    """A table from log-probs; the other tokens' squares are that share of their greatest possible sum."""
    logp = np.asarray(logp, float)
    miss = -np.expm1(logp)
    return TokenTable(np.asarray(row), logp, miss, others * miss**2)


def coefficients(table: TokenTable, weight: tabular.Weight) -> np.ndarray:
    return np.array([weight(p) for p in np.exp(table.logp)])


@over_weights
def test_the_bandit_has_the_predicted_variance(weight: tabular.Weight) -> None:
    table = table_of([[(LOGITS, token)] for token in range(5)])
    predicted = np.exp(moments.log_trace_cov(table, coefficients(table, weight)))
    enumerated = [tabular.bandit(LOGITS, token, weight) for token in range(5)]
    np.testing.assert_allclose(predicted, [m.trace_cov for m in enumerated], rtol=1e-9)
    p = np.exp(table.logp)
    np.testing.assert_allclose([m.relative_noise for m in enumerated], (1 - p) / p, rtol=1e-9)


@over_weights
def test_the_mean_of_the_estimator_is_the_objectives_gradient(weight: tabular.Weight) -> None:
    for token in range(5):
        expected = weight(float(LOGITS.softmax(0)[token])) * tabular.score(LOGITS, token)
        torch.testing.assert_close(tabular.bandit(LOGITS, token, weight).mean, expected, rtol=1e-12, atol=1e-12)


@over_weights
@pytest.mark.parametrize("expert", [(0, 0), (1, 2), (3, 4)])
def test_two_tokens_add_up_token_by_token(weight: tabular.Weight, expert: tuple[int, int]) -> None:
    table = table_of([[(LOGITS, expert[0]), (SECOND[expert[0]], expert[1])]])
    predicted = np.exp(moments.log_trace_cov(table, coefficients(table, weight))).sum()
    enumerated = tabular.sequence_by_token(LOGITS, SECOND, expert, weight)
    assert predicted == pytest.approx(enumerated.trace_cov, rel=1e-9)


@pytest.mark.parametrize("expert", [(0, 0), (1, 2), (3, 4)])
def test_two_tokens_as_one_action_have_the_closed_form(expert: tuple[int, int]) -> None:
    table = table_of([[(LOGITS, expert[0]), (SECOND[expert[0]], expert[1])]])
    found = moments.sequences(table)
    for key, weight in (("log10_trace_cov_sft", WEIGHTS["SFT"]), ("log10_trace_cov_dft", WEIGHTS["DFT"])):
        enumerated = tabular.sequence_as_one_action(LOGITS, SECOND, expert, weight).trace_cov
        assert 10 ** found[key]["0.5"] == pytest.approx(enumerated, rel=1e-9)
    assert 10 ** found["log10_p"]["1"] == pytest.approx(math.exp(table.logp.sum()), rel=1e-9)


def test_the_score_norm_is_bounded_and_exact_near_certainty() -> None:
    table = table_of([[(LOGITS, token)] for token in range(5)])
    squares = [float(tabular.score(LOGITS, token).square().sum()) for token in range(5)]
    np.testing.assert_allclose(table.score_norm, squares, rtol=1e-12)
    miss = -np.expm1(table.logp)
    assert (table.score_norm >= miss**2).all() and (table.score_norm <= 2 * miss**2 + 1e-15).all()
    certain = by_logp([0, 0], [-1e-9, 0.0], 0.0)
    np.testing.assert_allclose(certain.score_norm, [1e-18, 0], rtol=1e-6, atol=1e-20)
    assert np.isneginf(moments.log_trace_cov(certain, np.ones(2))[1])


def test_what_training_sees_is_bounded_where_the_importance_weights_are_not() -> None:
    rare = torch.tensor([0.0, -20.0], dtype=torch.float64)
    assert tabular.bandit(rare, 1, WEIGHTS["SFT"]).trace_cov > 1e8
    data = tabular.over_data(rare, [(0.5, 0), (0.5, 1)], WEIGHTS["SFT"])
    assert data.trace_cov < 1  # S ≤ 2, whatever p


# Monte Carlo


def random_table(tokens: int, seed: int) -> tuple[TokenTable, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(tokens, 30, generator=draw, dtype=torch.float64)
    probability = logits.softmax(1)
    target = torch.multinomial(probability, 1, generator=draw)[:, 0]
    p = probability.gather(1, target[:, None])[:, 0]
    others = probability.square().sum(1) - p.square()
    return TokenTable(np.arange(tokens) // 4, p.log().numpy(), (1 - p).numpy(), others.numpy()), probability, target


def test_block_variances_are_the_sample_covariance_of_the_estimator() -> None:
    # 16 draws, 5 hits: values w s* five times and 0 eleven times, whose sample covariance has the trace
    # w² S · (16/15) · (5/16)(11/16). Here by numpy from the values themselves.
    table = table_of([[(LOGITS, 1)]])
    s = tabular.score(LOGITS, 1).numpy()
    w = 0.7 / math.exp(table.logp[0])
    values = np.array([w * s] * 5 + [0 * s] * 11)
    expected = np.trace(np.cov(values.T))
    found = moments.block_variances(table, np.array([0.7]), np.array([[5]]), 16)
    assert found.shape == (1, 1) and found[0, 0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_prediction_and_monte_carlo_agree_in_the_bins() -> None:
    agree = total = 0
    for seed in range(5):
        table, probability, target = random_table(400, seed)
        generator = torch.Generator().manual_seed(seed)
        for c in (np.ones(400), np.exp(table.logp)):
            drawn = torch.multinomial(probability, 2048, replacement=True, generator=generator)
            hits = (drawn == target[:, None]).view(400, 128, 16).sum(2).numpy()
            estimates = moments.block_variances(table, c, hits, 16)
            rows = moments.bins(table, c, estimates, 2048, seed)
            compared = [row for row in rows if row["comparable"]]
            assert sum(row["tokens"] for row in rows) == 400
            total += len(compared)
            agree += sum(row["ci_low"] <= row["predicted"] <= row["ci_high"] for row in compared)
            whole = moments.comparable(table, c, estimates, seed)
            assert whole["ci_low"] < whole["monte_carlo"] < whole["ci_high"]
    assert total > 150
    assert agree / total >= 0.93


def test_monte_carlo_notices_a_wrong_prediction() -> None:
    """Were the exact variance off by a tenth, the intervals would say so."""
    table, probability, target = random_table(400, 0)
    drawn = torch.multinomial(probability, 4096, replacement=True, generator=torch.Generator().manual_seed(0))
    hits = (drawn == target[:, None]).view(400, 128, 32).sum(2).numpy()
    rows = moments.bins(table, np.ones(400), moments.block_variances(table, np.ones(400), hits, 32), 4096, 0)
    compared = [row for row in rows if row["comparable"]]
    assert np.mean([row["ci_low"] <= 1.1 * row["predicted"] <= row["ci_high"] for row in compared]) < 0.5


def test_bins_say_why_they_cannot_be_compared() -> None:
    table = by_logp(np.arange(3), np.log([1e-6, 0.02, 0.5]))
    rows = moments.bins(table, np.ones(3), np.ones((3, 128)), 2048, 0)
    assert [row["comparable"] for row in rows] == [False, False, True]
    assert "too few draws hit" in rows[0]["reason"] and "41 hits or misses" in rows[1]["reason"]
    assert all(row["reason"] == "no draws were requested" for row in moments.bins(table, np.ones(3), None, 0, 0))


# Slopes


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, -1.0), (0.5, 0.0), (1.0, 1.0)])
def test_the_slope_is_that_of_the_law(alpha: float, expected: float) -> None:
    # tr Cov = p^2α S (1-p)/p, so the slope is 2α - 1; (1-p) bends it by less than 0.05 below p = 0.1.
    rng = np.random.default_rng(0)
    logp = np.log(rng.uniform(1e-4, 0.1, 500)) - rng.exponential(2, 500)
    p = np.exp(logp)
    table = by_logp(np.arange(500) // 5, logp, rng.uniform(0.05, 1, 500))
    found = moments.slope(table, p**alpha, 0)
    assert found["slope"] == pytest.approx(expected, abs=0.05)
    low, high = found["slope_ci"]
    assert low <= found["slope"] <= high and high - low < 0.1
    raw = stats.linregress(logp, moments.log_trace_cov(table, p**alpha)).slope
    assert found["slope_raw"] == pytest.approx(raw)


def test_the_slope_is_taken_at_equal_score_norm() -> None:
    """S of rare tokens from (1-p)² to near 2(1-p)², the rarer the more: left in, it would bend the slope by 0.1."""
    rng = np.random.default_rng(1)
    logp = np.log(rng.uniform(1e-4, 0.1, 500))
    rarity = (np.log(0.1) - logp) / np.log(1000)  # 0 at p = 0.1, 1 at p = 1e-4
    table = by_logp(np.arange(500) // 5, logp, rarity)
    found = moments.slope(table, np.ones(500), 0)
    # tr Cov / S = (1-p)/p, fitted by hand
    by_hand = np.polyfit(logp, np.log1p(-np.exp(logp)) - logp, 1)[0]
    assert found["slope"] == pytest.approx(by_hand, rel=1e-9)
    assert found["slope_raw"] < by_hand - 0.05
    assert found["slope_ci"][0] <= by_hand <= found["slope_ci"][1] < by_hand + 0.05


def test_rows_of_one_prompt_do_not_narrow_the_slopes_interval() -> None:
    rng = np.random.default_rng(0)
    logp = np.log(rng.uniform(1e-4, 0.1, 200))
    c = np.exp(rng.normal(size=40).repeat(5) * logp / 10)  # how c depends on p differs by row
    once = moments.slope(by_logp(np.arange(200) // 5, logp), c, 0)
    four = by_logp(np.arange(800) // 5, np.tile(logp, 4))
    again = moments.slope(four, np.tile(c, 4), 0, np.tile(np.arange(40), 4))
    assert again["slope_ci"] == pytest.approx(once["slope_ci"])
    low, high = moments.slope(four, np.tile(c, 4), 0)["slope_ci"]
    assert high - low < 0.7 * (once["slope_ci"][1] - once["slope_ci"][0])


def test_a_slope_needs_rare_tokens() -> None:
    found = moments.slope(by_logp(np.arange(50), np.full(50, -0.1)), np.ones(50), 0)
    assert found["slope"] is None and found["slope_reason"].startswith("0 tokens have p ≤ 0.1")


def test_importance_weights_have_the_chi_square_moment() -> None:
    table = by_logp(np.arange(2), np.log([0.1, 0.5]))
    assert 10 ** moments.importance_weights(table, np.ones(2))["log10_second_moment"] == pytest.approx((10 + 2) / 2)
    dft = moments.importance_weights(table, np.array([0.1, 0.5]))  # w = 1 on a hit, so E w² = p
    assert 10 ** dft["log10_second_moment"] == pytest.approx(0.3)
    assert dft["log10_quantiles"]["1"] == pytest.approx(0, abs=1e-12)


# Coefficients


def test_statistics_of_known_coefficients() -> None:
    found = coefficient_statistics(np.array([1.0, 2, 3, 6]))
    # mean 3, variance (4 + 1 + 0 + 9)/4 = 3.5, fourth moment (16 + 1 + 0 + 81)/4 = 24.5, (Σc)²/(4 Σc²) = 144/200
    expected = {"mean": 3, "cv": math.sqrt(3.5) / 3, "max_over_mean": 2, "kurtosis": 2.0, "ess_fraction": 0.72}
    assert found.pop("hill") is None
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.0], {"mean": 0.0, "cv": None, "ess_fraction": None}),
        ([2.0] * 500, {"mean": 2.0, "cv": 0.0, "kurtosis": None, "hill": None, "ess_fraction": 1.0}),
        ([1.0, -1.0], {"mean": 0.0, "cv": None, "max_over_mean": 1.0, "ess_fraction": 1.0}),
    ],
)
def test_statistics_that_do_not_exist_are_none(values: list[float], expected: dict[str, Any]) -> None:
    found = coefficient_statistics(np.array(values))
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_hill_finds_the_tail_index_of_a_pareto(alpha: float) -> None:
    sample = np.random.default_rng(0).pareto(alpha, 200_000) + 1
    assert hill(sample) == pytest.approx(alpha, rel=3 / math.sqrt(math.isqrt(200_000)))


def test_ess_does_not_overflow() -> None:
    assert ess_fraction(np.array([1e300, 1e300, 0.0, 0.0])) == pytest.approx(0.5)
