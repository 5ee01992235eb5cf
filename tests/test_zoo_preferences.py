"""SimPO, ORPO and KTO: numbers by hand, relations to other objectives, and KTO's mismatched log-ratio."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from batches import SEEDS, hand_batch, random_batch
from hypothesis import given
from hypothesis import strategies as st

from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.formats import from_trl
from rlzoo.config import Training
from rlzoo.errors import UserError
from rlzoo.inputs.references import mismatched
from rlzoo.objective import get_objective, reduce, surrogate
from rlzoo.policy import Assembler, MicroBatches, Models, Policy
from rlzoo.policy.microbatches import log_probs
from rlzoo.testing.batches import gradients
from rlzoo.training import Trainer, train, with_reference
from rlzoo.types import Selection, TokenBatch, Trajectory
from rlzoo.variance.scoring import score
from rlzoo.variance.subjects import subjects_of, weights_of

MakePolicy = Callable[..., Policy]
RAW = Training(steps=2, learning_rate=1e-2, weight_decay=0.0, max_gradient_norm=1e9, warmup_ratio=0.0, batch_size=8)


def pair(better: list[float], worse: list[float]) -> TokenBatch:
    """One pair, from token probabilities."""
    return hand_batch([better, worse], partner=torch.tensor([1, 0]), chosen=torch.tensor([True, False]))


def values_of(name: str, batch: TokenBatch, **options: float) -> list[float]:
    """The coefficient of each row's first token."""
    return [float(x) for x in get_objective(name, **options).coefficients(batch.detach()).values[:, 0]]


def loss_of(name: str, batch: TokenBatch, **options: float) -> float:
    objective = get_objective(name, **options)
    reported = objective.coefficients(batch.detach()).loss
    assert reported is not None
    return reduce(reported, batch, objective.normaliser, objective.normaliser.denominator(batch)).item()


# SimPO


def test_simpo_by_hand() -> None:
    # Mean log-probs: (ln ½ + ln ⅛)/2 = -ln 4 and -ln 8, so Δ = ln 2. With β = 2 and γ = ln 2 the argument is ln 2:
    # loss ln(1 + ½), pull β σ(-ln 2) = 2/3, halved for the two tokens of y⁺.
    batch = pair([0.5, 0.125], [0.125])
    options = {"beta": 2.0, "gamma": math.log(2)}
    assert values_of("simpo", batch, **options) == pytest.approx([1 / 3, -2 / 3])
    assert loss_of("simpo", batch, **options) == pytest.approx(math.log(1.5))


def test_simpo_does_not_look_at_a_reference() -> None:
    objective = get_objective("simpo")
    assert not objective.requires and not get_objective("orpo").requires
    batch = random_batch(0)
    without = batch.replace(reference_logp=None, behaviour_logp=None, snapshot_logp=None)
    assert torch.equal(surrogate(objective, without), surrogate(objective, batch))


@pytest.mark.parametrize("seed", SEEDS)
def test_simpo_of_one_token_is_dpo_under_a_reference_of_zero_log_probs(seed: int) -> None:
    # With |y| = 1 the mean is the sum; γ = 0 leaves -log σ(βΔ).
    batch = random_batch(seed)
    mask = batch.mask & (torch.arange(batch.mask.shape[1]) == 0)
    short = batch.replace(mask=mask, reference_logp=torch.zeros_like(batch.logp).detach())
    ours, dpo = (
        gradients(surrogate(get_objective(name, beta=0.7, **options), short), short)
        for name, options in (("simpo", {"gamma": 0.0}), ("dpo", {}))
    )
    assert dpo.norm() > 0
    torch.testing.assert_close(ours, dpo)


# ORPO


def test_orpo_by_hand() -> None:
    # P⁺ = √(½ · ⅛) = ¼ and P⁻ = ½: odds ⅓ and 1, Ω = -ln 3, σ(-Ω) = 3/4. With λ = 2 the penalty's pull is 3/2: on ℓ⁺
    # 1 + 1.5/(1 - ¼) = 3, halved for two tokens; on ℓ⁻ -1.5/(1 - ½) = -3. The loss is ln 4 + 2 ln 4.
    batch = pair([0.5, 0.125], [0.5])
    assert values_of("orpo", batch, lam=2.0) == pytest.approx([1.5, -3.0])
    assert loss_of("orpo", batch, lam=2.0) == pytest.approx(3 * math.log(4))


