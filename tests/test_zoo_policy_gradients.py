"""The policy gradients of 2025 and 2026, and GRPO's options: what each is equal to, and numbers derived by hand."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import SEEDS, assert_same, hand_batch, random_batch
from canonical import clipped_gain, completions, groups_of, token_count
from test_zoo_rl import double, on_policy, values

from rlzoo.advantages import batch_normalised, group_normalised, optimal_value, quantile
from rlzoo.bases.ratios import kl_estimate
from rlzoo.errors import UserError
from rlzoo.objective import get_objective, surrogate
from rlzoo.testing import check_objective
from rlzoo.testing.batches import LENGTH, gradients, prepared
from rlzoo.types import TokenBatch

over_seeds = pytest.mark.parametrize("seed", SEEDS)


def gradient(name: str, batch: TokenBatch, **options: Any) -> torch.Tensor:
    objective = get_objective(name, **options)
    return gradients(surrogate(objective, prepared(objective, batch)), batch)


def varied(seed: int) -> TokenBatch:
    """A random batch in which every group has unequal rewards."""
    batch = random_batch(seed).rows(torch.arange(13), LENGTH)
    return replace(batch, reward=torch.randperm(13, generator=torch.manual_seed(seed)).double())


# An objective of one's own


def test_the_documented_objective_keeps_the_contract() -> None:
    page = (Path(__file__).parents[1] / "docs" / "interface.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.+?)```", page, re.DOTALL) if "MedianGRPO" in block)
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(code.replace("@register\n", ""), namespace)  # without its name in the registry

    def loss(batch: TokenBatch) -> torch.Tensor:
        assert batch.reward is not None
        rewards, total = batch.reward.tolist(), torch.zeros(())
        for rows in groups_of(batch):
            middle = sorted(rewards[i] for i in rows)[(len(rows) - 1) // 2]
            for i in rows:
                logp, behaviour = (completions(batch, x)[i] for x in (batch.logp, batch.behaviour_logp))
                advantage = torch.full_like(logp, rewards[i] - middle)
                total = total - clipped_gain(logp, behaviour, advantage, 0.2).sum()
        return total / token_count(batch)

    check_objective(namespace["MedianGRPO"](), loss, through_trainer=False)


# GRPO's options

SAME_AS_GRPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dr-grpo": ({"max_length": 7}, {"scale_rewards": "none", "aggregation": "constant", "max_length": 7}),
    "dapo": ({}, {"clip_high": 0.28, "aggregation": "token"}),
    "gspo": ({}, {"level": "sequence", "clip": 3e-4, "clip_high": 4e-4}),
}


@over_seeds
@pytest.mark.parametrize("name", SAME_AS_GRPO)
def test_an_objective_that_differs_from_grpo_in_options_is_grpo_with_them(name: str, seed: int) -> None:
    own, options = SAME_AS_GRPO[name]
    batch = varied(seed)
    assert_same(gradient("grpo", batch, kl_coefficient=0.0, **options), gradient(name, batch, **own), 1e-14)


def test_grpo_counts_the_tokens_of_flat_groups_where_dapo_does_not() -> None:
    # groups of 3 and 2 tokens; the first is flat: Z is 5 for GRPO's mean over tokens, as for TRL's, and 2 for DAPO's
    batch = hand_batch([[0.5], [0.5, 0.5], [0.5], [0.5]], reward=double([1, 1, 1, 0]), group=torch.tensor([0, 0, 1, 1]))
    batch = on_policy(batch)
    ours = gradient("grpo", batch, kl_coefficient=0.0, aggregation="token")
    torch.testing.assert_close(ours * 5, gradient("dapo", batch) * 2)


def test_scaling_by_the_batch_by_hand() -> None:
    # rewards 0, 2 and 1, 1: their std is √(2/3), the groups' √2 and 0
    reward, group = double([0, 2, 1, 1]), torch.tensor([0, 0, 1, 1])
    scale = 1 / (math.sqrt(2 / 3) + 1e-4)
    torch.testing.assert_close(batch_normalised(reward, group), double([-scale, scale, 0, 0]))
    torch.testing.assert_close(group_normalised(reward, group)[:2], double([-1, 1]) / (math.sqrt(2) + 1e-4))
    assert torch.equal(batch_normalised(torch.full((4,), 0.1), group), torch.zeros(4))


@pytest.mark.parametrize(("which", "corrected"), [("k1", True), ("k3", True), ("k2", False), ("k1", False)])
def test_kl_estimates_whose_gradient_is_that_of_the_kl(which: Any, corrected: bool) -> None:
    # Over three tokens: ρk1 and ρk3 on samples of μ, and k2 on samples of π, have the gradient of KL(π ‖ π_ref) in the
    # mean, and k1 on samples of π has none.
    logits = double([0.3, -0.2, 0.5]).requires_grad_()
    logp, reference = logits.log_softmax(0), double([-0.1, 0.4, 0.2]).log_softmax(0)
    kl = (logp.exp() * (logp - reference)).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    sampler = double([0.6, 0.3, 0.1]) if corrected else logp.detach().exp()
    ratio = (logp.detach().exp() / sampler)[None] if corrected else None
    mask = torch.ones(1, 3, dtype=torch.bool)
    estimate, pull = kl_estimate(which, logp.detach()[None], reference[None], mask, ratio)
    (found,) = torch.autograd.grad(-(sampler * pull[0] * logp).sum(), logits)
    torch.testing.assert_close(found, expected if corrected or which == "k2" else torch.zeros_like(expected))
    if which != "k2":  # its mean is that of the KL to second order only
        torch.testing.assert_close((sampler * estimate[0]).sum(), kl.detach())


# REINFORCE++


@over_seeds
@pytest.mark.parametrize("kl_coefficient", [0.0, 0.3])
def test_reinforce_pp_is_ppo_with_a_critic_of_zero(seed: int, kl_coefficient: float) -> None:
    batch = random_batch(seed)
    batch = batch.replace(old_value=torch.zeros_like(batch.old_value))
    options = {"kl_coefficient": kl_coefficient, "gamma": 0.9}
    ppo = values(get_objective("ppo", lam=1.0, **options), batch)
    assert_same(values(get_objective("reinforce-pp", **options), batch), ppo, 1e-14)


def test_reinforce_pp_with_a_baseline_does_not_see_an_offset_of_a_group() -> None:
    batch = random_batch(0)
    assert batch.reward is not None and batch.group is not None
    shifted = replace(batch, reward=batch.reward + batch.group)
    for baseline, is_same in (("group", True), ("none", False)):
        objective = get_objective("reinforce-pp", baseline=baseline)
        assert torch.allclose(values(objective, shifted), values(objective, batch)) is is_same


# DPPO


@over_seeds
@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_dppo_without_a_trust_region_is_cispo(divergence: str, seed: int) -> None:
    batch = random_batch(seed)
    delta = 1.0 if divergence == "tv" else math.inf  # no probability changes by more than 1
    free = get_objective("dppo", divergence=divergence, delta_low=delta, delta_high=delta)
    assert torch.equal(values(free, batch), values(get_objective("cispo", ratio_max=20.0), batch))
    assert not torch.equal(values(get_objective("dppo", divergence=divergence), batch), values(free, batch))


def test_dppo_clips_by_probabilities_and_ppo_by_ratios() -> None:
    # 0.1 → 0.2 has ρ = 2 and a change of 0.1; 0.5 → 0.8 has ρ = 1.6 and one of 0.3; 0.9 → 0.99 has 1.1 and 0.09
    batch = hand_batch([[0.2, 0.8, 0.99], [0.5] * 3], reward=double([1, 0]), group=torch.tensor([0, 0]))
    batch = batch.replace(behaviour_logp=double([[0.1, 0.5, 0.9], [0.5] * 3]).log())
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    torch.testing.assert_close(values(get_objective("dppo"), batch)[0], double([2 * a, 0, 1.1 * a]))
    grpo = values(get_objective("grpo", kl_coefficient=0.0), batch)[0]
    torch.testing.assert_close(grpo, double([0, 0, 1.1 * a]))
    tight = get_objective("dppo", divergence="kl", delta_high=0.05)  # 0.037, 0.22 and 0.14
    torch.testing.assert_close(values(tight, batch)[0], double([2 * a, 0, 0]))


# MaxRL


def test_maxrl_estimates_the_first_terms_of_maximum_likelihood() -> None:
    # A policy that is right with probability p = σ(θ): the mean over all outcomes of three samples of the gradient is
    # that of pass@1 + pass@2/2, where pass@k = 1 - (1-p)^k. With A = -1 where all are wrong it would have pass@3/3 too.
    theta = double(-0.7).requires_grad_()
    p = theta.sigmoid()
    (expected,) = torch.autograd.grad(p + (1 - (1 - p) ** 2) / 2, theta, retain_graph=True)
    objective, total = get_objective("maxrl"), double(0.0)
    for outcome in product([0.0, 1.0], repeat=3):
        logp = torch.stack([p.log() if right else (1 - p).log() for right in outcome])[:, None]
        batch = TokenBatch(
            logp,
            torch.ones(3, 1, dtype=torch.bool),
            reward=double(outcome),
            group=torch.zeros(3, dtype=torch.long),
            behaviour_logp=logp.detach(),
        )
        (found,) = torch.autograd.grad(surrogate(objective, batch), theta, retain_graph=True)
        total = total - logp.detach().sum().exp() * found
    torch.testing.assert_close(total, expected)


def test_maxrl_of_groups_without_a_positive_mean_is_zero() -> None:
    batch = on_policy(hand_batch([[0.5]] * 5, reward=double([0, 0, -1, 0.5, 2]), group=torch.tensor([0, 0, 1, 1, 2])))
    assert not values(get_objective("maxrl"), batch).any()


# SAPO and VESPO


@over_seeds
@pytest.mark.parametrize("name", ["sapo", "vespo"])
def test_a_smooth_weight_is_one_where_the_ratio_is_one(name: str, seed: int) -> None:
    batch = on_policy(random_batch(seed))
    grpo = values(get_objective("grpo", kl_coefficient=0.0), batch)
    assert_same(values(get_objective(name), batch), grpo, 1e-14)


@over_seeds
def test_sapo_is_grpo_to_second_order_around_a_ratio_of_one(seed: int) -> None:
    batch = random_batch(seed)
    near = batch.replace(behaviour_logp=batch.logp.detach() - 1e-3 * batch.logp.detach().sign())
    assert_same(gradient("sapo", near), gradient("grpo", near, kl_coefficient=0.0), 1e-6)


def test_sapo_by_hand() -> None:
    # τ = 1, ρ = 2: 4 σ(1)(1 - σ(1)) = 0.786448, so c = 1.572895 A; τ = 2, ρ = ½ with A < 0: the same gate
    batch = hand_batch([[0.6], [0.2]], reward=double([1, 0]), group=torch.tensor([0, 0]))
    batch = batch.replace(behaviour_logp=double([[0.3], [0.4]]).log())
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    found = values(get_objective("sapo", tau_negative=2.0), batch)
    torch.testing.assert_close(found, double([[1.572895 * a], [-0.393224 * a]]), rtol=1e-6, atol=0)


def test_vespo_by_hand() -> None:
    # w = 2 · ¼ = ½: for A > 0 ½² e^{1.5}, for A < 0 ½³ e^{1}
    batch = hand_batch([[0.4, 0.2]] * 2, reward=double([1, 0]), group=torch.tensor([0, 0]))
    batch = batch.replace(behaviour_logp=double([[0.2, 0.8]] * 2).log())
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = double([[math.exp(1.5) / 4 * a] * 2, [-math.e / 8 * a] * 2])
    torch.testing.assert_close(values(get_objective("vespo"), batch), expected)


# TOPR


@over_seeds
def test_topr_is_reinforce_where_the_policy_has_sampled(seed: int) -> None:
    batch = on_policy(random_batch(seed))
    assert batch.reward is not None
    moved = replace(batch, reward=batch.reward - 0.5)
    assert_same(gradient("topr", batch), gradient("reinforce", moved, baseline="none"), 1e-14)


@over_seeds
def test_topr_on_good_samples_alone_is_rft_but_for_a_constant(seed: int) -> None:
    batch = random_batch(seed)
    assert batch.reward is not None
    batch = replace(batch, reward=(batch.reward > 0.5).double())
    tokens_per_row = int(batch.mask.sum()) / len(batch.mask)
    assert_same(gradient("topr", batch, baseline=0.0), gradient("rft", batch) * tokens_per_row, 1e-14)


def test_topr_tapers_bad_samples_alone() -> None:
    # the completions' ratios are 2 · ¼ = ½ and 2 · 2 = 4
    batch = hand_batch([[0.4, 0.2], [0.4, 0.4]] * 2, reward=double([1, 1, 0, 0]), group=torch.tensor([0] * 4))
    batch = batch.replace(behaviour_logp=double([[0.2, 0.8], [0.2, 0.2]] * 2).log())
    expected = double([[0.5] * 2, [0.5] * 2, [-0.25] * 2, [-0.5] * 2])
    torch.testing.assert_close(values(get_objective("topr"), batch), expected)


# DRO, OAPL, A*-PO and QRPO


@over_seeds
def test_dro_without_a_penalty_is_rloo_but_for_a_constant(seed: int) -> None:
    batch = random_batch(seed)
    assert batch.group is not None
    size = torch.bincount(batch.group)[batch.group][:, None]
    ours, rloo = values(get_objective("dro", beta=0.0), batch), values(get_objective("rloo"), batch)
    assert_same(ours, rloo * (size - 1) / size, 1e-14)


@over_seeds
def test_dro_of_sequences_is_oapl_with_the_mean_as_the_value(seed: int) -> None:
    batch = random_batch(seed)
    oapl = gradient("oapl", batch, beta=0.3, value_beta=1e8)  # V* tends to the mean
    assert_same(oapl, 2 * 0.3 * gradient("dro", batch, beta=0.3, level="sequence"), 1e-6)


@over_seeds
def test_oapl_is_a_star_po_with_the_sampler_as_the_reference(seed: int) -> None:
    batch = random_batch(seed)
    options = {"beta": 0.3, "value_beta": 0.2}
    other = batch.replace(reference_logp=batch.behaviour_logp)
    assert torch.equal(gradient("oapl", batch, **options), gradient("a-star-po", other, **options))


def test_the_optimal_value_normalises_the_optimal_policy() -> None:
    # with every completion of μ in the group as often as μ draws it, μ exp((r - V*)/β) is a distribution
    reward, group = double([0.0, 0.0, 0.3, 1.0]), torch.zeros(4, dtype=torch.long)
    for beta in (0.01, 0.5, 100.0):
        value = optimal_value(reward, group, beta)
        torch.testing.assert_close(((reward - value) / beta).exp().mean(), double(1.0))
        assert reward.mean() <= value[0] <= reward.max()
    flat = torch.full((3,), 0.1)
    assert torch.equal(optimal_value(flat, torch.zeros(3, dtype=torch.long), 1e-3), flat)


@over_seeds
@pytest.mark.parametrize("name", ["a-star-po", "oapl", "qrpo"])
def test_a_regression_has_no_gradient_at_its_optimum(name: str, seed: int) -> None:
    batch = random_batch(seed, padding=(0.0,))
    objective = get_objective(name, beta=0.5)
    ready = prepared(objective, batch)
    assert ready.advantage is not None
    length = ready.mask.sum(1, keepdim=True).clamp(min=1)
    optimum = batch.logp.detach() - ready.advantage / 0.5 / length  # so that β Σ log(π/π_0) is the target
    key = "behaviour_logp" if name == "oapl" else "reference_logp"
    assert gradient(name, batch, beta=0.5).norm() > 0.1
    assert gradient(name, batch.replace(**{key: optimum}), beta=0.5).norm() < 1e-12


def test_a_star_po_takes_values_from_a_column() -> None:
    batch = hand_batch([[0.5, 0.25], [0.5]], reward=double([1, 0]), group=torch.tensor([0, 0]))
    batch = batch.replace(reference_logp=batch.logp.detach() - 1, solved=double([0.25, 0.5]))
    objective = get_objective("a-star-po", beta=0.1, value_column="solved")
    # 2β (r - V - β Σ log π/π_ref) = 0.2 (0.75 - 0.2) and 0.2 (-0.5 - 0.1)
    torch.testing.assert_close(values(objective, batch), double([[0.11, 0.11], [-0.12, 0]]))
    with pytest.raises(UserError, match="one number per row in the column 'solved'"):
        values(objective, batch.replace(solved=double([[0.25] * 2] * 2)))


@over_seeds
def test_qrpo_sees_the_order_of_rewards_alone(seed: int) -> None:
    batch = random_batch(seed)
    assert batch.reward is not None
    moved = replace(batch, reward=(3 * batch.reward).exp() - 7)
    assert torch.equal(gradient("qrpo", moved), gradient("qrpo", batch))


def test_qrpo_imitates_the_samples_of_a_prompt_that_none_solves() -> None:
    # All have q = 1, as the right one of the other group has, where half of the others are as wrong as the wrong ones.
    batch = hand_batch([[0.5]] * 5, reward=double([0, 0, 1, 0, 0]), group=torch.tensor([0, 0, 1, 1, 1]))
    batch = batch.replace(reference_logp=batch.logp.detach())
    found = values(get_objective("qrpo", beta=0.5), batch)[:, 0]  # with 2β = 1 the coefficient is the target
    torch.testing.assert_close(found, double([1, 1, 1, 0.5, 0.5]) - 0.5 * math.log(0.5 * (math.e**2 - 1)))
    assert (found[:3] > 0).all() and (found[3:] < 0).all()


def test_quantiles_by_hand() -> None:
    reward, group = double([0.2, 0.5, 0.5, 0.9, 3.0]), torch.tensor([7, 7, 7, 7, 1])
    torch.testing.assert_close(quantile(reward, group), double([0, 2 / 3, 2 / 3, 1, 0]))


def test_qrpo_leaves_a_group_of_one_out() -> None:
    batch = hand_batch([[0.5], [0.5], [0.5]], reward=double([1, 0, 1]), group=torch.tensor([0, 0, 5]))
    found = values(get_objective("qrpo"), batch.replace(reference_logp=batch.logp.detach()))
    assert found[2] == 0 and found[0] > found[1]


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("qrpo", {"beta": 0.0}, "qrpo needs beta above 0, got 0"),
        ("oapl", {"value_beta": -1.0}, "oapl needs value_beta above 0, got -1"),
        ("a-star-po", {"beta": 0.0}, "a-star-po needs beta above 0"),
        ("sapo", {"tau_negative": 0.0}, "sapo needs tau_negative above 0"),
        ("grpo", {"max_length": 0}, "grpo needs max_length above 0"),
        ("grpo", {"clip_high": 0.5, "delta": 1.4}, "grpo needs delta above 1 . 0.5"),
        ("maxrl", {"delta": 1.1}, "maxrl needs delta above 1 . 0.2"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        get_objective(name, **options)
