"""Statistics of a comparison, against numbers derived by hand, enumeration and simulation."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlzoo.comparison.outcomes import (
    OVERALL,
    ResultMatrix,
    compare_pairs,
    compare_to,
    difference_of,
    result_matrices,
    summarise,
)
from rlzoo.comparison.statistics import SIGNIFICANT, Interval, crossed_interval, holm, p_value, result_interval
from rlzoo.errors import UserError
from rlzoo.evaluation.metrics import pass_at_k


def outcome_table(correct: dict[tuple[str, int], list[list[int]]], benchmark: str = "sums") -> pa.Table:
    """Outcomes from (algorithm, seed) → [problem][sample] of 0 and 1; greedy is the first sample."""
    rows: list[dict[str, Any]] = []
    for (algorithm, seed), problems in correct.items():
        for index, samples in enumerate(problems):
            where = {"algorithm": algorithm, "seed": seed, "benchmark": benchmark, "problem_id": f"p{index}"}
            rows += [{**where, "decoding": "sample", "sample": i, "correct": bool(c)} for i, c in enumerate(samples)]
            rows.append({**where, "decoding": "greedy", "sample": 0, "correct": bool(samples[0])})
    return pa.Table.from_pylist(rows)


@given(n=st.integers(1, 7), data=st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int, data: st.DataObject) -> None:
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    samples = [1] * correct + [0] * (n - correct)
    subsets = list(combinations(samples, k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at_k(np.array([correct]), np.array([n]), k)[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_by_hand_and_for_many_samples() -> None:
    # 1 - C(2,2)/C(4,2) = 1 - 1/6; none correct: 0; fewer wrong ones than k: 1.
    np.testing.assert_allclose(pass_at_k(np.array([2, 0, 3]), np.array([4, 4, 4]), 2), [5 / 6, 0.0, 1.0], atol=1e-15)
    # 1 - (9999/10000 · … ) telescopes to k/n for one correct sample, where C(n, k) itself overflows a float.
    assert pass_at_k(np.array([1]), np.array([10_000]), 5_000)[0] == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_outside_the_samples_is_an_error_of_the_user(k: int) -> None:
    with pytest.raises(UserError, match=f"pass@{k} needs 1 ≤ k ≤ samples per problem, which is 4") as error:
        pass_at_k(np.array([2, 2]), np.array([4, 6]), k)
    assert "\n" not in str(error.value)


def test_pass_at_k_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="correct"):
        pass_at_k(np.array([5]), np.array([4]), 1)
    with pytest.raises(ValueError, match="0 ≤ correct ≤ n"):
        pass_at_k(np.array([-1]), np.array([4]), 1)


T1, T2 = 12.706205, 4.302653
"""Student's 97.5 % quantiles with one and two degrees of freedom, from a table."""


@pytest.mark.parametrize(
    ("scores", "reach"),
    [
        # One seed: the problems' mean square ½, over 2 problems: se² = ¼, one degree of freedom.
        ([[0.0, 1.0]], T1 * 0.5),
        ([[0.0], [1.0]], T1 * 0.5),
        # Row means 0, 1, 2 and no other differences: Student's over the seeds' means, se² = 1/3.
        ([[0.0] * 9, [1.0] * 9, [2.0] * 9], T2 * (1 / 3) ** 0.5),
        # 3 seeds × 2 problems: mean squares 8, 6 and 3/2. The problems are fewer, so that theirs holds the noise, with
        # one degree of freedom, and seeds add 8 - 3/2; over 6 values. The shares are 0.48 and 0.52. Cochran's quantile
        # is t₂ + (t₁ - t₂)((0.48 - 0.08)/0.92)^0.7, Welch's has 1/(0.48²/1 + 0.52²/2) = 2.735 degrees of freedom and so
        # is 3.3640; halfway between them, as 1/1 - 1/2 = ½.
        (
            [[-3.5, -0.5], [0.0, 0.0], [0.5, 3.5]],
            (T2 + (T1 - T2) * (0.4 / 0.92) ** 0.7 + 3.3640) / 2 * (12.5 / 6) ** 0.5,
        ),
        # The problems' means agree to the last digit, the noise being ½: 0.0039 of that is what chance goes below once
        # in 20 times.
        ([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], T1 * (0.00393214 * 0.5 / 6) ** 0.5),
    ],
)
def test_intervals_by_hand(scores: list[list[float]], reach: float) -> None:
    mean, low, high = crossed_interval(np.array(scores))
    assert mean == pytest.approx(np.mean(scores))
    assert (mean - low, high - mean) == pytest.approx((reach, reach), rel=1e-4)