def test_orpo_without_the_penalty_is_sft_on_the_better_half() -> None:
    # One length of 2: the mean over completions of the mean over tokens is the mean over tokens.
    batch = pair([0.5, 0.25], [0.3, 0.6])
    better = hand_batch([[0.5, 0.25]])
    ours = gradients(surrogate(get_objective("orpo", lam=0.0), batch), batch)
    sft = gradients(surrogate(get_objective("sft"), better), better)
    torch.testing.assert_close(ours, torch.cat([sft, torch.zeros(2, dtype=torch.float64)]))


ENDS = [(0.0, -1.0), (-1.0, 0.0), (-1e-9, -1e-9), (-200.0, -1.0), (-1.0, -200.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("better", "worse"), ENDS)
def test_orpo_is_finite_at_both_ends_of_probability(better: float, worse: float, dtype: torch.dtype) -> None:
    logp = torch.tensor([[better, better], [worse, worse]], dtype=dtype)
    batch = TokenBatch(
        logp, torch.ones(2, 2, dtype=torch.bool), partner=torch.tensor([1, 0]), chosen=torch.tensor([True, False])
    )
    found = get_objective("orpo").coefficients(batch)
    assert found.loss is not None
    assert torch.isfinite(found.values).all() and torch.isfinite(found.loss).all()
    assert (found.values[0] >= 0.5).all() and (found.values[1] <= 0).all()  # 1/|y⁺| of SFT, and never a reward for y⁻


def test_orpo_is_exact_where_one_minus_p_cancels() -> None:
    # P = exp(-1e-5): in float32 1 - exp(x) has lost 3 of its 7 digits, -expm1(x) none; 1/(1 - P) = 100000.5.
    logp = torch.tensor([[-1e-5], [-1e-5]])
    mask = torch.ones(2, 1, dtype=torch.bool)
    batch = TokenBatch(logp, mask, partner=torch.tensor([1, 0]), chosen=torch.tensor([True, False]))
    assert values_of("orpo", batch, lam=1.0) == pytest.approx([1 + 0.5 * 100000.5, -0.5 * 100000.5], rel=1e-6)


# KTO


def test_kto_by_hand() -> None:
    # r = ln 4 for the good row (two tokens of ratio 2), -ln 4 for the bad one, z0 = ln 2, β = 1:
    # good: σ(ln 2) = 2/3, c = 1.5 · ⅔ · ⅓ = 1/3, loss 1.5/3 = ½;
    # bad: σ(ln 2 + ln 4) = 8/9, c = -0.9 · 8/81 = -4/45, loss 0.9/9 = 1/10.
    batch = hand_batch([[0.5, 0.5], [0.25]], reward=torch.tensor([1.0, 0.0]), mismatched=torch.full((2,), math.log(2)))
    ratio = torch.tensor([[math.log(2), math.log(2)], [-math.log(4), 0]], dtype=torch.float64)
    batch = batch.replace(reference_logp=batch.logp.detach() - ratio)
    options = {"beta": 1.0, "desirable_weight": 1.5, "undesirable_weight": 0.9}
    assert values_of("kto", batch, **options) == pytest.approx([1 / 3, -4 / 45])
    assert loss_of("kto", batch, **options) == pytest.approx((0.5 + 0.1) / 2)


def test_a_negative_mismatched_log_ratio_counts_as_nothing() -> None:
    objective, batch = get_objective("kto"), random_batch(0)
    none, below, above = (
        gradients(surrogate(objective, own), own)
        for own in (batch.replace(mismatched=torch.full_like(batch.mismatched, z0)) for z0 in (0.0, -0.4, 0.4))
    )
    assert torch.equal(below, none) and not torch.equal(above, none)


def test_kto_weights_completions_equally_and_not_tokens() -> None:
    # A long and a short good row with the same r have the same coefficient: the sum over a row's tokens is its own.
    logp = torch.tensor([[-1.0, -1.0, -1.0, -1.0], [-1.0, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    batch = TokenBatch(
        logp, mask, reference_logp=logp.detach(), reward=torch.ones(2), mismatched=torch.zeros(2, dtype=torch.float64)
    )
    gradient = gradients(surrogate(get_objective("kto"), batch), batch).view(2, 4)
    expected = torch.where(mask, -0.1 * 0.25 / 2, 0.0).double()  # β σ(0) σ(0) over two rows
    torch.testing.assert_close(gradient, expected)


Keys = st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(3, 9), max_size=3)), min_size=1, max_size=12)


@given(keys=Keys, data=st.data())
def test_each_completion_goes_to_another_prompt_once(keys: list[tuple[int, list[int]]], data: st.DataObject) -> None:
    rows = [Trajectory("", "", [10 + prompt], completion, str(prompt)) for prompt, completion in keys]
    found = mismatched(rows)

    def told(some: list[Trajectory]) -> list[tuple[list[int], list[int]]]:
        return sorted((row.prompt_ids, row.completion_ids) for row in some)

    largest = max(Counter(row.prompt_id for row in rows).values())
    if 2 * largest <= len(rows):
        assert sorted(r.completion_ids for r in found) == sorted(r.completion_ids for r in rows)
        assert sorted(r.prompt_ids for r in found) == sorted(r.prompt_ids for r in rows)
    assert len(found) == min(len(rows), 2 * (len(rows) - largest))
    completions = Counter(tuple(row.completion_ids) for row in rows)
    assert not Counter(tuple(row.completion_ids) for row in found) - completions
    assert told(mismatched(data.draw(st.permutations(rows)))) == told(found)


def test_mismatched_rows_by_hand() -> None:
    # Sorted: a1 a2 b3 c4. Prompt a has two of them, so prompts move on by two: a-b3, a-c4, b-a1, c-a2.
    rows = [Trajectory("", "", [ord(p)], [y], p) for p, y in (("c", 4), ("a", 2), ("b", 3), ("a", 1))]
    found = [(row.prompt_id, row.completion_ids[0]) for row in mismatched(rows)]
    assert found == [("a", 3), ("a", 4), ("b", 1), ("c", 2)]
    assert mismatched(rows[1::2]) == []


def unpaired(prompts: int = 5) -> list[Trajectory]:
    draw = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=draw))
        return [int(x) for x in torch.randint(3, 120, (length,), generator=draw)]

    starts = [tokens(1, 6) for _ in range(prompts)]
    return [
        Trajectory(
            "", "", starts[i % prompts], tokens(1, 9), str(i % prompts), source="preference", reward=float(i % 3 > 0),
        )
        for i in range(8)
    ]  # fmt: skip


