"""DPO's variants and the other losses of pairs: numbers by hand, and how they relate to each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from batches import hand_batch, random_batch
from torch import Tensor

from rlzoo.bases import PairObjective
from rlzoo.errors import UserError
from rlzoo.objective import get_objective, surrogate, view_of
from rlzoo.testing.batches import gradients
from rlzoo.types import Selection, TokenBatch

OF_PAIRS = ("dpo", "exo", "nca", "bco", "sppo", "apo", "aot", "discopop", "simpo", "orpo")


def pair(better: float, worse: float, lengths: tuple[int, int] = (1, 1)) -> TokenBatch:
    """One pair, from the log-ratios of its completions, spread over so many tokens."""
    batch = hand_batch(
        [[0.5] * lengths[0], [0.5] * lengths[1]], partner=torch.tensor([1, 0]), chosen=torch.tensor([True, False])
    )
    ratio = torch.tensor([[better / lengths[0]], [worse / lengths[1]]], dtype=torch.float64)
    return batch.replace(reference_logp=batch.logp.detach() - ratio)


def values_of(name: str, batch: TokenBatch, **options: Any) -> list[float]:
    """The coefficient of each row's first token."""
    return [float(x) for x in get_objective(name, **options).coefficients(batch.detach()).values[:, 0]]


def gradient_of(name: str, batch: TokenBatch, **options: Any) -> Tensor:
    return gradients(surrogate(get_objective(name, **options), batch), batch)


def assert_one_gradient(
    batch: TokenBatch, ours: tuple[str, dict[str, Any]], theirs: tuple[str, dict[str, Any]]
) -> None:
    expected = gradient_of(theirs[0], batch, **theirs[1])
    assert expected.norm() > 0
    torch.testing.assert_close(gradient_of(ours[0], batch, **ours[1]), expected)


LN2, LN3 = math.log(2), math.log(3)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # β = 1, r⁺ = ln 2 and r⁻ = -ln 2, so z = ln 4: σ(z) = 4/5, σ(r⁺) = 2/3, σ(r⁻) = 1/3
        ("dpo", {}, (1 / 5, -1 / 5)),
        ("dpo", {"label_smoothing": 0.1}, (0.9 / 5 - 0.1 * 4 / 5, -0.1)),
        ("dpo", {"variant": "robust", "label_smoothing": 0.1}, ((0.9 / 5 + 0.1 * 4 / 5) / 0.8, -0.325)),
        ("dpo", {"divergence": "js"}, (1 / 3 * 1 / 3, -1 / 3 * 2 / 3)),  # scores log 2σ: ln 4/3 and ln 2/3, z = ln 2
        ("dpo", {"divergence": "forward_kl"}, (0.5 / (1 + math.exp(1.5)), -2 / (1 + math.exp(1.5)))),  # 1/2 and -1
        ("dpo", {"sft_coefficient": 0.3}, (1 / 5 + 0.3, -1 / 5)),
        ("exo", {"label_smoothing": 0.2}, (0.0, 0.0)),  # the policy agrees with the label: q = 4/5
        ("exo", {"label_smoothing": 0.1}, (4 / 25 * math.log(9 / 4), -4 / 25 * math.log(9 / 4))),
        ("nca", {}, (0.0, -1 / 6)),  # r⁺ has reached ln 2
        ("bco", {"shift": "none"}, (1 / 3, -1 / 3)),
        ("bco", {}, (1 / 3, -1 / 3)),  # the mean reward is 0
        ("sppo", {}, (2 * (0.5 - LN2), -2 * (0.5 - LN2))),
        ("apo", {}, (2 / 9, -2 / 9)),
        ("apo", {"variant": "down"}, (4 / 25 - 2 / 9, -4 / 25)),
        ("aot", {}, (1 / 5, -1 / 5)),
        ("aot", {"variant": "unpaired"}, (1 / 5, -1 / 5)),
    ],
)
def test_by_hand(name: str, options: dict[str, Any], expected: tuple[float, float]) -> None:
    assert values_of(name, pair(LN2, -LN2), beta=1.0, **options) == pytest.approx(list(expected), abs=1e-12)


def test_discopop_by_hand() -> None:
    # z = 0: m = ½, so ½ · ½ + ½ + ¼ (ln 2 - 1)/τ, negative for a small τ: it pulls a pair of equal scores apart
    assert values_of("discopop", pair(0.0, 0.0), beta=2.0, tau=1.0)[0] == pytest.approx(2 * (0.5 + LN2 / 4))
    assert values_of("discopop", pair(0.0, 0.0))[0] < 0 < values_of("discopop", pair(20.0, 0.0))[0]


@pytest.mark.parametrize("seed", range(3))
def test_relations(seed: int) -> None:
    batch = random_batch(seed)
    dpo = ("dpo", {"beta": 0.7})
    for options in (
        {"variant": "robust"},
        {"divergence": "alpha", "divergence_alpha": 1.0},
        {"pairing": "best_worst", "pairs_per_prompt": 1},  # options of the view
    ):
        assert_one_gradient(batch, ("dpo", {"beta": 0.7, **options}), dpo)
    forward = {"beta": 0.7, "divergence": "forward_kl"}
    assert_one_gradient(batch, ("dpo", {**forward, "divergence": "alpha", "divergence_alpha": 0.0}), ("dpo", forward))
    supervised = gradient_of("dpo", batch, sft_coefficient=0.6) - gradient_of("dpo", batch)
    torch.testing.assert_close(supervised, 0.6 * gradient_of("orpo", batch, lam=0.0))


