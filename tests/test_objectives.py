"""The contract that every registered objective keeps, and the traps that each of them must not fall into."""

from __future__ import annotations

import math
import re
import typing
from dataclasses import fields
from typing import Any, Literal, cast

import pytest
import torch
from batches import hand_batch
from canonical import CANONICAL, CANONICAL_IN_LOGITS, Case, LogitsCase
from torch import Tensor

from rlzoo.bases import PairObjective
from rlzoo.errors import UserError
from rlzoo.objective import Normaliser, Objective, get_objective, list_objectives, objective_class, reduce, surrogate
from rlzoo.testing import check_objective, random_batch
from rlzoo.testing.batches import FLAT_GROUP, gradients, prepared
from rlzoo.testing.objectives import SEEDS
from rlzoo.types import Coefficients, TokenBatch

TRAINED = ("dft-control", "dpo", "ppo")
"""Checked on the way through the trainer and the analyzer too, beside one with a term in the logits: test_training.py
and test_variance_gradients.py take every objective that way, on a smaller model."""


# The contract


def test_every_objective_has_a_canonical_loss_for_every_closed_option() -> None:
    assert set(CANONICAL) | set(CANONICAL_IN_LOGITS) == set(list_objectives())
    for name in list_objectives():
        found = objective_class(name)
        cases: list[Case | LogitsCase] = [*CANONICAL.get(name, []), *CANONICAL_IN_LOGITS.get(name, [])]
        assert (name in CANONICAL_IN_LOGITS) == (found.logit_term is not Objective.logit_term)
        hints = typing.get_type_hints(found)
        shared = PairObjective if issubclass(found, PairObjective) and name != "dpo" else Objective
        for option in set(fields(found)) - set(fields(shared)):
            if typing.get_origin(hints[option.name]) is Literal:
                covered = {case.options.get(option.name, option.default) for case in cases}
                assert covered == set(typing.get_args(hints[option.name])), f"{name}.{option.name}"


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(name, case, id=f"{name}[{case}]") for name in CANONICAL for case in CANONICAL[name]]
)
def test_the_contract(name: str, case: Case) -> None:
    first = name in TRAINED and case is CANONICAL[name][0]
    check_objective(get_objective(name, **case.options), case.loss, through_trainer=first)


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}[{case}]") for name, cases in CANONICAL_IN_LOGITS.items() for case in cases],
)
def test_the_contract_in_the_logits(name: str, case: LogitsCase) -> None:
    first = name == "asft" and case is CANONICAL_IN_LOGITS[name][0]
    check_objective(get_objective(name, **case.options), loss_in_logits=case.loss, through_trainer=first)


# The random batches really reach every branch


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {}),
        ("grpo", {"clip": 0.1}),
        ("ppo", {}),
        ("ppo", {"whiten": False, "kl_coefficient": 0.0, "gamma": 0.9, "lam": 0.5, "clip": 0.1}),
        ("ppo", {"dual_clip": 1.5}),
        ("dr-grpo", {}),
        ("dapo", {"clip_low": 0.2, "clip_high": 0.28}),
        ("dapo", {"clip_low": 0.1, "clip_high": 0.3}),
    ],
)
def test_clipping_is_active_on_both_sides(name: str, options: dict[str, Any]) -> None:
    objective = get_objective(name, **options)
    batch = prepared(objective, random_batch(objective)).detach()
    advantage, behaviour = objective.needed(batch, "advantage", "behaviour_logp")
    clip = options.get("clip", 0.2)
    least, most = 1 - options.get("clip_low", clip), 1 + options.get("clip_high", clip)
    ratio = (batch.logp - behaviour).exp()
    good, bad = batch.mask & (advantage > 0), batch.mask & (advantage < 0)
    above, below = good & (ratio > most), bad & (ratio < least)
    free = (good | bad) & ~above & ~below
    assert above.any() and below.any() and (free & good).any() and (free & bad).any()
    assert (good & (ratio < least)).any() and (bad & (ratio > most)).any()  # outside, yet not clipped
    coefficients = objective.coefficients(batch)
    clipped = above | below
    if "dual_clip" in options:
        dual = bad & (ratio > options["dual_clip"])
        assert dual.any()
        clipped = clipped | dual
    assert torch.equal(coefficients.metrics["clipped"][batch.mask].bool(), clipped[batch.mask])