class Fixed:
    """The same batch at every draw."""

    def __init__(self, rows: list[Trajectory]) -> None:
        self.rows = rows

    def draw(self) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
        return self.rows, [(i,) for i in range(len(self.rows))]


def divergence(policy: Policy, reference: Policy, rows: list[Trajectory]) -> float:
    """The mean of log π/π_ref over mismatched rows, one row at a time."""
    total = []
    for row in mismatched(rows):
        own, other = (sum(log_probs(p, [(row.prompt_ids, row.completion_ids)])[0]) for p in (policy, reference))
        total.append(own - other)
    return sum(total) / len(total)


@pytest.mark.slow
@pytest.mark.parametrize("updates", [1, 3])
def test_the_trainer_measures_z0_at_each_update(make_policy: MakePolicy, updates: int) -> None:
    policy, rows, before = make_policy(seed=1), unpaired(), make_policy(seed=1)  # whose estimates are positive
    settings = RAW.model_copy(update={"steps": 3, "updates_per_batch": updates, "token_budget": 20})
    expected = [0.0]

    def keep(trainer: Trainer, step: int) -> None:
        expected.append(divergence(trainer.policy, before, rows))

    buffer = OfflineBuffer.from_trajectories(rows)
    objective = get_objective("kto", beta=0.5)
    steps = train(policy, objective, buffer, settings, callbacks=[keep]).steps
    assert [row["kl"] for row in steps] == pytest.approx([max(x, 0.0) for x in expected[:3]], rel=1e-4, abs=1e-6)
    assert steps[1]["kl"] != steps[2]["kl"] and max(row["kl"] for row in steps) > 1e-3
    assert steps[0]["loss"] == pytest.approx(0.5)  # r = z0 = 0: 1 - σ(0)