def test_a_single_value_and_constant_scores_have_no_width() -> None:
    assert crossed_interval(np.array([[0.25]])) == Interval(0.25, 0.25, 0.25)
    assert crossed_interval(np.full((3, 5), 0.5)) == Interval(0.5, 0.5, 0.5)


def test_a_score_s_interval_stays_between_nought_and_one() -> None:
    table = outcome_table({("a", 0): [[1], [1], [1], [0]]})
    assert all(0 < row["ci_low"] < 0.75 < row["ci_high"] < 1 for row in summarise(table, k=1))


@pytest.mark.parametrize("scores", [np.zeros((0, 3)), np.zeros(3), np.array([[np.nan, 1.0]])])
def test_an_interval_needs_a_matrix_of_scores(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite"):
        crossed_interval(scores)


@pytest.mark.parametrize(
    ("seeds", "problems", "seed_effect", "problem_effect", "noise"),
    [
        (1, 100, 0.0, 0.3, 0.25),
        (2, 200, 0.0, 0.3, 0.25),
        (2, 200, 0.01, 0.05, 0.4),  # noise alone, as of a difference
        (2, 80, 0.1, 0.05, 0.1),  # seeds, mostly
        (2, 20, 0.05, 0.2, 0.05),
        (3, 200, 0.0, 0.3, 0.25),
        (3, 200, 0.02, 0.3, 0.25),
        (3, 80, 0.05, 0.3, 0.25),  # seeds, problems and noise matter alike
        (3, 80, 0.3, 0.1, 0.1),  # seeds alone
        (3, 200, 0.01, 0.05, 0.4),  # noise alone, as of a difference
        (5, 100, 0.1, 0.2, 0.1),
        (10, 50, 0.1, 0.2, 0.1),
        (25, 25, 0.2, 0.2, 0.05),
    ],
)
def test_intervals_cover_the_truth_nineteen_times_in_twenty(
    seeds: int, problems: int, seed_effect: float, problem_effect: float, noise: float
) -> None:
    rng, covered, runs = np.random.default_rng(0), 0, 3000
    for _ in range(runs):
        scores = seed_effect * rng.normal(size=(seeds, 1)) + problem_effect * rng.normal(size=problems)
        interval = crossed_interval(scores + noise * rng.normal(size=(seeds, problems)))
        covered += interval.low <= 0 <= interval.high
    assert 0.93 <= covered / runs <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "problems", "centre", "k"),
    [(3, 150, 0.0, 4), (3, 150, 2.5, 4), (3, 150, 0.0, 1), (1, 100, 2.5, 1), (2, 20, 0.0, 4), (10, 30, 3.0, 4)],
)
def test_intervals_cover_for_counts_of_correct_samples(seeds: int, problems: int, centre: float, k: int) -> None:
    """Problems of very different difficulty, k samples per problem: what an evaluation gives."""
    rng, covered, runs = np.random.default_rng(1), 0, 2000
    difficulty = rng.normal(centre, 2.0, size=200_000)
    truth = float((1 / (1 + np.exp(-difficulty[:, None] - 0.1 * rng.normal(size=(200_000, 20))))).mean())
    for _ in range(runs):
        logit = rng.choice(difficulty, problems) + 0.1 * rng.normal(size=(seeds, 1))
        interval = result_interval(rng.binomial(k, 1 / (1 + np.exp(-logit))) / k)
        covered += interval.low <= truth <= interval.high
    assert 0.93 <= covered / runs <= 0.97