@pytest.mark.parametrize(("low", "high"), [(3e-4, 4e-4), (0.05, 0.1)])
def test_clipping_of_sequences_is_active_on_both_sides(low: float, high: float) -> None:
    objective = get_objective("gspo", clip_low=low, clip_high=high)
    rows = []
    for seed in SEEDS:
        batch = prepared(objective, random_batch(objective, seed)).detach()
        advantage, behaviour = objective.needed(batch, "advantage", "behaviour_logp")
        clipped = objective.coefficients(batch).metrics["clipped"]
        for i, mask in enumerate(batch.mask):
            if mask.any() and advantage[i, 0] != 0:
                ratio = math.exp((batch.logp[i] - behaviour[i])[mask].mean())
                above, below = ratio > 1 + high, ratio < 1 - low
                good = bool(advantage[i, 0] > 0)
                assert bool(clipped[i, mask].all()) is bool(clipped[i, 0]) is (above if good else below)
                rows.append((good, above, below))
    expected = {(good, *side) for good in (True, False) for side in ((True, False), (False, True))}
    inside = {(True, False, False), (False, False, False)}
    assert set(rows) == expected | (inside if low == 0.05 else set())


def at_coefficients(name: str, seed: int = 0, **options: Any) -> tuple[TokenBatch, Coefficients, Tensor]:
    """A random batch that the objective has prepared, its coefficients, and where they count."""
    objective = get_objective(name, **options)
    batch = prepared(objective, random_batch(objective, seed)).detach()
    return batch, objective.coefficients(batch), batch.mask


def test_the_other_bounds_are_active_too() -> None:
    _, step, inside = at_coefficients("iw-sft", variant="per_step")
    assert {0.2, 1.8} < set(step.values[inside].tolist())
    _, sequence, _ = at_coefficients("iw-sft", kappa=2.0, weight_max=1.1)
    assert 0 < (sequence.values[inside] == 1.1).sum() < inside.sum()
    hinge = at_coefficients("dpo", beta=0.7, variant="hinge")[1].values[inside]
    assert (hinge == 0).any() and (hinge > 0).any() and (hinge < 0).any()
    correct = at_coefficients("rft", threshold=0.8)[1].values[inside]
    assert {0.0, 1.0} == set(correct.tolist())
    weight = at_coefficients("cispo", ratio_min=0.8, ratio_max=1.28)[1].metrics
    ratio = weight["ratio"][inside]
    assert (ratio < 0.8).any() and (ratio > 1.28).any() and 0 < weight["clipped"][inside].sum() < len(ratio)
    signs = {bool(at_coefficients("kto", seed)[0].mismatched[0] > 0) for seed in SEEDS}
    assert signs == {True, False}, "KTO's baseline is held above 0"
    dropped = inside & ~at_coefficients("dapo")[2]
    assert dropped[FLAT_GROUP].any() and dropped[-1].any()  # a group of equal rewards, and one of one row
    ready, _, _ = at_coefficients("ppo")
    value, old, returns = (t[inside] for t in get_objective("ppo").needed(ready, "value", "old_value", "returns"))
    near = value.clip(old - 0.2, old + 0.2)
    clipped = (near - returns).square() > (value - returns).square()
    assert (near == value).any() and clipped.any() and ((near != value) & ~clipped).any()


# The traps


def test_dft_weights_by_p_and_divides_by_the_number_of_tokens() -> None:
    # p = 1/2, 1/4, 1/10: loss (ln 2 / 2 + ln 4 / 4 + ln 10 / 10) / 3, gradient -p / 3. Without stop-gradient
    # the last would be -(1/10)(1 - 2.302585)/3 > 0; divided by Σ p = 0.85 it would be -p / 0.85.
    batch = hand_batch([[0.5, 0.25], [0.1]])
    objective = get_objective("dft")
    expected = torch.tensor([0.5, 0.25, 0.1], dtype=torch.float64)
    torch.testing.assert_close(objective.coefficients(batch.detach()).values[batch.mask], expected)
    loss = surrogate(objective, batch)
    assert loss.item() == pytest.approx((0.34657359 + 0.34657359 + 0.23025851) / 3, rel=1e-7)
    torch.testing.assert_close(gradients(loss, batch).view(2, 2)[batch.mask], -expected / 3)