def test_robust_dpo_is_unbiased_under_wrong_labels() -> None:
    # In expectation over pairs that are flipped with probability ε, it is DPO on the right order.
    batch, options = random_batch(0), {"variant": "robust", "label_smoothing": 0.2}
    assert batch.chosen is not None
    flipped = batch.replace(chosen=~batch.chosen)
    expected = 0.8 * gradient_of("dpo", batch, **options) + 0.2 * gradient_of("dpo", flipped, **options)
    torch.testing.assert_close(expected, gradient_of("dpo", batch))
    assert not torch.allclose(gradient_of("dpo", batch, **options), expected)


def test_sigmoid_norm_is_dpo_with_beta_over_the_length() -> None:
    batch = pair(1.0, -2.0, (4, 4))
    assert_one_gradient(batch, ("dpo", {"beta": 2.0, "variant": "sigmoid_norm"}), ("dpo", {"beta": 0.5}))


def test_the_shift_of_bco_makes_it_blind_to_a_constant() -> None:
    batch = pair(1.0, -2.0)
    moved = batch.replace(reference_logp=batch.reference_logp - 3.0)
    assert values_of("bco", moved) == pytest.approx(values_of("bco", batch))
    assert values_of("bco", moved, shift="none") != pytest.approx(values_of("bco", batch, shift="none"))


@pytest.mark.parametrize("name", ["nca", "sppo"])
def test_some_losses_do_not_couple_the_halves_of_a_pair(name: str) -> None:
    one, other = values_of(name, pair(1.0, -2.0)), values_of(name, pair(1.0, 5.0))
    assert one[0] == other[0] and one[1] != other[1]
    assert values_of("dpo", pair(1.0, -2.0))[0] != values_of("dpo", pair(1.0, 5.0))[0]


def test_aot_compares_values_of_one_rank() -> None:
    # r⁺ = 3, 1 and r⁻ = 0, 2: pairs have margins 3 and -1; sorted values have 1 - 0 and 3 - 2
    batch = hand_batch([[0.5]] * 4, partner=torch.tensor([1, 0, 3, 2]), chosen=torch.tensor([True, False, True, False]))
    ratio = torch.tensor([[3.0], [0.0], [1.0], [2.0]], dtype=torch.float64)
    batch = batch.replace(reference_logp=batch.logp.detach() - ratio)
    pull = 1 / (1 + math.e)
    assert values_of("aot", batch, beta=1.0, variant="unpaired") == pytest.approx([pull, -pull, pull, -pull])
    # paired: all log π(y⁺) - log π(y⁻) are 0, those of the reference, sorted, -3 and 1; equal values keep their order
    low, high = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-1))
    assert values_of("aot", batch, beta=1.0) == pytest.approx([low, -low, high, -high])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OF_PAIRS)
def test_coefficients_are_finite_far_from_the_reference(name: str, dtype: torch.dtype) -> None:
    divergences = [{"divergence": d} for d in ("forward_kl", "js", "alpha")] if name == "dpo" else []
    for options in ({}, *divergences):
        for better, worse in ((1e3, -1e3), (-1e3, 1e3), (-1e3, -1e3), (1e3, 1e3)):
            given = pair(better, worse).detach()
            batch = given.replace(logp=given.logp.to(dtype), reference_logp=given.reference_logp.to(dtype))
            found = get_objective(name, **options).coefficients(batch)
            assert found.loss is not None and found.values.dtype == dtype
            assert torch.isfinite(found.values).all() and torch.isfinite(found.loss).all(), (better, worse, options)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_all_of_them_take_their_pairs_by_the_same_options(name: str) -> None:
    objective = get_objective(name, pairing="best_worst", pairs_per_prompt=2)
    assert isinstance(objective, PairObjective)
    assert view_of(objective) == (Selection.PAIRS, {"pairing": "best_worst", "per_prompt": 2})


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("dpo", {"beta": 0.0}, "dpo needs beta above 0, got 0"),
        ("dpo", {"label_smoothing": 0.5}, "needs label_smoothing of at least 0 and below 0.5, the share of pairs with"),
        ("dpo", {"variant": "ipo", "label_smoothing": 0.1}, "the variant ipo has no label_smoothing: leave it out"),
        ("exo", {"label_smoothing": 0.0}, "exo needs label_smoothing above 0"),
        ("aot", {"label_smoothing": -0.1}, "objective 'aot' needs label_smoothing of at least 0"),
        ("sppo", {"beta": -1.0}, "sppo needs beta above 0"),
        *((name, {"beta": 0.0}, f"{name} needs beta above 0") for name in ("apo", "aot", "nca", "simpo", "kto")),
        ("discopop", {"tau": 0.0}, "discopop needs tau above 0"),
        ("apo", {"variant": "up"}, "option 'variant' = 'up'"),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as found:
        get_objective(name, **options)
    assert "\n" not in str(found.value)