def test_result_intervals_by_hand() -> None:
    # Wilson for 15 of 20: centre (0.75 + z²/40)/(1 + z²/20), reach √(z²/20 · 0.1875 + (z²/40)²)/(1 + z²/20).
    assert result_interval(np.array([[1.0] * 15 + [0.0] * 5])) == pytest.approx((0.75, 0.5313, 0.8881), abs=1e-4)
    # 20 of 20, by any number of seeds: 1/(1 + z²/20).
    for seeds in (1, 3):
        assert result_interval(np.ones((seeds, 20))) == pytest.approx((1, 0.8389, 1), abs=1e-4)
    # 2 seeds, means ¼ and ¾, problems alike: t₁ and SE = ¼, so n = ¼/(1/16) = 4 and t²/n = 40.36: almost everything.
    mean, low, high = result_interval(np.array([[0.25] * 8, [0.75] * 8]))
    reach = (40.3619 / 4 + 40.3619**2 / 4) ** 0.5 / 41.3619
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - reach, 0.5 + reach), abs=1e-4)


def test_pairing_removes_what_two_algorithms_share() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random((3, 60))
    assert crossed_interval(hard + 0.1 - hard) == pytest.approx((0.1, 0.1, 0.1))
    assert p_value(hard + 0.1 - hard) < 1e-12 and p_value(hard - 0.5) > 0.01
    noisy = rng.random((3, 60))
    assert crossed_interval(noisy - hard, level=0.5).high < crossed_interval(noisy - hard).high


def test_scores_of_a_table_by_hand() -> None:
    table = outcome_table({("a", 0): [[1, 0, 0, 0], [0, 1, 1, 0]], ("a", 1): [[0, 0, 0, 0], [1, 1, 1, 1]]})
    matrices = result_matrices(table, k=2)
    assert matrices["a", "sums", "avg_at_k"].values.tolist() == [[0.25, 0.5], [0, 1]]
    assert matrices["a", "sums", "greedy"].values.tolist() == [[1, 0], [0, 1]]
    # c = 1: 1 - C(3,2)/C(4,2) = 1/2; c = 2: 5/6.
    np.testing.assert_allclose(matrices["a", "sums", "pass_at_k"].values, [[0.5, 5 / 6], [0.0, 1.0]])


def test_summary_has_a_row_for_every_algorithm_and_metric() -> None:
    table = outcome_table({("base", -1): [[0, 1]], ("b", 0): [[1, 1]], ("a", 0): [[1, 1]], ("a", 1): [[0, 1]]})
    rows = summarise(table, k={"sums": 2})
    assert [(row["algorithm"], row["metric"]) for row in rows[:4]] == [
        ("base", "avg_at_k"),
        ("base", "greedy"),
        ("base", "pass_at_k"),
        ("b", "avg_at_k"),
    ]
    within = result_interval(np.array([[1.0], [0.5]]))
    assert rows[6] == {
        "algorithm": "a", "benchmark": "sums", "metric": "avg_at_k",
        "mean": 0.75, "seeds": 2, "ci_low": pytest.approx(within.low), "ci_high": pytest.approx(within.high),
    }  # fmt: skip


def test_each_benchmark_has_its_own_k_and_its_own_rows() -> None:
    correct = {("b", 0): [[1, 0]], ("a", 0): [[1, 0]]}
    table = pa.concat_tables([outcome_table(correct, "sums"), outcome_table(correct, "words")])
    rows = summarise(table, k={"sums": 1, "words": 2})
    assert [(row["benchmark"], row["algorithm"], row["metric"]) for row in rows] == [
        (benchmark, algorithm, metric)
        for benchmark in ("sums", "words", OVERALL)
        for algorithm in ("b", "a")
        for metric in ("avg_at_k", "greedy", "pass_at_k")
    ]
    chances = {row["benchmark"]: row["mean"] for row in rows if row["metric"] == "pass_at_k"}
    assert chances == {"sums": 0.5, "words": 1.0, OVERALL: 0.75}


