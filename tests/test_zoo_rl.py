"""The objectives that learn from groups: how they relate to each other, numbers derived by hand, and whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from batches import SEEDS, assert_same, hand_batch, random_batch
from buffer_rows import sample, samples
from canonical import grpo as grpo_canonical
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import RAW, Fixed, distance, make_batch, trained
from torch import Tensor

from rlzoo.advantages import group_centred, group_varies, optimal_token_baseline
from rlzoo.bases.ratios import clipped_gradient, sequence_ratio, token_ratio
from rlzoo.buffers import Buffer, OfflineBuffer
from rlzoo.buffers.problems import Problem, encode_problems
from rlzoo.config import Sampling, Training
from rlzoo.errors import UserError
from rlzoo.objective import Objective, get_objective, surrogate
from rlzoo.policy import Policy
from rlzoo.reward import Reward
from rlzoo.rollout import TransformersSampler, collect_rollouts
from rlzoo.testing.batches import LENGTH, gradients, prepared
from rlzoo.training import Trainer, train
from rlzoo.training.batches import FreshSource
from rlzoo.types import Selection, TokenBatch, Trajectory

MakePolicy = Callable[..., Policy]
NAMES = ("reinforce", "rloo", "dr-grpo", "dapo", "gspo", "cispo", "otb")
NEW = ("reinforce-pp", "dppo", "maxrl", "sapo", "topr", "dro", "vespo", "a-star-po", "oapl", "qrpo")
over_seeds = pytest.mark.parametrize("seed", SEEDS)


def values(objective: Objective, batch: TokenBatch) -> Tensor:
    """The coefficients of a batch, 0 at masked positions."""
    ready = prepared(objective, batch)
    return torch.where(ready.mask, objective.coefficients(ready.detach()).values, 0)


def on_policy(batch: TokenBatch) -> TokenBatch:
    """The batch as if the policy in training had sampled it: ρ = 1."""
    return batch.replace(behaviour_logp=batch.logp.detach())


def double(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Relations


@over_seeds
def test_grpo_without_ratio_kl_and_deviation_is_rloo_but_for_a_constant(seed: int) -> None:
    # A = r - mean_G is (G-1)/G times the leave-one-out advantage, and 1/L is a constant. A group of one has 0 in both.
    batch = on_policy(random_batch(seed))
    assert batch.group is not None
    size = torch.bincount(batch.group)[batch.group][:, None]
    ours, rloo = values(get_objective("dr-grpo", max_length=10), batch), values(get_objective("rloo"), batch)
    torch.testing.assert_close(ours, rloo * (size - 1) / size / 10)
    assert rloo.norm() > 0


@over_seeds
@pytest.mark.parametrize("clip", [0.2, 0.1])
def test_dapo_with_one_bound_has_the_coefficients_of_grpo(seed: int, clip: float) -> None:
    # where no group is uniform: without the group of one, and with no two rewards the same
    batch = random_batch(seed).rows(torch.arange(13), LENGTH)
    reward = torch.randperm(13, generator=torch.manual_seed(seed)).double()
    batch = replace(batch, reward=reward)
    dapo, grpo = (
        get_objective("dapo", clip_low=clip, clip_high=clip),
        get_objective("grpo", clip=clip, kl_coefficient=0),
    )
    assert torch.equal(prepared(dapo, batch).mask, batch.mask)
    assert torch.equal(values(dapo, batch), values(grpo, batch))


@over_seeds
def test_dapo_clips_later_above_than_grpo_and_alike_below(seed: int) -> None:
    batch = random_batch(seed)
    dapo, grpo = get_objective("dapo", clip_high=0.28), get_objective("grpo", kl_coefficient=0.0)
    ours, theirs = values(dapo, batch), values(grpo, batch)
    assert batch.behaviour_logp is not None
    ratio, live = (batch.logp - batch.behaviour_logp).exp(), batch.mask & (theirs + ours != 0)
    between = live & (ratio > 1.2) & (ratio <= 1.28) & (ours > 0)
    assert (theirs[between] == 0).all() and torch.equal(ours[live & ~between], theirs[live & ~between])


def test_dapo_reaches_between_the_bounds() -> None:
    # ρ = 1.25 on a good token: clipped by GRPO at 1.2, not by DAPO at 1.28; ρ = 1.3 by both
    batch = hand_batch([[0.5, 0.52], [0.5, 0.5]], reward=double([1, 0]), group=torch.tensor([0, 0]))
    batch = batch.replace(behaviour_logp=double([[0.4, 0.4], [0.5, 0.5]]).log())
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = double([[1.25 * advantage, 0], [-advantage, -advantage]])
    torch.testing.assert_close(values(get_objective("dapo"), batch), expected)
    expected[0, 0] = 0
    torch.testing.assert_close(values(get_objective("grpo", kl_coefficient=0.0), batch), expected)


@over_seeds
def test_gspo_and_grpo_have_one_gradient_where_the_ratio_is_one(seed: int) -> None:
    batch = on_policy(random_batch(seed))
    gspo, grpo = get_objective("gspo"), get_objective("grpo", kl_coefficient=0.0)
    assert_same(gradients(surrogate(gspo, batch), batch), gradients(surrogate(grpo, batch), batch), 1e-14)


@over_seeds
def test_gspo_has_one_coefficient_a_sequence(seed: int) -> None:
    batch = random_batch(seed)
    found = values(get_objective("gspo", clip_low=0.5, clip_high=0.5), batch)
    different = values(get_objective("grpo", kl_coefficient=0.0), batch)
    for row, mask in zip(found, batch.mask, strict=True):
        assert len(set(row[mask].tolist())) <= 1
    assert any(len(set(row[mask].tolist())) > 2 for row, mask in zip(different, batch.mask, strict=True))


@over_seeds
def test_cispo_is_the_policy_gradient_where_no_ratio_is_clipped(seed: int) -> None:
    batch = random_batch(seed)
    assert batch.behaviour_logp is not None
    ratio = (batch.logp - batch.behaviour_logp).detach().exp()
    advantage = prepared(get_objective("cispo"), batch).advantage
    assert advantage is not None
    free = values(get_objective("cispo", ratio_max=math.inf), batch)
    assert torch.equal(free[batch.mask], (ratio * advantage)[batch.mask])
    bounded = values(get_objective("cispo", ratio_min=0.8, ratio_max=1.2), batch)
    inside = batch.mask & (ratio >= 0.8) & (ratio <= 1.2)
    assert torch.equal(bounded[inside], free[inside]) and not torch.equal(bounded, free)


@over_seeds
def test_cispo_keeps_the_gradient_of_tokens_that_grpo_clips(seed: int) -> None:
    batch = random_batch(seed)
    grpo = get_objective("grpo", kl_coefficient=0.0)
    ready = prepared(grpo, batch).detach()
    assert ready.advantage is not None
    clipped = ready.mask & grpo.coefficients(ready).metrics["clipped"].bool()
    cispo = values(get_objective("cispo", ratio_min=0.8, ratio_max=1.2), batch)
    bound = torch.where(ready.advantage > 0, 1.2, 0.8)
    torch.testing.assert_close(cispo[clipped], (bound * ready.advantage)[clipped])
    assert clipped.any() and (cispo[clipped] != 0).all()


@over_seeds
def test_otb_with_equal_weights_has_the_mean_of_the_group_as_its_baseline(seed: int) -> None:
    batch = random_batch(seed, padding=(0.0,))
    every = torch.ones_like(batch.mask)
    same = torch.linspace(0.1, 0.9, LENGTH, dtype=torch.float64).expand(every.shape)
    statistics = {"square_mass": same.square() + 0.1 * (1 - same)}
    batch = batch.replace(mask=every, snapshot_logp=same.log(), statistics=statistics)
    assert batch.behaviour_logp is not None and batch.reward is not None and batch.group is not None
    ratio = (batch.logp - batch.behaviour_logp).detach().exp()
    expected = ratio * group_centred(batch.reward, batch.group)[:, None]
    torch.testing.assert_close(values(get_objective("otb"), batch), expected)


@over_seeds
def test_the_optimal_baseline_leaves_no_weighted_advantage(seed: int) -> None:
    # B minimises Σ_i W_i (G_i - B)² over the rows that run at t, so Σ_i W_i (G_i - B) = 0
    batch = random_batch(seed, padding=(0.0,))
    objective = get_objective("otb")
    advantage = prepared(objective, batch).advantage
    assert advantage is not None and batch.snapshot_logp is not None and batch.group is not None
    score_norm = 1 - 2 * batch.snapshot_logp.exp() + batch.inputs["square_mass"]
    weight = torch.where(batch.mask, score_norm, 0).cumsum(1) * batch.mask
    for group in set(batch.group.tolist()):
        rows = batch.group == group
        torch.testing.assert_close((weight * advantage)[rows].sum(0), torch.zeros(LENGTH, dtype=torch.float64))
    assert (weight * advantage).norm() > 0


@pytest.mark.parametrize("name", NAMES)
def test_where_the_ratio_is_one_a_good_sample_is_raised_and_a_bad_one_lowered(name: str) -> None:
    batch = hand_batch([[0.5, 0.25], [0.5, 0.25]], reward=double([1, 0]), group=torch.tensor([0, 0]))
    batch = on_policy(batch).replace(
        snapshot_logp=batch.logp.detach(), statistics={"square_mass": double([[0.5, 0.3]] * 2)}
    )
    found = values(get_objective(name), batch)
    assert (found[0] > 0).all()
    torch.testing.assert_close(found[1], -found[0])


# By hand


def test_reinforce_by_hand() -> None:
    # r = 3, 1, 2 of two, one and three tokens; mean 2. Gradient -(r - b)/3 at each token.
    batch = hand_batch([[0.5, 0.5], [0.5], [0.5, 0.5, 0.5]], reward=double([3, 1, 2]))
    for baseline, row in (("mean", [1, -1, 0]), ("none", [3, 1, 2])):
        gradient = gradients(surrogate(get_objective("reinforce", baseline=baseline), batch), batch)
        expected = torch.where(batch.mask, -double(row)[:, None] / 3, 0)
        torch.testing.assert_close(gradient.view(3, 3), expected)


def test_rloo_by_hand() -> None:
    # r = 3, 1, 2 in one group: the others' means are 1.5, 2.5 and 2; then a group of one
    batch = hand_batch([[0.5, 0.5], [0.5], [0.5], [0.5]], reward=double([3, 1, 2, 7]), group=torch.tensor([4, 4, 4, 1]))
    found = values(get_objective("rloo"), batch)
    torch.testing.assert_close(found, double([[1.5, 1.5], [-1.5, 0], [0, 0], [0, 0]]))


def test_dr_grpo_divides_by_a_constant_and_not_by_what_is_in_the_batch() -> None:
    # A = ±1/2, B = 2, L = 8: the gradient is -A/16 at every token, however long a row is.
    for probabilities in ([[0.5], [0.5]], [[0.5], [0.5, 0.5, 0.5]]):
        batch = on_policy(hand_batch(probabilities, reward=double([1, 0]), group=torch.tensor([0, 0])))
        gradient = gradients(surrogate(get_objective("dr-grpo", max_length=8), batch), batch)
        expected = torch.where(batch.mask, double([[-1 / 32], [1 / 32]]), 0)
        torch.testing.assert_close(gradient.view(expected.shape), expected)


def test_dapo_counts_the_tokens_of_groups_that_vary_alone() -> None:
    # Rewards 0.1 · 3 have a mean that rounds to something else. The other group has three tokens, A = ±½/(√½ + 1e-4).
    reward = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.0], dtype=torch.float32)
    batch = hand_batch([[0.5, 0.5]] * 3 + [[0.5, 0.5], [0.5]], reward=reward, group=torch.tensor([2, 2, 2, 0, 0]))
    batch = on_policy(batch)
    gradient = gradients(surrogate(get_objective("dapo"), batch), batch).view(5, 2)
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4) / 3
    assert torch.equal(gradient[:3], torch.zeros(3, 2, dtype=torch.float64))
    torch.testing.assert_close(gradient[3:], double([[-advantage, -advantage], [advantage, 0]]))


def test_dapo_without_any_group_that_varies_is_zero() -> None:
    batch = random_batch(0)
    batch = replace(batch, reward=torch.ones_like(batch.reward))  # type: ignore[arg-type]
    objective = get_objective("dapo")
    with pytest.warns(UserWarning, match="every token of the batch is masked"):
        loss = surrogate(objective, batch)
    assert loss.item() == 0 and (gradients(loss, batch) == 0).all()


def test_gspo_reports_what_its_clipping_takes_like_every_objective_with_ratios() -> None:
    """s = 1.5 for both tokens of one row, of which the advantage is positive: it is clipped, and all of it is lost."""
    logp, behaviour = double([[-1.0, -1.0]]), double([[-1.0, -1.0]]) - math.log(1.5)
    batch = TokenBatch(
        logp, torch.ones(1, 2, dtype=torch.bool), advantage=double([[2.0, 2.0]]), behaviour_logp=behaviour
    )
    metrics = get_objective("gspo").coefficients(batch).metrics
    for name in ("grpo", "ppo", "dapo", "dr-grpo", "cispo"):
        objective = get_objective(name, **({"kl_coefficient": 0.0} if name in ("grpo", "ppo") else {}))
        own = objective.coefficients(batch).metrics
        assert own.keys() - {"ratio"} <= metrics.keys() - {"sequence_ratio"}, name
    signal = 2 * 1.5 * (1 - math.exp(-1))
    for name, value in {"ratio_deviation": 0.5, "clipped": 1, "signal": signal, "signal_clipped": signal}.items():
        assert metrics[name].tolist() == [[pytest.approx(value)] * 2], name


def test_gspo_takes_the_geometric_mean_of_the_ratios() -> None:
    # ρ = 2 and 1/2 · 1.21 have the geometric mean 1.1: within 0.2 of 1, beyond 0.05 of it.
    batch = hand_batch([[0.5, 0.121], [0.5, 0.5]], reward=double([1, 0]), group=torch.tensor([0, 0]))
    batch = batch.replace(behaviour_logp=double([[0.25, 0.2], [0.5, 0.5]]).log())
    advantage = 0.5 / (math.sqrt(0.5) + 1e-4)
    found = values(get_objective("gspo", clip_low=0.2, clip_high=0.2), batch)
    torch.testing.assert_close(found, double([[1.1 * advantage] * 2, [-advantage] * 2]))
    clipped = values(get_objective("gspo", clip_low=0.05, clip_high=0.05), batch)
    torch.testing.assert_close(clipped, double([[0.0] * 2, [-advantage] * 2]))


def test_otb_by_hand() -> None:
    # Two tokens each: row 0 has p = 1/2 and Σπ² = 1/2 twice, S = 1 - 1 + 1/2, so W = 0.5, 1. Row 1 has one token of
    # p = 3/4, Σπ² = 9/16 + 1/16, S = 1 - 3/2 + 5/8 = 1/8. Returns 1 and 0. B_0 = 0.5/(0.5 + 0.125) = 0.8; at 1 row 0
    # runs alone and B_1 = 1. Row 2 is a group of its own. ρ = 2 throughout.
    batch = hand_batch([[0.5, 0.5], [0.75], [0.5]], reward=double([1, 0, 3]), group=torch.tensor([0, 0, 9]))
    batch = batch.replace(
        snapshot_logp=batch.logp.detach(),
        behaviour_logp=batch.logp.detach() - math.log(2),
        statistics={"square_mass": double([[0.5, 0.5], [0.625, math.nan], [0.5, math.nan]])},
    )
    torch.testing.assert_close(values(get_objective("otb"), batch), double([[0.4, 0], [-1.6, 0], [0, 0]]))


def test_otb_of_tokens_that_are_certain_has_no_baseline_and_no_nan() -> None:
    # p = 1: S = 0, and so is the gradient of log p
    batch = hand_batch([[1.0], [1.0]], reward=double([1, 0]), group=torch.tensor([0, 0]))
    batch = on_policy(batch).replace(snapshot_logp=batch.logp.detach(), statistics={"square_mass": double([[1.0]] * 2)})
    assert torch.equal(values(get_objective("otb"), batch), double([[1.0], [0.0]]))


def test_the_score_norm_of_otb_is_that_of_the_logits() -> None:
    # ∇_z log π(y) = 1_y - π, so its squared norm is (1 - p)² + Σ_{v≠y} π_v² = 1 - 2p + Σ_v π_v²
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.manual_seed(0)).requires_grad_()
    logp = logits.log_softmax(1)[:, 2]
    (score,) = torch.autograd.grad(logp.sum(), logits)
    square_mass = logits.softmax(1).square().sum(1)
    torch.testing.assert_close(score.square().sum(1), 1 - 2 * logp.exp() + square_mass)


def test_shapes_are_checked() -> None:
    table, mask, row = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2)
    with pytest.raises(ValueError, match=r"shapes differ: \(2, 3\), \(2, 1\)"):
        token_ratio(table, table[:, :1], mask)
    with pytest.raises(ValueError, match="shapes differ"):
        sequence_ratio(table, table, mask[:1])
    with pytest.raises(ValueError, match="shapes differ"):
        clipped_gradient(table, row, 0.2, 0.2)
    with pytest.raises(ValueError, match="shapes do not match"):
        optimal_token_baseline(row, torch.zeros(3, dtype=torch.long), table, mask)


# Stale data


def stale(gap: float, advantage: float = -1.0) -> TokenBatch:
    """A good and a bad row, each of a token that is e^gap times as likely as when it was sampled, and a fresh one."""
    logp = double([[-1.0, -1.0]] * 2)
    batch = TokenBatch(
        logp=logp.clone().requires_grad_(),
        mask=torch.ones(2, 2, dtype=torch.bool),
        behaviour_logp=logp - double([[gap, 0.0]] * 2),
        reference_logp=logp + double([[gap, 0.0]] * 2),
        reward=double([-advantage, advantage]),
        group=torch.tensor([0, 0]),
    )
    return batch.replace(
        snapshot_logp=batch.behaviour_logp, old_value=0 * logp, statistics={"square_mass": 0 * logp + 0.5}
    )


@pytest.mark.parametrize(
    "name", ["grpo", "ppo", "dr-grpo", "dapo", "gspo", "cispo", "otb", "psft", "iw-sft", "dpo", "kto", *NEW]
)
def test_nothing_is_infinite_on_stale_data(name: str) -> None:
    for gap in (25.0, 100.0, 1000.0, -100.0, math.inf):
        for dtype in (torch.float32, torch.float64):
            assert_finite_on_stale_data(get_objective(name), gap, dtype)


def assert_finite_on_stale_data(objective: Objective, gap: float, dtype: torch.dtype) -> None:
    batch = stale(gap)
    batch = batch.replace(mismatched=double([0, 0]), partner=torch.tensor([1, 0]), chosen=torch.tensor([True, False]))
    if math.isinf(gap):  # a token that the behaviour policy cannot have sampled
        batch = batch.replace(reference_logp=batch.logp.detach())
        if objective.name in ("ppo", "reinforce-pp"):  # its snapshot is a policy's that could have sampled it
            batch = batch.replace(snapshot_logp=batch.logp.detach())
    low = {k: v.detach().to(dtype) for k, v in batch._tensors().items() if v.is_floating_point()}
    batch = batch.replace(**low, statistics={k: v.to(dtype) for k, v in batch.inputs.items()})
    found = objective.coefficients(prepared(objective, batch).detach())
    tensors = [found.values, *found.metrics.values(), *([] if found.loss is None else [found.loss])]
    bounded = [tensor for tensor in tensors if not tensor.isnan().all()]
    assert all(torch.isfinite(tensor[~tensor.isnan()]).all() for tensor in bounded)
    assert torch.isfinite(found.values).all() and torch.isfinite(found.values.sum())


@pytest.mark.parametrize("name", ["grpo", "ppo", "dr-grpo", "dapo", "gspo", "reinforce-pp"])
def test_a_stale_token_beyond_the_bound_has_no_gradient_and_others_have_theirs(name: str) -> None:
    options: dict[str, object] = {"whiten": False} if name == "ppo" else {}
    options |= {"kl_coefficient": 0.0} if name in ("grpo", "ppo", "reinforce-pp") else {}
    found = values(get_objective(name, **options), stale(100.0))
    if name == "gspo":  # one ratio of the sequence
        assert (found == 0).all()
    else:
        assert (found[:, 0] == 0).all() and found[0, 1] > 0 > found[1, 1]


def test_the_gradient_on_stale_data_is_that_of_the_bounded_loss() -> None:
    # log-ratios of ±19 are taken as they are, those of ±21 as ±20, where the loss does not change: verl's clamp
    for gap in (-21.0, -19.0, 19.0, 21.0):
        batch = stale(gap)
        loss = grpo_canonical(batch)
        (expected,) = torch.autograd.grad(loss, batch.logp)
        ours = gradients(surrogate(get_objective("grpo"), batch), batch)
        torch.testing.assert_close(ours.view(expected.shape), expected, rtol=1e-10, atol=1e-9)


def test_two_sided_clipping_by_hand() -> None:
    # ρ = 3 on both tokens: on the good row it is clipped at 1.2 as ever; on the bad one, where GRPO has the loss 3a and
    # the coefficient -3a, δ = 2 leaves the loss 2a and no gradient, and δ = 4 changes nothing.
    batch = hand_batch([[0.6], [0.6]], reward=double([1, 0]), group=torch.tensor([0, 0]))
    batch = batch.replace(behaviour_logp=double([[0.2], [0.2]]).log(), value=None)
    batch = batch.replace(old_value=0 * batch.logp.detach(), reference_logp=batch.logp.detach())
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    for name, option in (("grpo", "delta"), ("dapo", "delta"), ("gspo", "delta"), ("dr-grpo", "delta")):
        scale = {"dr-grpo": 0.5 / 256}.get(name, a)
        for bound, held in ((None, 3.0), (4.0, 3.0), (2.0, 2.0)):
            objective = get_objective(name, **{option: bound})
            found = objective.coefficients(prepared(objective, batch).detach())
            assert found.loss is not None
            torch.testing.assert_close(found.loss[1], double([held * scale]))
            torch.testing.assert_close(found.values, double([[0.0], [-3 * scale if held == 3 else 0.0]]))


@pytest.mark.parametrize(
    ("name", "option"), [("grpo", "delta"), ("dapo", "delta"), ("gspo", "delta"), ("ppo", "dual_clip")]
)
def test_an_upper_bound_below_the_clip_is_refused(name: str, option: str) -> None:
    with pytest.raises(UserError, match=f"{name} needs {option} above 1"):
        get_objective(name, **{option: 1.0})


def test_the_corrected_kl_has_the_gradient_of_the_kl() -> None:
    # Over three tokens drawn from μ, E_μ[ρ k3] = KL(π ‖ π_ref) and so are their gradients in the logits; k3 alone has
    # the mean 0.116 here, and the KL is 0.089.
    logits = double([0.3, -0.2, 0.5]).requires_grad_()
    logp, reference = logits.log_softmax(0), double([-0.1, 0.4, 0.2]).log_softmax(0)
    behaviour = double([0.6, 0.3, 0.1])
    kl = (logp.exp() * (logp - reference)).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    batch = TokenBatch(
        logp=logp[None],
        mask=torch.ones(1, 3, dtype=torch.bool),
        behaviour_logp=behaviour.log()[None],
        reference_logp=reference[None],
        reward=double([1.0]),
        group=torch.tensor([0]),
    )
    found = {}
    for correction in (True, False):
        objective = get_objective("grpo", kl_coefficient=1.0, kl_correction=correction)
        own = objective.coefficients(prepared(objective, batch).detach())
        (gradient,) = torch.autograd.grad(-(behaviour * own.values[0] * logp).sum(), logits, retain_graph=True)
        found[correction] = (own.metrics["kl"][0] * behaviour).sum(), gradient
    torch.testing.assert_close(found[True][0], kl)
    torch.testing.assert_close(found[True][1], expected)
    assert abs(found[False][0] - kl) > 0.01 and (found[False][1] - expected).abs().max() > 0.01


def test_ppo_takes_the_value_at_a_truncated_end_for_the_one_after_it() -> None:
    # γ = λ = 1, values 2, 3, reward 1: an episode that ended has the returns 1, 1; one that was cut has 1 + 3.
    batch = hand_batch([[0.5, 0.5]] * 2, reward=double([1, 1]), truncated=torch.tensor([True, False]))
    batch = batch.replace(behaviour_logp=batch.logp.detach(), old_value=double([[2, 3]] * 2))
    options = {"kl_coefficient": 0.0, "lam": 1.0, "whiten": False}
    for bootstrap, cut in ((True, 4.0), (False, 1.0)):
        ready = prepared(get_objective("ppo", bootstrap_truncated=bootstrap, **options), batch)
        assert ready.returns is not None and ready.advantage is not None
        torch.testing.assert_close(ready.returns, double([[cut, cut], [1, 1]]))
        torch.testing.assert_close(ready.advantage, double([[cut - 2, cut - 3], [-1, -2]]))


def test_otb_with_a_zero_tail_by_hand() -> None:
    # as in `test_otb_by_hand`, but where row 0 runs alone, and in the group of one, B = 0: A = G
    batch = hand_batch([[0.5, 0.5], [0.75], [0.5]], reward=double([1, 0, 3]), group=torch.tensor([0, 0, 9]))
    batch = on_policy(batch).replace(
        snapshot_logp=batch.logp.detach(),
        statistics={"square_mass": double([[0.5, 0.5], [0.625, math.nan], [0.5, math.nan]])},
    )
    torch.testing.assert_close(
        values(get_objective("otb", zero_tail=True), batch), double([[0.2, 1], [-0.8, 0], [3, 0]])
    )


# Groups that vary


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.3, 1.0])), max_size=12))
def test_groups_vary_where_two_rewards_differ(rows: list[tuple[int, float]]) -> None:
    reward, group = double([r for _, r in rows]), torch.tensor([g for g, _ in rows], dtype=torch.long)
    expected = [len({other for h, other in rows if h == g}) > 1 for g, _ in rows]
    assert group_varies(reward, group).tolist() == expected


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.lists(st.builds(sample, prompt=st.integers(0, 3), reward=st.sampled_from([0.0, 0.5, 1.0])), max_size=16),
    st.sampled_from([None, 1, 2, 3]),
)
def test_the_view_of_varied_groups_leaves_uniform_ones_out(rows: list[Trajectory], size: int | None) -> None:
    def units(**options: object) -> list[tuple[int, ...]]:
        try:
            return list(samples(*rows).view(Selection.GROUPS, size=size, **options).units)
        except UserError as error:
            assert "the buffer has no groups" in str(error)
            return []

    assert units(varied=False) == units()
    assert units(varied=True) == [unit for unit in units() if len({rows[i].reward for i in unit}) > 1]


def test_a_buffer_without_varied_groups_is_refused() -> None:
    buffer = samples(*(sample(i // 2, float(i // 2)) for i in range(6)))
    told = "no groups of unequal rewards .in all its 3 the samples have the same.: sample more per prompt"
    with pytest.raises(UserError, match=told):
        buffer.view(Selection.GROUPS, varied=True)


def test_a_fresh_batch_without_varied_groups_is_sampled_again() -> None:
    asked: list[int] = []

    def collect(version: int) -> Buffer:
        asked.append(version)
        return samples(*(sample(i // 2, float(i == 3 and len(asked) > 2)) for i in range(6)))

    objective = get_objective("dapo")
    rows, units = FreshSource(collect, objective.learns_from, **objective.view_options).draw()
    assert asked == [0, 0, 0] and units == [(0, 1)] and [row.prompt_id for row in rows] == ["1", "1"]
    with pytest.raises(UserError, match=r"8 fresh batches in a row have nothing to learn from: .* unequal rewards"):
        FreshSource(lambda _: samples(sample(0, 1.0), sample(0, 1.0)), Selection.GROUPS, varied=True).draw()


@pytest.mark.parametrize("budget", [1, 33, 4096])
def test_dapo_trains_as_if_uniform_groups_were_not_there(budget: int, make_policy: MakePolicy) -> None:
    settings = RAW.model_copy(update={"steps": 3, "updates_per_batch": 2, "token_budget": budget})
    rows, units = make_batch(make_policy(), Selection.GROUPS)
    assert [len({rows[i].reward for i in unit}) for unit in units] == [2, 2, 2, 1]
    whole = trained(make_policy(), get_objective("dapo"), (rows, units), settings)
    without = trained(make_policy(), get_objective("dapo"), (rows[:6], units[:3]), settings)
    assert distance(without, whole) < 1e-6
    grpo = get_objective("grpo", kl_coefficient=0.0)
    assert distance(trained(make_policy(), grpo, (rows[:6], units[:3]), settings), whole) > 1e-3


def test_dapo_stands_still_on_a_batch_of_uniform_groups(make_policy: MakePolicy) -> None:
    policy = make_policy()
    rows, units = make_batch(policy, Selection.GROUPS)
    before = [p.detach().clone() for p in policy.parameters()]
    batch = [replace(row, reward=1.0) for row in rows], units
    steps = Trainer(policy, get_objective("dapo"), Fixed(batch), RAW).run().steps
    assert [(row["loss"], row["gradient_norm"], row["clipped"]) for row in steps] == [(0, 0, 0)] * 2
    assert all(map(torch.equal, before, policy.parameters()))


# Runs

PROBLEMS = [Problem(str(i), f"{i}+{i}=?\n", {"answer": str(2 * i)}) for i in range(4)]


def share_of_small(completion_ids: list[list[int]], **_: object) -> list[float | None]:
    """The share of tokens from the first half of the vocabulary."""
    return [sum(token < 93 for token in ids) / len(ids) for ids in completion_ids]


def sampled(policy: Policy, version: int) -> list[Trajectory]:
    return collect_rollouts(
        policy, TransformersSampler(policy), encode_problems(policy.tokenizer, PROBLEMS),
        Reward("small", share_of_small), Sampling(samples=16, max_new_tokens=4), seed=version, version=version,
    )  # fmt: skip


def mean_reward(rows: list[Trajectory]) -> float:
    return sum(row.reward or 0.0 for row in rows) / len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, *(name for name in NEW if name != "qrpo")])
def test_online_training_raises_a_trivial_reward(name: str, make_policy: MakePolicy) -> None:
    policy = make_policy("llama", dtype=torch.float32, seed=1)
    rewards: list[float] = []

    def collect(version: int) -> Buffer:
        rows = sampled(policy, version)
        rewards.append(mean_reward(rows))
        return OfflineBuffer.from_trajectories(rows)

    torch.manual_seed(0)
    objective = get_objective(name)
    source = FreshSource(collect, objective.learns_from, **objective.view_options)
    Trainer(policy, objective, source, Training(steps=12, learning_rate=1e-2, warmup_ratio=0.0)).run()
    assert len(rewards) == 12
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reinforce", "dapo", "otb"])  # the others' rows are made as these
def test_offline_training_raises_it_too(name: str, make_policy: MakePolicy) -> None:
    policy = make_policy("llama", dtype=torch.float32, seed=1)
    rows = sampled(policy, 0)
    settings = Training(steps=12, learning_rate=1e-2, warmup_ratio=0.0)
    steps = train(policy, get_objective(name), OfflineBuffer.from_trajectories(rows), settings).steps
    assert all(math.isfinite(value) for row in steps for value in row.values())
    assert mean_reward(sampled(policy, 1)) > mean_reward(rows) + 0.08
