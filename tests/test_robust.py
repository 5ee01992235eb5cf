"""Permutation tests, interquartile means and probabilities of improvement, by hand and by simulation."""

from __future__ import annotations

from itertools import product

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from rlzoo.comparison.outcomes import OVERALL, ResultMatrix, check_robustness, flipped
from rlzoo.comparison.robust import (
    FEWEST_FOR_BOOTSTRAP,
    interquartile_mean,
    iqm_interval,
    probability_of_improvement,
    sign_flip_p,
)
from rlzoo.errors import UserError
from rlzoo.experiments.benchmarks.coverage import robust


def test_three_seeds_that_agree_have_a_p_value_of_a_quarter() -> None:
    # Of the 8 combinations of signs of 1, 2 and 4 only +++ and --- are as far from 0.
    assert sign_flip_p(np.array([0.1, 0.2, 0.4])) == 2 / 8
    # -1 + 2 + 4 = 5: also reached or exceeded by +++, and by the opposites of both.
    assert sign_flip_p(np.array([-0.1, 0.2, 0.4])) == 4 / 8
    assert sign_flip_p(np.zeros(5)) == 1 and sign_flip_p(np.array([0.0, 0.3, 0.0])) == 1
    for wrong in (np.zeros((2, 2)), np.zeros(0), np.array([np.nan])):
        with pytest.raises(ValueError, match="finite"):
            sign_flip_p(wrong)


def test_random_flips_agree_with_all_flips() -> None:
    rng = np.random.default_rng(0)
    differences = rng.integers(-4, 6, size=16) / 4
    everything = np.array(list(product((-1, 1), repeat=16))) @ differences
    exact = float(np.mean(np.abs(everything) >= abs(differences.sum()) - 1e-9))
    assert 0.01 < exact < 0.9
    assert sign_flip_p(differences) == pytest.approx(exact, abs=4 * (exact / 10_000) ** 0.5)
    shifted = rng.normal(0.5, 1, 200)
    assert sign_flip_p(shifted) == 1 / 10_001, "never 0"


def test_a_permutation_test_is_right_for_what_it_flips_and_for_nothing_else() -> None:
    """Seeds that differ from each other make two algorithms differ that are equal over all seeds."""
    rng, runs = np.random.default_rng(0), 400
    seeds_vary = [0.3 * rng.normal(size=(6, 1)) + rng.normal(size=(6, 60)) for _ in range(runs)]
    of_seeds = np.mean([sign_flip_p(one.mean(1)) <= 0.05 for one in seeds_vary])
    of_problems = np.mean([sign_flip_p(one.mean(0)) <= 0.05 for one in seeds_vary])
    assert of_seeds <= 0.05 + 2 * (0.05 / runs) ** 0.5
    assert of_problems > 0.12, "valid for these seeds, not for further ones"


def test_interquartile_means_by_hand() -> None:
    # 8 values: the middle four. 3 values: a quarter of each outer one and all of the middle, over 1.5.
    assert interquartile_mean(np.array([90.0, 3, 4, 5, 6, 1, 2, -70])) == pytest.approx(3.5)
    assert interquartile_mean(np.array([[0.0, 1, 8], [1, 1, 1]])) == pytest.approx([(0 + 4 + 8) / 6, 1])
    values = np.random.default_rng(0).random(40)
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25)), "as rliable has it"


def test_a_bootstrap_interval_needs_ten_seeds() -> None:
    rng = np.random.default_rng(0)
    results = 0.5 + 0.02 * rng.normal(size=(FEWEST_FOR_BOOTSTRAP, 2))
    results[0] = 0.0  # collapsed
    mean, low, high = iqm_interval(results)
    assert low < mean < high and 0.45 < mean < 0.55
    assert iqm_interval(results) == (mean, low, high), "the same each time"
    few = iqm_interval(results[1:])
    assert few.mean == pytest.approx(float(interquartile_mean(results[1:].ravel()))) and np.isnan(few[1:]).all()