def test_comparison_pairs_shared_seeds_and_sets_the_base_beside_each() -> None:
    table = outcome_table(
        {
            ("base", -1): [[0, 0], [0, 1]],
            ("a", 0): [[0, 1], [1, 1]],
            ("a", 1): [[1, 1], [1, 1]],
            ("b", 1): [[0, 1], [0, 1]],
            ("c", 2): [[1, 1], [1, 1]],
        }
    )
    rows = {(row["algorithm"], row["metric"]): row for row in compare_to(table, "a", k=1)}
    # base: mean 1/4 against 7/8 over two seeds; b: 1/2 against seed 1 of a, which is 1.
    assert rows["base", "avg_at_k"]["difference"] == pytest.approx(-5 / 8)
    assert rows["base", "avg_at_k"]["seeds"] == 2
    assert rows["b", "avg_at_k"]["difference"] == pytest.approx(-1 / 2)
    assert rows["b", "avg_at_k"]["seeds"] == 1
    assert {name for name, _ in rows} == {"base", "b"}, "c shares no seed with a"
    against_base = compare_to(table, "base", k=1)
    assert against_base[0]["difference"] == pytest.approx(5 / 8)


def test_alignment_matches_problems_by_name() -> None:
    a = ResultMatrix(np.array([[1.0, 2.0, 3.0]]), (0,), ("p", "q", "r"))
    b = ResultMatrix(np.array([[30.0, 10.0]]), (0,), ("r", "p"))
    difference = difference_of(a, b)
    assert difference is not None and difference.problems == ("p", "r")
    assert difference.values.tolist() == [[-9, -27]]


def test_inconsistent_outcomes_are_named() -> None:
    table = outcome_table({("a", 0): [[1], [0]], ("a", 1): [[1]]})
    with pytest.raises(UserError, match=r"'a' on 'sums': seed 1 lacks problem 'p1'"):
        result_matrices(table, k=1)
    with pytest.raises(UserError, match="hold a sample twice"):
        result_matrices(pa.concat_tables([table, table]), k=1)
    with pytest.raises(UserError, match="did you mean 'a'"):
        compare_to(outcome_table({("a", 0): [[1]]}), "aa", k=1)


def test_a_p_value_is_never_below_the_level_at_which_the_interval_ends_at_zero() -> None:
    rng = np.random.default_rng(3)
    for shape in ((1, 30), (3, 1), (2, 8), (3, 40), (10, 20)):
        scores = 0.3 + rng.normal(size=(shape[0], 1)) / 4 + rng.normal(size=shape[1]) / 4 + rng.normal(size=shape) / 4
        p = p_value(scores)
        ends = crossed_interval(scores, level=1 - p)[1:]
        assert 0 < p < 1 and (ends[0] * ends[1] > 0 or min(map(abs, ends)) == pytest.approx(0, abs=1e-6))
        if 1 in shape:
            assert min(map(abs, ends)) == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "seed_effect"), [(2, 0.0), (2, 1.0), (2, 4.0), (3, 0.0), (3, 4.0)])
def test_small_p_values_are_as_rare_as_they_say(seeds: int, seed_effect: float) -> None:
    """Holm's correction decides at p-values of a thousandth; few seeds that agree by chance must not reach them."""
    rng, runs = np.random.default_rng(0), 2000
    p = np.array([
        p_value(seed_effect * rng.normal(size=(seeds, 1)) + rng.normal(size=20) + rng.normal(size=(seeds, 20)))
        for _ in range(runs)
    ])  # fmt: skip
    for level in (0.05, 0.01, 0.001):
        assert np.mean(p <= level) <= level + 3 * (level / runs) ** 0.5