def test_z0_changes_the_gradient_of_a_step(make_policy: MakePolicy) -> None:
    """The trainer's gradient at a policy that has moved is that of the surrogate with the measured z0."""
    start, rows = make_policy(), unpaired()
    policy = make_policy(seed=1)
    if divergence(policy, start, rows) < 0:
        start, policy = policy, start
    z0 = divergence(policy, start, rows)
    assert z0 > 0.1
    ids = [(row.prompt_ids, row.completion_ids) for row in rows]
    stored = [replace(r, reference_logp=x) for r, x in zip(rows, log_probs(start, ids), strict=True)]
    objective = get_objective("kto", beta=0.5)
    losses = []
    for token_budget in (20, 4096):
        settings = RAW.model_copy(update={"steps": 1, "token_budget": token_budget, "learning_rate": 1e-9})
        trainer = Trainer(policy, objective, Fixed(stored), settings, reference=start.frozen_copy())
        losses.append(trainer.run().steps[0])
    assert losses[0]["kl"] == pytest.approx(z0, rel=1e-5)
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-6)
    ratios = [sum(a) - sum(r.reference_logp or []) for a, r in zip(log_probs(policy, ids), stored, strict=True)]
    good = [bool(r.reward) for r in rows]
    by_hand = [1 / (1 + math.exp(0.5 * (1 if g else -1) * (r - z0))) for r, g in zip(ratios, good, strict=True)]
    assert losses[0]["loss"] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-4)


def test_one_prompt_alone_has_no_mismatch(make_policy: MakePolicy) -> None:
    steps = train(make_policy(), get_objective("kto"), OfflineBuffer.from_trajectories(unpaired(1)), RAW).steps
    assert [row["kl"] for row in steps] == [0, 0] and all(row["gradient_norm"] > 0 for row in steps)


def test_the_analyzer_measures_z0_against_a_reference(make_policy: MakePolicy) -> None:
    policy, start, rows = make_policy(), make_policy(seed=1), unpaired()
    objective = get_objective("kto")
    buffer = OfflineBuffer.from_trajectories(rows)
    picked, subjects, _ = subjects_of({"kto": objective}, buffer, 100, 0, None)
    batches = []
    for reference in (start, policy):
        assembler = Assembler(policy, Models(policy, {None: reference}), MicroBatches(100), remember=True)
        scored = score(assembler, [buffer[i] for i in picked], [], {}, 0, 0)
        batches.append(weights_of(assembler, subjects["kto"], scored).batch)
    own, at_start = batches
    assert own.mismatched.tolist() == pytest.approx([divergence(policy, start, rows)] * 8, rel=1e-4)
    assert at_start.mismatched.tolist() == [0] * 8


def test_the_unpaired_view_has_every_row_with_a_reward() -> None:
    def row(source: str, reward: float | None) -> Trajectory:
        return Trajectory("", "", [1], [2], "p", source=source, reward=reward)

    known = [("demonstration", 1.0), ("policy", 0.0), ("policy", None), ("preference", 1.0), ("policy", 0.3)]
    buffer = OfflineBuffer.from_trajectories([row(*k) for k in known])
    assert buffer.view(Selection.UNPAIRED).units == ((1,), (3,), (4,))
    with pytest.raises(UserError, match=r"no rewards \(none of its 1 rows has one\): score them with rlzoo rescore"):
        OfflineBuffer.from_trajectories([row("policy", None)]).view(Selection.UNPAIRED)


@pytest.mark.slow
def test_kto_learns_from_unpaired_preferences_of_trl(make_policy: MakePolicy) -> None:
    policy = make_policy()
    words = ("ann is", "bob is", "cat is", "dan is")
    table = [{"prompt": w, "completion": f" {y}", "label": y == "red"} for w in words for y in ("red", "blue")]
    buffer = from_trl(table, policy.tokenizer)
    settings = RAW.model_copy(update={"steps": 30, "batch_size": 4})
    steps = train(policy, get_objective("kto", beta=0.5), buffer, settings).steps
    assert steps[-1]["loss"] < steps[0]["loss"] == pytest.approx(0.5)
    gap = [row["desirable_log_ratio"] - row["undesirable_log_ratio"] for row in steps]
    assert gap[-1] > 1 > abs(gap[0])


def test_both_log_ratios_of_kto_are_to_the_policy_as_it_comes(make_policy: MakePolicy) -> None:
    policy, other = make_policy(), make_policy(seed=5)
    buffer = with_reference(OfflineBuffer.from_trajectories(unpaired()), other)  # of somebody else's run
    first = train(policy, get_objective("kto"), buffer, RAW).steps[0]
    for name in ("kl", "desirable_log_ratio", "undesirable_log_ratio"):
        assert first[name] == pytest.approx(0, abs=1e-5)