@pytest.mark.parametrize(("variant", "first"), [("sentence", 1 / 8), ("geometric_mean", 8**-0.5)])
def test_dft_may_weight_a_completion_as_a_whole(variant: str, first: float) -> None:
    # p = 1/2, 1/4 in the first completion: their product is 1/8, its square root 0.354; 1/10 alone is itself
    batch = hand_batch([[0.5, 0.25], [0.1]])
    found = get_objective("dft", variant=variant).coefficients(batch.detach())
    expected = torch.tensor([first, first, 0.1], dtype=torch.float64)
    torch.testing.assert_close(found.values[batch.mask], expected)
    torch.testing.assert_close(found.metrics["weight"][batch.mask], expected)


@pytest.mark.parametrize("variant", ["per_sequence", "per_step", "ema"])
def test_iw_sft_is_sft_when_the_reference_is_the_policy(variant: str) -> None:
    objective = get_objective("iw-sft", variant=variant)
    batch = random_batch(objective)
    batch = batch.replace(reference_logp=batch.logp.detach())
    ours = surrogate(objective, batch)
    sft = surrogate(get_objective("sft"), batch)
    assert torch.equal(ours, sft)
    assert torch.equal(gradients(ours, batch), gradients(sft, batch))


@pytest.mark.parametrize("shift", [0.5, -0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iw_sft_neither_underflows_nor_overflows_on_long_rows(shift: float, dtype: torch.dtype) -> None:
    # The product of 4000 ratios is exp(±2000), out of range even in float64; their geometric mean exp(±1/2).
    logp = torch.full((1, 4000), -3.0, dtype=dtype)
    batch = TokenBatch(logp, torch.ones(1, 4000, dtype=torch.bool), reference_logp=logp - shift)
    weight = get_objective("iw-sft").coefficients(batch).values
    torch.testing.assert_close(weight, torch.full_like(logp, math.exp(shift)))


def test_rft_counts_the_tokens_of_wrong_samples() -> None:
    # Two tokens of a correct row, three of a wrong one: the gradient is -1/5 on the first two alone.
    batch = hand_batch([[0.5, 0.5], [0.5, 0.5, 0.5]], reward=torch.tensor([1.0, 0.0]))
    gradient = gradients(surrogate(get_objective("rft"), batch), batch)
    torch.testing.assert_close(gradient, torch.tensor([-0.2, -0.2, 0, 0, 0, 0], dtype=torch.float64))


def test_dpo_sums_over_the_completion_only() -> None:
    # π/π_ref is 2 at each of the two tokens of y⁺ and 1/2 at the one of y⁻: Δ = 2 ln 2 + ln 2 = ln 8.
    # With β = 1 the coefficient is σ(-ln 8) = 1/9 and the loss ln(1 + 1/8). Masked log-ratios are ±50.
    log2 = math.log(2)
    batch = TokenBatch(
        logp=torch.tensor([[-1.0, -1.0, 0.0], [-2.0, 0.0, 0.0]], dtype=torch.float64),
        mask=torch.tensor([[True, True, False], [True, False, False]]),
        reference_logp=torch.tensor([[-1 - log2, -1 - log2, -50], [-2 + log2, -50, 50]], dtype=torch.float64),
        partner=torch.tensor([1, 0]),
        chosen=torch.tensor([True, False]),
    )
    found = get_objective("dpo", beta=1.0).coefficients(batch)
    torch.testing.assert_close(found.values[:, 0], torch.tensor([1 / 9, -1 / 9], dtype=torch.float64))
    assert found.loss is not None
    assert found.loss.tolist() == pytest.approx([math.log(9 / 8), 0.0])


def test_grpo_groups_of_equal_rewards_carry_the_kl_and_count() -> None:
    # Rows 0 and 1 are a group of equal rewards, 2 and 3 one of 1 and 0. ρ = 1 and π_ref = 2π everywhere, so
    # the KL coefficient is β(2 - 1) = 0.04; the advantages are 0, 0 and ±½/(√½ + 1e-4).
    batch = hand_batch([[0.25, 0.25]] * 4, reward=torch.tensor([1.0, 1, 1, 0]), group=torch.tensor([7, 7, 3, 3]))
    logp = batch.logp.detach()
    batch = batch.replace(behaviour_logp=logp, reference_logp=logp + math.log(2))
    objective = get_objective("grpo")
    gradient = gradients(surrogate(objective, prepared(objective, batch)), batch).view(4, 2)
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4)
    row = torch.tensor([0.0, 0.0, advantage, -advantage], dtype=torch.float64) + 0.04
    torch.testing.assert_close(gradient, -row[:, None].expand(4, 2) / 8)  # 4 rows of 2 tokens


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_ratio_of_one_still_has_a_gradient(name: str) -> None:
    objective = get_objective(name, kl_coefficient=0.0)
    batch = random_batch(objective)
    batch = batch.replace(behaviour_logp=batch.logp.detach(), value=None)
    ready = prepared(objective, batch)
    (advantage,) = objective.needed(ready, "advantage")
    found = objective.coefficients(ready.detach())
    assert torch.equal(found.values[batch.mask], advantage[batch.mask])
    assert gradients(surrogate(objective, ready), batch).norm() > 0


def test_ppo_takes_the_returns_before_whitening() -> None:
    batch = random_batch(get_objective("ppo")).detach()
    white, raw = (prepared(get_objective("ppo", whiten=whiten), batch) for whiten in (True, False))
    assert white.returns is not None and raw.returns is not None and batch.old_value is not None
    assert white.advantage is not None and raw.advantage is not None
    torch.testing.assert_close(white.returns, raw.returns)
    torch.testing.assert_close((raw.advantage + batch.old_value)[batch.mask], white.returns[batch.mask])
    assert not torch.allclose(white.advantage, raw.advantage)
    inside = white.advantage[batch.mask]
    assert inside.mean().item() == pytest.approx(0, abs=1e-12)
    assert inside.var().item() == pytest.approx(1, rel=1e-6)


def test_normalisers_by_hand() -> None:
    # Rows of 2 and 1 tokens with terms 1, 2 and 4: 7/3 a token; (3/2 + 4)/2 a sequence; 7/1 a pair; (3 + 4)/2 a sum.
    batch = hand_batch([[0.5, 0.5], [0.5]], chosen=torch.tensor([True, False]), partner=torch.tensor([1, 0]))
    terms = torch.tensor([[1.0, 2.0], [4.0, math.nan]], dtype=torch.float64)
    expected = {
        Normaliser.PER_TOKEN: 7 / 3,
        Normaliser.PER_SEQUENCE: 2.75,
        Normaliser.SEQUENCE_SUM: 3.5,
        Normaliser.PER_PAIR: 7.0,
    }
    for normaliser in Normaliser:
        found = reduce(terms, batch, normaliser, normaliser.denominator(batch))
        assert found.item() == pytest.approx(expected[normaliser])


@pytest.mark.parametrize(("shape", "mean"), [((2, 2), 1.0), ((2,), 0.5), ((), None), ((2, 2, 3), None)])
def test_auxiliary_losses_are_per_token_or_per_row(shape: tuple[int, ...], mean: float | None) -> None:
    """Ones over four tokens in two rows. A mean would be divided once more, and further axes summed."""
    methods = {
        "coefficients": lambda self, batch: Coefficients(torch.zeros_like(batch.logp)),
        "auxiliary": lambda self, batch: {"x": torch.ones(shape, dtype=batch.dtype)},
    }
    mine = type("Mine", (Objective,), {"name": "mine", **methods})()
    batch = hand_batch([[0.5, 0.2], [0.3, 0.4]])
    if mean is not None:
        assert surrogate(mine, batch) == mean
        return
    with pytest.raises(UserError, match=re.escape(f"auxiliary(batch) gives 'x' of shape {list(shape)}: give one per")):
        surrogate(mine, batch)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (lambda batch: Coefficients(batch.logp.sum(1)), "values of shape [2]: give one per token, [B, T], here [2, 2]"),
        (lambda batch: Coefficients(batch.logp[:, :1]), "values of shape [2, 1]: give one per token, [B, T]"),
        (lambda batch: Coefficients(cast(Any, 1.0)), "takes a tensor with one value per token, not float"),
        (
            lambda batch: Coefficients(batch.logp, metrics={"x": cast(Any, 1.0)}),
            "Coefficients(metrics['x']) takes a tensor",
        ),
        (lambda batch: Coefficients(batch.logp, loss=cast(Any, 1.0)), "Coefficients(loss) takes a tensor"),
        (lambda batch: batch.logp, "returned Tensor: return rlzoo.Coefficients(values)"),
        (lambda batch: None, "returned NoneType: return rlzoo.Coefficients(values)"),
    ],
)
def test_coefficients_that_are_not_one_per_token_are_refused(given: Any, told: str) -> None:
    mine = type("Mine", (Objective,), {"name": "mine", "coefficients": lambda self, batch: given(batch)})
    batch = hand_batch([[0.5, 0.2], [0.3, 0.4]])  # as many rows as tokens: [2] would be broadcast
    with pytest.raises(UserError, match=re.escape(told)):
        surrogate(mine(), batch)