def test_p_values_by_hand() -> None:
    # One seed, two problems: mean ½, standard error ½, one degree of freedom: P(|t₁| > 1) = ½.
    assert p_value(np.array([[0.0, 1.0]])) == pytest.approx(0.5)
    assert p_value(np.array([[-1.0, 1.0]])) == 1, "a mean of 0"
    assert p_value(np.array([[0.7]])) == 1, "one value speaks of nothing"
    assert p_value(np.full((3, 4), 0.1)) < 1e-12, "no variance but for rounding"
    assert p_value(np.ones((3, 4))) == 0


def test_holm_by_hand() -> None:
    # In order 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1 gives 0.04, 0.06, 0.06, 0.04, and none may fall.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1, 1] and holm([0.2]) == [0.2] and holm([]) == []


@pytest.mark.slow
def test_a_table_of_equal_algorithms_rarely_calls_one_distinguishable() -> None:
    """27 algorithms no better than the baseline: at least one is called distinguishable in at most 5 % of tables."""
    rng, wrong, uncorrected, tables = np.random.default_rng(0), 0, 0, 200
    for _ in range(tables):
        baseline = rng.normal(size=(3, 60))
        p = [p_value(rng.normal(size=(3, 60)) - baseline) for _ in range(27)]
        wrong += min(holm(p)) < SIGNIFICANT
        uncorrected += min(p) < SIGNIFICANT
    assert wrong / tables <= 0.08  # 5 % and two standard errors
    assert uncorrected / tables > 0.3, "without the correction it happens all the time"


def flips(*correct: int) -> list[list[int]]:
    return [[c] for c in correct]


def test_differences_of_a_benchmark_are_corrected_together() -> None:
    table = pa.concat_tables(
        [
            outcome_table(
                {("a", 0): flips(*[0] * 12), ("b", 0): flips(*[1] * 9, *[0] * 3), ("c", 0): flips(1, *[0] * 11)}
            ),
            outcome_table({("a", 0): flips(0, 0, 0, 0), ("b", 0): flips(1, 1, 1, 0)}, benchmark="few"),
        ]
    )
    rows = {(r["algorithm"], r["benchmark"], r["metric"]): r for r in compare_to(table, "a", k=1)}
    alone = p_value(np.array([[1.0] * 9 + [0.0] * 3]))
    # with one sample per problem the three metrics are one number: of 6 differences on sums, b's three are the smallest
    assert rows["b", "sums", "avg_at_k"]["p"] == pytest.approx(6 * alone)
    assert rows["b", "sums", "pass_at_k"]["p"] == pytest.approx(6 * alone), "a larger p is never corrected to a smaller"
    assert rows["b", "few", "greedy"]["p"] == pytest.approx(3 * p_value(np.array([[1.0, 1.0, 1.0, 0.0]])))
    low, high = rows["b", "sums", "greedy"]["ci_low"], rows["b", "sums", "greedy"]["ci_high"]
    assert Interval(0.75, low, high) == pytest.approx(crossed_interval(np.array([[1.0] * 9 + [0.0] * 3])))


def test_the_best_two_are_corrected_for_all_pairs() -> None:
    table = outcome_table({("base", -1): flips(1, 1, 1), ("a", 0): flips(1, 1, 0), ("b", 0): flips(1, 0, 0),
                           ("c", 0): flips(0, 0, 0), ("d", 1): flips(0, 0, 0)})  # fmt: skip
    pairs = compare_pairs(result_matrices(table, k=1), "sums", "greedy")
    assert set(pairs) == {(x, y) for x in "abc" for y in "abc" if x != y}, "d shares no seed, the base is no algorithm"
    assert pairs["a", "b"] == pairs["b", "a"] == pytest.approx(2 * p_value(np.array([[0.0, 1.0, 0.0]]))), (
        "second of three"
    )