def test_probabilities_of_improvement_by_hand() -> None:
    one, other = np.array([[0.3], [0.5], [0.7]]), np.array([[0.2], [0.5], [0.6]])
    # 0.3 beats 0.2; 0.5 beats 0.2 and ties with 0.5; 0.7 beats all: 1 + 1.5 + 3 of 9 pairs.
    found = probability_of_improvement(one, other)
    assert found.mean == pytest.approx(5.5 / 9) and 0.1 < found.low < 5.5 / 9 < found.high < 1
    assert probability_of_improvement(other, one).mean == pytest.approx(3.5 / 9)
    # All nine pairs agree: (1 - P)² = z² P(1 - P)/9 · (1 + 2(1 - P)/(2 - P) + 2P/(1 + P)) has the root 0.501.
    assert probability_of_improvement(one, one - 1) == pytest.approx((1, 0.5010, 1), abs=1e-4)
    # Against the base, fixed at 0.4, two of three are better: Wilson's interval of 2 of 3.
    wilson = stats.binomtest(2, 3).proportion_ci(method="wilson")
    fixed = probability_of_improvement(one, np.array([[0.4]]), fixed=True)
    assert fixed == pytest.approx((2 / 3, wilson.low, wilson.high), abs=1e-6)
    assert np.isnan(probability_of_improvement(one, one[:1])[1:]).all(), "one run says little about the next"
    two = probability_of_improvement(np.array([[0.3, 0.9]] * 3), np.array([[0.2, 1.0]] * 3))
    assert two.mean == 0.5, "the mean over benchmarks"
    equal = probability_of_improvement(np.full((3, 1), 0.1 + 0.2), np.full((3, 1), 0.3))
    assert equal.mean == 0.5 and 0.1 + 0.2 != 0.3, "equal but for rounding"


@pytest.mark.slow
def test_intervals_cover_as_they_say() -> None:
    """Short runs of experiments/benchmarks/coverage.py, with the numbers that reports and docs give."""
    found = {seeds: robust(seeds, 1, 0.0, 1.0, runs=400) for seeds in (3, 5, 10)}
    covered = {seeds: numbers["interquartile mean"]["coverage"] for seeds, numbers in found.items()}
    assert 0.68 < covered[3] < 0.80 and 0.85 < covered[5] < 0.94 and covered[10] > 0.91
    assert all(numbers["probability of improvement"]["coverage"] > 0.91 for numbers in found.values())


def test_the_checks_of_a_table_by_hand() -> None:
    def rows(algorithm: str, seed: int, on: str, correct: list[int]) -> list[dict[str, object]]:
        return [
            {"algorithm": algorithm, "seed": seed, "benchmark": on, "problem_id": f"p{i}"}
            | {"decoding": "greedy", "sample": 0, "correct": bool(c)}
            for i, c in enumerate(correct)
        ]

    table = [
        row
        for seed in range(3)
        for row in (
            *rows("a", seed, "x", [1, 1, 1, 1]),
            *rows("b", seed, "x", [1, 1, 0, 0]),
            *rows("a", seed, "y", [1, 0]),
            *rows("b", seed, "y", [0, 0]),
        )
    ]
    table += [*rows("base", -1, "x", [1, 0, 0, 0]), *rows("base", -1, "y", [0, 0])]
    found = {(r["algorithm"], r["benchmark"]): r for r in check_robustness(pa.Table.from_pylist(table), "b", 1)}
    assert found["b", "x"]["iqm"] == 0.5 and "better" not in found["b", "x"]
    # Two problems differ: 2 of 4 combinations are as far from 0. Two rows on x, so Holm doubles p.
    assert found["a", "x"]["p_problems"] == 1 and found["a", "x"]["p_seeds"] == 0.5 and found["a", "x"]["better"] == 1
    assert found["base", "x"]["better"] == 0 and found["base", "y"]["better"] == 0.5, "ties count half"
    # Over both, a's differences are ¼ · 2 · ½ on x and ½ · ½ on y: weights 6/(2·4) and 6/(2·2). All three agree:
    # 2 of 8 combinations, and the base's one difference of b's gives p = 1.
    assert found["a", OVERALL]["p_problems"] == 0.5 and found["a", OVERALL]["iqm"] == pytest.approx(0.75)
    with pytest.raises(UserError, match="unknown baseline"):
        check_robustness(pa.Table.from_pylist(table), "c", 1)


def test_problems_that_only_one_of_two_has_do_not_count() -> None:
    a = ResultMatrix(np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), (0, 1, 2), ("p", "q"))
    b = ResultMatrix(np.array([[0.5, 1.0], [0.5, 1.0], [0.5, 1.0]]), (0, 1, 2), ("p", "r"))
    found = flipped(a, b)
    assert found["better"] == 1 and found["p_seeds"] == 0.25 and found["p_problems"] == 1
    assert flipped(a, ResultMatrix(b.values, (3, 4, 5), b.problems)) == {}, "no seed in common"