def test_a_mean_that_is_rounding_noise_has_a_p_value_of_one() -> None:
    """The two quantiles meet at 1, beyond which a quantile's square would grow again."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 20)) + rng.normal(size=20) + rng.normal(size=(3, 1))
    scores += 1e-13 - scores.mean()
    assert p_value(scores) == pytest.approx(1)
    for shift in (1e-9, 1e-6, 1e-3, 1.0, 1e3):
        assert 0 <= p_value(scores + shift) <= 1


def halves(*sizes: int) -> np.ndarray:
    """The benchmark of each problem, of benchmarks of so many problems."""
    return np.repeat(np.arange(len(sizes)), sizes)


def test_the_interval_of_a_mean_over_benchmarks_by_hand() -> None:
    # One seed: means 1/2 (of 0, 1) and 2 (of 1, 2, 3), so 5/4. Variances of the means 1/4 and 1/3, and of half their
    # sum 1/16 + 1/12 = 7/48; Satterthwaite's degrees of freedom (7/48)² / ((1/16)²/1 + (1/12)²/2) = 49/17.
    scores, own = np.array([[0.0, 1.0, 1.0, 2.0, 3.0]]), halves(2, 3)
    reach = stats.t.ppf(0.975, 49 / 17) * (7 / 48) ** 0.5
    for interval in (crossed_interval(scores, benchmarks=own), crossed_interval(scores[:, ::-1], benchmarks=own[::-1])):
        assert interval == pytest.approx((5 / 4, 5 / 4 - reach, 5 / 4 + reach))
    # Seeds alone: their means over benchmarks are 1/4 and 3/4, however many problems each has, so t₁ and SE = 1/4.
    seeds = np.array([[0.0] * 6 + [0.5] * 2, [0.5] * 6 + [1.0] * 2])
    assert crossed_interval(seeds, benchmarks=halves(6, 2)).high == pytest.approx(0.5 + stats.t.ppf(0.975, 1) / 4)
    # All right on 4 problems and all wrong on 12, by one seed: no variance is seen, so Wilson's rule for a half of
    # 4 / (1/4 + 1/12) = 12 answers: the reach is √(z²/48 + z⁴/576) / (1 + z²/12).
    z = stats.norm.ppf(0.975)
    reach = (z**2 / 48 + z**4 / 576) ** 0.5 / (1 + z**2 / 12)
    assert result_interval(np.array([[1.0] * 4 + [0.0] * 12]), benchmarks=halves(4, 12)) == pytest.approx(
        (0.5, 0.5 - reach, 0.5 + reach)
    )


def test_benchmarks_of_different_difficulty_add_no_variance() -> None:
    scores, own = np.random.default_rng(0).normal(size=(3, 12)), halves(4, 8)
    interval, shifted = (crossed_interval(scores + 5 * shift * own, benchmarks=own) for shift in (0, 1))
    assert shifted == pytest.approx([value + 2.5 for value in interval])
    assert p_value(scores, own) > 0.05 > p_value(scores + 5 * own, own)
    alone = crossed_interval(scores)
    assert crossed_interval(scores, benchmarks=halves(12)) == alone, "one benchmark is as none named"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "sizes", "seed_effect", "problem_effect", "noise"),
    [
        (1, (30, 100), 0.0, 0.3, 0.25),
        (2, (20, 200), 0.0, 0.3, 0.25),
        (3, (30, 100, 30), 0.05, 0.3, 0.25),
        (3, (20, 100), 0.3, 0.1, 0.1),
        (3, (50, 200), 0.01, 0.05, 0.4),
        (10, (10, 40), 0.1, 0.2, 0.1),
    ],
)
def test_intervals_of_a_mean_over_benchmarks_cover(
    seeds: int, sizes: tuple[int, ...], seed_effect: float, problem_effect: float, noise: float
) -> None:
    """A seed may do better on one benchmark than on another, and benchmarks differ in difficulty."""
    rng, covered, runs, own = np.random.default_rng(0), 0, 2000, halves(*sizes)
    for _ in range(runs):
        of_seed = seed_effect * (rng.normal(size=(seeds, 1)) + rng.normal(size=(seeds, len(sizes)))[:, own])
        scores = own - own.max() / 2 + of_seed + problem_effect * rng.normal(size=len(own))
        interval = crossed_interval(scores + noise * rng.normal(size=(seeds, len(own))), benchmarks=own)
        covered += interval.low <= 0 <= interval.high
    assert 0.93 <= covered / runs <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "sizes", "centres", "k"),
    [(3, (30, 100), (0.0, 1.0), 4), (1, (100, 200), (0.0, 2.0), 1), (10, (30, 60), (2.0, -1.0), 4)],
)
def test_intervals_of_a_mean_over_benchmarks_cover_for_counts_of_correct_samples(
    seeds: int, sizes: tuple[int, ...], centres: tuple[float, ...], k: int
) -> None:
    rng, covered, runs, own = np.random.default_rng(1), 0, 1500, halves(*sizes)
    difficulty = [rng.normal(centre, 2.0, size=100_000) for centre in centres]
    seen = [each[:, None] + 0.1 * rng.normal(size=(100_000, 10)) for each in difficulty]
    truth = float(np.mean([(1 / (1 + np.exp(-each))).mean() for each in seen]))
    for _ in range(runs):
        logit = np.concatenate([rng.choice(each, size) for each, size in zip(difficulty, sizes, strict=True)])
        chance = 1 / (1 + np.exp(-logit - 0.1 * rng.normal(size=(seeds, 1))))
        interval = result_interval(rng.binomial(k, chance) / k, benchmarks=own)
        covered += interval.low <= truth <= interval.high
    assert 0.93 <= covered / runs <= 0.97


def test_the_mean_over_benchmarks_is_compared_like_a_benchmark() -> None:
    table = pa.concat_tables(
        [
            outcome_table({("a", 0): flips(*[0] * 8), ("b", 0): flips(*[1] * 6, 0, 0), ("c", 0): flips(1, *[0] * 7)}),
            outcome_table({("a", 0): flips(0, 1), ("b", 0): flips(1, 1), ("c", 1): flips(1, 1)}, benchmark="few"),
        ]
    )
    rows = {(r["algorithm"], r["benchmark"], r["metric"]): r for r in compare_to(table, "a", k=1)}
    assert ("c", OVERALL, "greedy") not in rows, "no seed of c has both benchmarks"
    scores, own = np.array([[1.0, 0.0] + [1.0] * 6 + [0.0] * 2]), halves(2, 8)
    row = rows["b", OVERALL, "greedy"]
    assert row["difference"] == pytest.approx((6 / 8 + 1 / 2) / 2)
    assert (row["difference"], row["ci_low"], row["ci_high"]) == pytest.approx(crossed_interval(scores, benchmarks=own))
    assert row["p"] == pytest.approx(3 * p_value(scores, own)), "corrected for the three differences of its table"
    pairs = compare_pairs(result_matrices(table, k=1), OVERALL, "greedy")
    assert pairs == {("a", "b"): pytest.approx(p_value(scores, own)), ("b", "a"): pytest.approx(p_value(scores, own))}


def test_the_docs_say_how_wide_intervals_from_few_seeds_are() -> None:
    """Seeds and problems that add up, without noise: the standard error is exact, and its quantile is what remains."""

    def effects(count: int) -> np.ndarray:
        values = np.arange(count) - (count - 1) / 2
        return np.asarray(values / np.sqrt(values.var(ddof=1) / count))

    def widths(share: float) -> list[str]:
        many = np.sqrt(1 - share) * effects(5000)
        found = []
        for seeds in (5, 3, 2):
            _, low, high = crossed_interval(np.sqrt(share) * effects(seeds)[:, None] + many)
            found.append(f"{(high - low) / 2 / stats.norm.ppf(0.975):.1f}")
        return found

    page = " ".join((Path(__file__).parent.parent / "docs/results.md").read_text(encoding="utf-8").split())
    five, three, two = widths(0.5)
    told = f"{five} times as wide with five seeds as with many, {three} times with three and {two} times with two"
    assert f"{told}; where all of it is, {', '.join(widths(1.0)[:2])} and {widths(1.0)[2]} times." in page
