"""The zoo's objectives for demonstrations: how they are related, and numbers that were derived by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import SEEDS, hand_batch, random_batch
from comparisons import small
from test_training import RAW, Fixed, MakePolicy, distance, full_batch, make_batch, term_of, trained
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlzoo import Collector, OfflineBuffer, analyze_variance, compare, load_policy, train
from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.problems import each_demonstration, load_problems
from rlzoo.cli import main
from rlzoo.config import ProblemSource, Sampling, Training
from rlzoo.errors import UserError
from rlzoo.inputs import Statistic
from rlzoo.objective import Objective, get_objective, surrogate
from rlzoo.policy import Sequences, log_probs
from rlzoo.policy import head as head_module
from rlzoo.policy.head import Head, token_log_probs
from rlzoo.rollout import TransformersSampler
from rlzoo.testing.batches import gradients
from rlzoo.training import Trainer
from rlzoo.training.batches import BufferSource
from rlzoo.types import Selection, TokenBatch, Trajectory
from rlzoo.variance.subjects import subjects_of, view_of

CPU = torch.device("cpu")
DEMONSTRATIONS = Selection.DEMONSTRATIONS


def gradient_of(name: str, batch: TokenBatch, **options: Any) -> Tensor:
    return gradients(surrogate(get_objective(name, **options), batch), batch)


# Relations and hand-derived numbers


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("alpha", "name"), [(0.0, "sft"), (1.0, "dft")])
def test_the_power_family_ends_in_sft_and_dft(alpha: float, name: str, seed: int) -> None:
    batch = random_batch(seed)
    assert torch.equal(gradient_of("power", batch, alpha=alpha), gradient_of(name, batch))


def test_power_by_hand() -> None:
    # p = 1/2, 1/4, 1/10. α = 2: c = 1/4, 1/16, 1/100, loss (1 - c)/2. With τ = 1/4 the last token is left out of the
    # sum and of the number that it is divided by: gradients -c/2 in place of -c/3, loss (3/8 + 15/32)/2.
    batch = hand_batch([[0.5, 0.25], [0.1]])
    for threshold, kept, last in ((0.0, 3, 0.01), (0.25, 2, 0.0)):
        objective = get_objective("power", alpha=2.0, threshold=threshold)
        gradient = gradients(surrogate(objective, batch), batch).view(2, 2)[batch.mask]
        assert gradient.tolist() == pytest.approx([-0.25 / kept, -0.0625 / kept, -last / kept])
        found = objective.coefficients(batch.detach())
        assert found.loss is not None
        expected = (0.375 + 0.46875 + (0.0 if threshold else 0.495)) / kept
        assert float(found.loss[batch.mask].mean()) == pytest.approx(expected)
        assert float(found.metrics["kept"][batch.mask].sum() if threshold else 3) == kept


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "options", "same"),
    [
        ("trsft", {"alpha": 1e-300}, "sft"),
        ("trsft", {"alpha": 1.0}, "dft"),
        ("floor-dft", {"floor": 0.0}, "dft"),
        ("floor-dft", {"floor": 1.0}, "sft"),
        ("profit", {"threshold": 0.0}, "sft"),
        ("memft", {"threshold": 1.1}, "sft"),
        ("idft", {"strength": 0.0}, "dft"),
        ("idft", {"gamma_min": 1.0, "gamma_max": 1.0}, "dft"),
        ("idft", {"gamma_min": 0.0, "gamma_max": 0.0}, "sft"),
    ],
)
def test_limits_of_the_weights(name: str, options: dict[str, float], same: str, seed: int) -> None:
    batch = random_batch(seed)
    ours, theirs = gradient_of(name, batch, **options), gradient_of(same, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    assert not torch.allclose(gradient_of(name, batch), theirs)


def weights(name: str, *probabilities: float, **options: float) -> list[float]:
    """The coefficients of single tokens of these probabilities."""
    found: list[float] = (
        get_objective(name, **options).coefficients(hand_batch([list(probabilities)]).detach()).values[0].tolist()
    )
    return found


@pytest.mark.parametrize("name", ["sft", "dft"])
def test_sequences_may_count_alike(name: str) -> None:
    # Two tokens of p = 1/2 and 1/4 and one of 1/10: each has a third of the step, or a quarter, a quarter and a half.
    batch = hand_batch([[0.5, 0.25], [0.1]])
    weight = torch.tensor([0.5, 0.25, 0.1] if name == "dft" else [1.0, 1.0, 1.0]).double()
    for aggregation, share in (("token", [1 / 3] * 3), ("sequence", [0.25, 0.25, 0.5])):
        found = gradient_of(name, batch, aggregation=aggregation).view(2, 2)[batch.mask]
        torch.testing.assert_close(found, -weight * torch.tensor(share).double(), rtol=1e-6, atol=0)


def test_label_smoothing_by_hand() -> None:
    # π = (1/2, 1/4, 1/4), ε = 0.3: the target of y = 0 is (0.7 + 0.1, 0.1, 0.1), and the gradient π minus that.
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log().requires_grad_()
    objective = get_objective("sft", label_smoothing=0.3)
    term = objective.logit_term(logits, None, torch.tensor([0]))
    assert term is not None and objective.has_logit_term and not get_objective("sft").has_logit_term
    loss = term.sum() - 0.7 * logits.log_softmax(1)[0, 0]
    (found,) = torch.autograd.grad(loss, logits)
    assert found[0].tolist() == pytest.approx([-0.3, 0.15, 0.15])
    with pytest.raises(UserError, match="sft needs label_smoothing of at least 0 and below 1"):
        get_objective("sft", label_smoothing=1.0)


def test_trsft_and_floor_dft_mirror_each_other() -> None:
    # α = 0.1: p = 0.02 and 0.05 are outside the trust region, with a fifth and a half of SFT's weight. The floor gives
    # these tokens 0.1 where DFT gives p; above, TrSFT is SFT and floor-DFT is DFT.
    assert weights("trsft", 0.02, 0.05, 0.1, 0.5) == pytest.approx([0.2, 0.5, 1, 1])
    assert weights("floor-dft", 0.02, 0.05, 0.1, 0.5) == pytest.approx([0.1, 0.1, 0.1, 0.5])
    for alpha in (0.0, 1.5):
        with pytest.raises(UserError, match="trsft needs alpha above 0 and at most 1"):
            get_objective("trsft", alpha=alpha)


def test_infosft_by_hand() -> None:
    # logit(0.9) = ln 9. With P = 0.9: p = 1/2 has logit 0, so w = p; p = 0.1 has logit -ln 9, so w = 2p; p = 0.9 has
    # w = 0, and so has all above; 1/2 < p = 3/4 has w = ¾ (1 - ln 3/ln 9) = 3/8.
    found = weights("infosft", 0.1, 0.5, 0.75, 0.9, 0.99, known=0.9)
    assert found == pytest.approx([0.2, 0.5, 0.375, 0, 0], abs=1e-12)
    for known in (0.5, 1.0):
        with pytest.raises(UserError, match=r"infosft needs known between 0\.5 and 1"):
            get_objective("infosft", known=known)


def test_a_certain_token_teaches_nothing_and_gives_no_nan() -> None:
    batch = TokenBatch(torch.tensor([[0.0, -1e-12, -1e3]]).double(), torch.ones(1, 3, dtype=torch.bool))
    for name in ("infosft", "chord"):
        assert get_objective(name).coefficients(batch).values[0].tolist() == pytest.approx([0, 0, 0], abs=1e-9)


def test_chord_by_hand() -> None:
    assert weights("chord", 0.1, 0.5, 0.9, 1.0) == pytest.approx([0.09, 0.25, 0.09, 0])


def test_profit_and_memft_keep_what_the_other_leaves() -> None:
    # p = 0.3, 0.6, 0.8 and τ = ½: ProFit keeps the last two, each with 1, MemFT the first, times 3 for its third.
    kept = weights("profit", 0.3, 0.6, 0.8, threshold=0.5)
    left = weights("memft", 0.3, 0.6, 0.8, threshold=0.5)
    assert kept == [0, 1, 1] and left == pytest.approx([3, 0, 0])
    assert weights("power", 0.3, 0.6, 0.8, alpha=0.0, threshold=0.5) == pytest.approx([0, 1.5, 1.5])


def test_memft_with_nothing_left_to_memorise_is_zero() -> None:
    assert weights("memft", 0.6, 0.9) == [0, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_memft_does_not_depend_on_where_its_tokens_are(seed: int) -> None:
    """It divides by the kept tokens of the step: more known tokens do not change its gradient."""
    few = hand_batch([[0.3, 0.2]])
    many = hand_batch([[0.3, 0.2, 0.9, 0.8], [0.7]])
    ours, theirs = (gradient_of("memft", batch).view(len(batch.mask), -1)[0, :2] for batch in (few, many))
    torch.testing.assert_close(ours, theirs)
    assert gradient_of("profit", few, threshold=0.1)[0] != gradient_of("profit", many, threshold=0.1)[0]


def test_idft_by_hand() -> None:
    # H = ln 4. p = 1/4 is as likely as the mean, so γ = 1: DFT. p = 1/2: γ = e^-ln 2 = 1/2. p = 1/8: γ = e^ln 2 = 2.
    # p = 1/100: γ = 25, held at 2. λ = ½ takes 2 to 1.5.
    entropy = torch.full((1, 4), math.log(4), dtype=torch.float64)
    batch = hand_batch([[0.25, 0.5, 0.125, 0.01]]).replace(statistics={"entropy": entropy}).detach()
    found = get_objective("idft").coefficients(batch)
    assert found.metrics["exponent"][0].tolist() == pytest.approx([1, 0.5, 2, 2])
    assert found.values[0].tolist() == pytest.approx([0.25, 0.5**0.5, 0.125**2, 1e-4])
    half = get_objective("idft", strength=0.5).coefficients(batch)
    assert half.values[0].tolist() == pytest.approx([0.25, 0.5**0.75, 0.125**1.5, 1e-3])
    with pytest.raises(UserError, match="0 ≤ gamma_min ≤ gamma_max"):
        get_objective("idft", gamma_min=3.0)


def test_power_by_default_still_learns_from_an_unlikely_token() -> None:
    # at the tenth power a token of p = 1/2 would have 1/1024 of the weight of a certain one
    batch = hand_batch([[0.5, 0.1]])
    assert get_objective("power").coefficients(batch.detach()).values.tolist() == [pytest.approx([0.5, 0.1])]


def test_power_that_keeps_no_token_is_zero() -> None:
    batch = hand_batch([[0.5, 0.25], [0.1]])
    gradient = gradients(surrogate(get_objective("power", threshold=0.9), batch), batch)
    assert (gradient == 0).all()


def test_deft_by_hand() -> None:
    # p = 1/4 with a = 1/2: c = 1/2, loss (1 - 1/2)/(1/2) = 1. p = 1/4 with a = 1: DFT's 1/4, loss 3/4.
    # p = 1/4 with a = 1e-12: SFT's 1, loss ln 4.
    batch = hand_batch([[0.25, 0.25, 0.25]]).replace(
        statistics={"square_mass": torch.tensor([[0.5, 1.0, 1e-12]], dtype=torch.float64)},
    )
    found = get_objective("deft").coefficients(batch.detach())
    assert found.values[0].tolist() == pytest.approx([0.5, 0.25, 1.0])
    assert found.loss is not None and found.loss[0].tolist() == pytest.approx([1.0, 0.75, math.log(4)])


def test_floor_dft_by_hand() -> None:
    # p = 0.02, 0.1 and 0.5 have weights 0.1, 0.1 and 0.5 at the default floor; the first is below it.
    found = get_objective("floor-dft").coefficients(hand_batch([[0.02, 0.1, 0.5]]).detach())
    assert found.values[0].tolist() == pytest.approx([0.1, 0.1, 0.5])
    assert found.metrics["at_floor"][0].tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(UserError, match="floor between 0 and 1"):
        get_objective("floor-dft", floor=1.5)


def test_eaft_by_hand() -> None:
    # Entropies ln 20 of 20 equal tokens, ln 2 of two, 0 of one: weights 1, ln 2/ln 20 = 0.2313782, 0.
    entropy = torch.tensor([[math.log(20), math.log(2), 0.0]], dtype=torch.float64)
    batch = hand_batch([[0.05, 0.5, 0.9]]).replace(statistics={"top_entropy": entropy})
    gradient = gradient_of("eaft", batch)
    assert gradient.tolist() == pytest.approx([-1 / 3, -0.2313782 / 3, 0.0], rel=1e-6)


@pytest.mark.parametrize(("weight", "bias", "eaft", "deft"), [(0.0, 0.0, 1.0, 1 / 40), (0.0, 50.0, 0.0, 1.0)])
def test_the_statistics_that_eaft_and_deft_ask_for(weight: float, bias: float, eaft: float, deft: float) -> None:
    """Over 40 equal logits, the 20 likeliest tokens are equally likely and Σ π² = 1/40; with one far above, one is all.

    Token 0 is the target: p = 1/40 or 1, so DEFT's coefficient is (1/40)^(1/40), or 1.
    """
    layer = nn.Linear(3, 40).double()
    nn.init.constant_(layer.weight, weight)
    nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layer.bias[0] = bias
    needs = [Statistic("top_entropy"), Statistic("square_mass")]
    found = token_log_probs(Head(layer), torch.ones(1, 3).double(), torch.tensor([0]), statistics=needs)
    statistics = {one.key: found[one.key][None] for one in needs}
    batch = TokenBatch(found["logp"].detach()[None], torch.ones(1, 1, dtype=torch.bool), statistics=statistics)
    assert get_objective("eaft").coefficients(batch).values.item() == pytest.approx(eaft, abs=1e-9)
    p = 1.0 if bias else 1 / 40
    assert get_objective("deft").coefficients(batch).values.item() == pytest.approx(p**deft, abs=1e-9)


def test_psft_by_hand() -> None:
    # π_old = 1/4 and ρ = 1, 1.2, 1.28, 1.32, 1/2: the fourth is above 1.28 and clipped, the last is not, however low.
    ratios = [1.0, 1.2, 1.28, 1.32, 0.5]
    batch = hand_batch([[0.25 * ratio for ratio in ratios]])
    old = torch.full((1, 5), math.log(0.25), dtype=torch.float64)
    batch = batch.replace(snapshot_logp=old + 1e-12)  # so that 1.28 is not above itself by a rounding error
    found = get_objective("psft").coefficients(batch.detach())
    assert found.values[0].tolist() == pytest.approx([1.0, 1.2, 1.28, 0.0, 0.5])
    assert found.loss is not None
    assert found.loss[0].tolist() == pytest.approx([-1.0, -1.2, -1.28, -1.28, -0.5])
    assert found.metrics["clipped"][0].tolist() == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_psft_at_its_snapshot_is_sft(seed: int) -> None:
    batch = random_batch(seed)
    at_start = batch.replace(snapshot_logp=batch.logp.detach())
    assert torch.equal(gradient_of("psft", at_start), gradient_of("sft", batch))
    assert not torch.equal(gradient_of("psft", batch), gradient_of("sft", batch))


def test_psft_needs_two_updates_a_batch_to_differ_from_sft(make_policy: MakePolicy) -> None:
    batch = make_batch(make_policy(), DEMONSTRATIONS)
    runs = {
        (name, updates): trained(
            make_policy(), get_objective(name), batch, RAW.model_copy(update={"updates_per_batch": updates})
        )
        for name in ("sft", "psft")
        for updates in (1, 2)
    }
    assert distance(runs["sft", 1], runs["psft", 1]) < 1e-6
    first = [{n: values[:1] for n, values in runs[name, 2].items()} for name in ("sft", "psft")]
    assert distance(*first) < 1e-6 < 0.05 < distance(runs["sft", 2], runs["psft", 2])
    settings = RAW.model_copy(update={"updates_per_batch": 2})
    one, two = Trainer(make_policy(), get_objective("psft"), Fixed(batch), settings).run().steps
    assert one["ratio"] == pytest.approx(1, abs=1e-9) and one["clipped"] == 0 < two["clipped"]


# ASFT


def test_the_kl_of_asft_by_hand() -> None:
    # π_ref = (1/2, 1/2), π_θ = (1/4, 3/4): KL(π_ref ‖ π_θ) = ½ ln 2 + ½ ln(2/3) = ½ ln(4/3); the other way round it
    # would be ¼ ln ½ + ¾ ln(3/2). Its gradient in the logits is π_θ - π_ref = (-1/4, 1/4).
    logits = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log().requires_grad_()
    reference = torch.zeros(1, 2, dtype=torch.float64)
    term = get_objective("asft").logit_term(logits, reference, torch.tensor([0]))
    assert term is not None
    assert term.tolist() == pytest.approx([0.05 * 0.5 * math.log(4 / 3)])
    (gradient,) = torch.autograd.grad(term.sum(), logits)
    assert gradient[0].tolist() == pytest.approx([-0.05 / 4, 0.05 / 4])


@pytest.mark.parametrize("budget", [20, 4096])
def test_a_step_of_asft_is_that_of_its_loss_in_full_logits(
    budget: int, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Towards a reference that is another model, so that the KL pulls; and in chunks of three positions."""
    policy, reference, objective = make_policy(), make_policy(seed=1), get_objective("asft", kl_coefficient=0.7)
    batch = make_batch(policy, DEMONSTRATIONS)
    found: dict[str, list[Tensor]] = {}

    def keep(trainer: Trainer, step: int) -> None:
        found.update({n: [p.grad.clone()] for n, p in trainer.policy.named_parameters() if p.grad is not None})

    settings = RAW.model_copy(update={"steps": 1, "token_budget": budget})
    with monkeypatch.context() as patch:
        patch.setattr(head_module, "CHUNK_ENTRIES", 3 * len(policy.tokenizer))
        trainer = Trainer(make_policy(), objective, Fixed(batch), settings, [keep], reference=reference.frozen_copy())
        record = trainer.run()
    term = term_of(policy, objective, batch, reference)
    loss = surrogate(objective, full_batch(policy, objective, batch)) + term
    torch.autograd.backward(loss)
    assert distance({n: [p.grad] for n, p in policy.named_parameters() if p.grad is not None}, found) < 1e-9
    assert record.steps[0]["logit_term"] == pytest.approx(term.item(), rel=1e-9)
    assert record.steps[0]["loss"] == pytest.approx(loss.item(), rel=1e-9)
    plain = trained(make_policy(), get_objective("dft"), batch, settings)
    assert distance({n: values[:1] for n, values in plain.items()}, found) > 0.1


def test_asft_starts_as_dft_and_is_then_held_back(make_policy: MakePolicy) -> None:
    batch = make_batch(make_policy(), DEMONSTRATIONS)
    dft, weak, strong = (
        trained(make_policy(), objective, batch, RAW)
        for objective in (
            get_objective("dft"),
            get_objective("asft"),
            get_objective("asft", kl_coefficient=5.0),
        )
    )
    for run in (weak, strong):
        assert distance({n: v[:1] for n, v in dft.items()}, {n: v[:1] for n, v in run.items()}) < 1e-9
    second = [{n: v[1:2] for n, v in run.items()} for run in (dft, weak, strong)]
    assert 1e-6 < distance(second[0], second[1]) < distance(second[0], second[2])


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["all-linear", ["c_attn", "lm_head"]])
def test_with_an_adapter_the_reference_is_the_model_without_it(targets: Any, make_policy: MakePolicy) -> None:
    """The output layer's adapter too, which acts after the trunk."""
    plain, policy = make_policy(), make_policy()
    policy.add_lora(rank=2, target_modules=targets)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    rows, _ = make_batch(plain, DEMONSTRATIONS)
    sequences = Sequences.collate([r.prompt_ids for r in rows], [r.completion_ids for r in rows], CPU)
    seen: list[Tensor] = []

    def look(own: Tensor, other: Tensor | None, target: Tensor) -> None:
        assert other is not None and not torch.allclose(own, other)
        seen.append(other)

    policy(sequences, term=look, reference=policy.reference())
    expected = plain.head.logits(plain.hidden(sequences))
    torch.testing.assert_close(torch.cat(seen), expected, rtol=0, atol=1e-9)


def test_asft_trains_an_adapter(make_policy: MakePolicy) -> None:
    policy = make_policy()
    settings = Training.model_validate({**RAW.model_dump(), "steps": 3, "lora": {"rank": 2}})
    trainer = Trainer(policy, get_objective("asft"), Fixed(make_batch(policy, DEMONSTRATIONS)), settings)
    steps = trainer.run().steps
    assert steps[0]["logit_term"] == pytest.approx(0, abs=1e-12) and steps[2]["logit_term"] > 0


def test_a_reference_is_kept_for_those_that_ask_for_its_logits(make_policy: MakePolicy) -> None:
    batch = make_batch(make_policy(), DEMONSTRATIONS)
    kept = {
        name: Trainer(make_policy(), get_objective(name), Fixed(batch), RAW).models.initial is not None
        for name in ("asft", "otr", "power")
    }
    assert kept == {"asft": True, "otr": False, "power": False}


# PEAR


@pytest.mark.parametrize("variant", ["token", "block", "sequence"])
@pytest.mark.parametrize("seed", SEEDS)
def test_pear_of_the_policys_own_demonstrations_is_sft(variant: str, seed: int) -> None:
    batch = random_batch(seed)
    own = batch.replace(behaviour_logp=batch.logp.detach())
    ours = surrogate(get_objective("pear", variant=variant, gamma=1.0), own)
    torch.testing.assert_close(gradients(ours, own), gradient_of("sft", batch), rtol=1e-12, atol=0)
    assert not torch.allclose(gradient_of("pear", batch), gradient_of("sft", batch))


def test_pear_by_hand() -> None:
    # π/π_β = 2, 1, 1/2 at the three tokens, held between 1/2 and 2, γ = 1/2: what follows the first is 1 · 1/2, twice
    # discounted, (1/4)(1/2); the second is followed by 1/2, once discounted, 1/4; nothing follows the last: 1.
    batch = hand_batch([[0.8, 0.4, 0.2]])
    author = batch.logp.detach() - torch.tensor([[2.0, 1.0, 0.5]], dtype=torch.float64).log()
    batch = batch.replace(behaviour_logp=author).detach()
    bounds = {"log_ratio_min": -math.log(2), "log_ratio_max": math.log(2)}
    weights = get_objective("pear", gamma=0.5, **bounds).coefficients(batch).values
    assert weights[0].tolist() == pytest.approx([1 / 8, 1 / 4, 1])
    blocks = get_objective("pear", gamma=0.5, variant="block", block_size=2, **bounds).coefficients(batch).values
    assert blocks[0].tolist() == pytest.approx([1 / 4, 1 / 4, 1])  # the first two have the weight of the second
    whole = get_objective("pear", variant="sequence", **bounds).coefficients(batch).values
    assert whole[0].tolist() == pytest.approx([1, 1, 1])
    held = get_objective("pear").coefficients(batch).values  # the ratios are held between e^-0.08 and e^0.3
    assert held[0].tolist() == pytest.approx([0.999**2 * math.exp(-0.08), 0.999 * math.exp(-0.08), 1])
    for wrong in ({"gamma": 0.0}, {"log_ratio_min": 1.0}, {"block_size": 0}):
        with pytest.raises(UserError, match="pear needs"):
            get_objective("pear", **wrong)


@pytest.mark.parametrize("seed", SEEDS)
def test_pear_in_blocks_lies_between_token_and_none(seed: int) -> None:
    batch = random_batch(seed)
    of_token, of_one = (get_objective("pear", **options) for options in ({}, {"variant": "block", "block_size": 1}))
    assert torch.equal(*(one.coefficients(batch.detach()).values[batch.mask] for one in (of_token, of_one)))
    whole = get_objective("pear", variant="block", block_size=batch.mask.shape[1])  # nothing follows the only block
    assert torch.equal(whole.coefficients(batch.detach()).values[batch.mask], torch.ones_like(batch.logp[batch.mask]))


@pytest.mark.slow
def test_pear_takes_the_authors_log_probs_from_the_rows_or_from_a_model() -> None:
    policy, settings = load_policy("embedded"), RAW.model_copy(update={"steps": 2})
    problems = load_problems(ProblemSource(source="world:arithmetic/train", limit=8))
    plain = OfflineBuffer.from_trajectories(each_demonstration(policy.tokenizer, problems, None, BadRows()))
    with pytest.raises(UserError, match="has no log-probs of its author"):
        train(policy, get_objective("pear"), plain, settings)
    rows = [plain[i] for i in range(len(plain))]
    logps = log_probs(policy, [(row.prompt_ids, row.completion_ids) for row in rows])
    known = [replace(row, behaviour_logp=logp) for row, logp in zip(rows, logps, strict=True)]
    buffers = {"rows": (OfflineBuffer.from_trajectories(known), None), "model": (plain, "embedded")}
    steps = {}
    for name, (buffer, model) in buffers.items():
        objective = get_objective("pear", demonstrator=model, gamma=1.0)
        steps[name] = train(load_policy("embedded"), objective, buffer, settings).steps
    (own, *_) = train(load_policy("embedded"), get_objective("sft"), plain, settings).steps
    for found in steps.values():
        assert found[0]["weight"] == pytest.approx(1, abs=1e-5) != found[1]["weight"]
        assert found[0]["gradient_norm"] == pytest.approx(own["gradient_norm"], rel=1e-4)
    assert steps["rows"][1]["loss"] == pytest.approx(steps["model"][1]["loss"], rel=1e-4)


# LUFFY


def test_luffy_by_hand() -> None:
    # One prompt: two samples of rewards 1 and 0 and a demonstration without a reward, which counts as 1. The mean is
    # 2/3, A = 1/3, -2/3, 1/3. The samples have ρ = 1 and 2: c = A and 2A. The demonstration has μ = 1 and p = 0.3:
    # γp/(p + γ)² = 0.03/0.16 for γ = 0.1, its gain A 0.3/0.4.
    batch = hand_batch([[0.5], [0.4], [0.3]], group=torch.zeros(3, dtype=torch.long)).replace(
        behaviour_logp=torch.tensor([[0.5], [0.2], [1.0]], dtype=torch.float64).log(),
        outcome=torch.tensor([1.0, 0.0, 1.0]),
        from_demonstration=torch.tensor([False, False, True]),
    )
    objective = get_objective("luffy")
    found = objective.coefficients(objective.prepare(batch.detach()))
    assert found.values[:, 0].tolist() == pytest.approx([1 / 3, -4 / 3, 0.03 / 0.16 / 3])
    assert found.loss is not None
    assert found.loss[:, 0].tolist() == pytest.approx([-1 / 3, 4 / 3, -0.25])
    assert found.metrics["demonstrations"][:, 0].tolist() == [0, 0, 1]
    for wrong in ({"gamma": 0.0}, {"demonstrations": 0}):
        with pytest.raises(UserError, match="luffy needs gamma > 0 and at least 1 demonstration"):
            get_objective("luffy", **wrong)


def test_luffy_gives_a_demonstration_more_the_less_likely_it_is() -> None:
    """Relative to the plain importance weight p, by γ/(p + γ)²; where γ is large it is that weight over γ."""
    p = torch.tensor([[0.01, 0.1, 0.5, 0.9]], dtype=torch.float64)

    def values(gamma: float) -> Tensor:
        batch = TokenBatch(p.log(), p > 0, advantage=torch.ones_like(p), behaviour_logp=torch.zeros_like(p))
        batch = batch.replace(from_demonstration=torch.tensor([True]), outcome=torch.ones(1))
        return get_objective("luffy", gamma=gamma).coefficients(batch).values

    assert ((values(0.1) / p).diff() < 0).all()
    torch.testing.assert_close(values(1e6) * 1e6, p, rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_luffy_without_demonstrations_is_dr_grpo_per_token(seed: int) -> None:
    batch = random_batch(seed)
    batch = batch.replace(from_demonstration=torch.zeros(len(batch.mask), dtype=torch.bool), outcome=batch.reward)
    luffy, dr_grpo = get_objective("luffy", clip=0.2), get_objective("dr-grpo", max_length=1)
    ours, theirs = (one.coefficients(one.prepare(batch.detach())).values[batch.mask] for one in (luffy, dr_grpo))
    assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_luffy_learns_from_demonstrations_where_every_sample_fails() -> None:
    """Online, the worked solutions of the problems join their groups; GRPO has nothing to learn from there."""

    def never(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    settings = RAW.model_copy(update={"steps": 1, "batch_size": 4})
    for name, learns in (("luffy", True), ("grpo", False)):
        policy = load_policy("embedded", "float64")
        problems = load_problems(ProblemSource(source="world:arithmetic/train", limit=2))
        sampling = Sampling(samples=2, max_new_tokens=4)
        collector = Collector(policy, TransformersSampler(policy), problems, never, sampling, settings)
        options: dict[str, Any] = {} if learns else {"kl_coefficient": 0.0}
        (step,) = train(policy, get_objective(name, **options), collector, settings).steps
        assert (step["gradient_norm"] > 0) == learns
        assert 0.3 < step["demonstrations"] < 1 if learns else "demonstrations" not in step


def test_luffy_learns_from_a_fixed_buffer(make_policy: MakePolicy) -> None:
    rows, _ = make_batch(make_policy(), Selection.GROUPS)
    experts = [
        replace(row, source="demonstration", reward=None, behaviour_logp=None, reference_logp=None) for row in rows[::2]
    ]
    policy = make_policy()
    (step,) = train(
        policy,
        get_objective("luffy"),
        OfflineBuffer.from_trajectories([*rows, *experts]),
        RAW.model_copy(update={"steps": 1, "batch_size": 12}),
    ).steps
    tokens = [sum(len(row.completion_ids) for row in some) for some in (rows, experts)]
    assert step["demonstrations"] == pytest.approx(tokens[1] / sum(tokens)) and step["gradient_norm"] > 0
    with pytest.raises(UserError, match="no demonstrations of the prompts"):
        train(make_policy(), get_objective("luffy"), OfflineBuffer.from_trajectories(rows), RAW)


# GIFT


@pytest.mark.parametrize("beta", [0.5, 3.0, 20.0])
def test_gift_starts_as_sft_with_a_saturating_weight(beta: float) -> None:
    """At π_θ = π_ref its gradient in the logits is p/(p + 1/(e^β - 1)) times that of SFT, π - e_y."""
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(6, 7, dtype=torch.float64, generator=draw)).requires_grad_()
    target = torch.arange(6)
    term = get_objective("gift", beta=beta).logit_term(logits, logits.detach(), target)
    assert term is not None
    (found,) = torch.autograd.grad(term.sum(), logits)
    probabilities = logits.detach().softmax(1)
    p = probabilities.gather(1, target[:, None])
    sft = probabilities - torch.eye(7, dtype=torch.float64)[target]
    torch.testing.assert_close(found, p / (p + 1 / math.expm1(beta)) * sft, rtol=1e-9, atol=1e-12)


def test_gift_without_a_tilt_stays_at_the_reference_and_with_a_strong_one_is_sft() -> None:
    draw = torch.Generator().manual_seed(1)
    policy, reference = (torch.randn(4, 5, dtype=torch.float64, generator=draw) for _ in range(2))
    policy.requires_grad_()
    target = torch.tensor([0, 1, 2, 3])
    for beta, wanted in ((0.0, reference.softmax(1)), (700.0, torch.eye(5, dtype=torch.float64)[target])):
        term = get_objective("gift", beta=beta).logit_term(policy, reference, target)
        assert term is not None
        (found,) = torch.autograd.grad(term.sum(), policy)
        torch.testing.assert_close(found, policy.detach().softmax(1) - wanted)
    with pytest.raises(UserError, match="gift needs a finite beta of 0 or more"):
        get_objective("gift", beta=math.inf)


# One-token rollout


def test_one_token_rollout_is_dft_in_expectation_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    # π = (1/2, 1/4, 1/8, 1/8) and the draws 0 0 0 0 1 1 2 3 have just these shares, so the mean over them is the
    # expectation: (1-β) times DFT's gradient in the logits, c (e_y - π) with c = p_y, of the loss -c log π_y.
    shares = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 3]])
    monkeypatch.setattr(torch, "multinomial", lambda p, *_, **__: shares.expand(len(p), -1))
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    for y in range(4):
        logits = p.log()[None].clone().requires_grad_()
        term = get_objective("otr", samples=8, temperature=1.0, beta=-0.1).logit_term(logits, None, torch.tensor([y]))
        assert term is not None
        (gradient,) = torch.autograd.grad(term.sum(), logits)
        dft = -p[y] * (torch.eye(4, dtype=torch.float64)[y] - p)
        torch.testing.assert_close(gradient[0], 1.1 * dft, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("temperature", "beta"), [(1.0, -0.1), (1.0, -0.7), (1.3, -0.1)])
def test_sampled_one_token_rollout_has_its_expectation(temperature: float, beta: float) -> None:
    """Each entry's mean over n draws within 5 standard errors of the closed form; at T = 1 that is (1-β) DFT's."""
    n, positions = 20_000, 6
    torch.manual_seed(0)
    logits = torch.randn(positions, 5, dtype=torch.float64).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    objective = get_objective("otr", samples=n, temperature=temperature, beta=beta)
    term = objective.logit_term(logits, None, target)
    assert term is not None
    (found,) = torch.autograd.grad(term.sum(), logits)
    q, p = (logits.detach() / temperature).softmax(1), logits.detach().softmax(1)
    eye = torch.eye(5, dtype=torch.float64)
    reward = beta + (1 - beta) * eye[target]
    score = eye[None] - p[:, None]  # ∇ log π_v in the logits: position, v, entry
    single = -reward[:, :, None] * score
    mean = (q[:, :, None] * single).sum(1)
    deviation = ((q[:, :, None] * single.square()).sum(1) - mean.square()).clamp(min=0).sqrt()
    assert ((found - mean).abs() <= 5 * deviation / math.sqrt(n)).all()
    dft = -p.gather(1, target[:, None]) * (eye[target] - p)
    assert torch.allclose(mean, (1 - beta) * dft) == (temperature == 1)


class Drawing:
    """Stands in for torch.multinomial, and keeps what it drew."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plain, self.drawn = torch.multinomial, list[Tensor]()
        monkeypatch.setattr(torch, "multinomial", self)

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        self.drawn.append(self.plain(*arguments, **options))
        return self.drawn[-1]


def test_recomputation_draws_the_same_tokens(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, objective = make_policy(), get_objective("otr", samples=4)
    rows, _ = make_batch(policy, DEMONSTRATIONS)
    sequences = Sequences.collate([r.prompt_ids for r in rows], [r.completion_ids for r in rows], CPU)
    monkeypatch.setattr(head_module, "CHUNK_ENTRIES", 3 * len(policy.tokenizer))
    drawing = Drawing(monkeypatch)
    torch.manual_seed(5)
    term = policy(sequences, term=objective.logit_term).term
    forward, state = list(drawing.drawn), torch.get_rng_state()
    assert len(forward) == -(-len(sequences.targets) // 3) > 3
    term.sum().backward()
    again = drawing.drawn[len(forward) :]
    assert len(again) == len(forward)
    order = sorted(range(len(again)), key=lambda i: -i)  # the last chunk is made again first
    assert all(torch.equal(forward[order[i]], drawn) for i, drawn in enumerate(again))
    assert torch.equal(torch.get_rng_state(), state)  # and what is drawn next does not change
    found = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}

    policy.zero_grad(set_to_none=True)  # the loss of the very tokens that were drawn, with no chunks
    logp = policy.head.logits(policy.hidden(sequences)).log_softmax(1)
    drawn = torch.cat(forward)
    reward = torch.where(drawn == sequences.targets[:, None], 1.0, -0.1).double()
    torch.autograd.backward(-(reward * logp.gather(1, drawn)).sum() / 4)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-9)


class Widest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most rows of any tensor of vocabulary width that is made while it is active."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary, self.hidden, self.rows = vocabulary, hidden, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor) and x.ndim > 1 and x.shape[-1] == self.vocabulary:
                rows = x.numel() // self.vocabulary
                self.rows = max(self.rows, 0 if rows == self.hidden else rows)  # the transposed weight
        return out


@pytest.mark.parametrize("name", ["asft", "gift", "otr"])
def test_terms_run_in_chunks(name: str, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, objective = make_policy(), get_objective(name)
    rows, _ = make_batch(policy, DEMONSTRATIONS)
    sequences = Sequences.collate([r.prompt_ids for r in rows], [r.completion_ids for r in rows], CPU)
    monkeypatch.setattr(head_module, "CHUNK_ENTRIES", 3 * len(policy.tokenizer))
    with Widest(len(policy.tokenizer), 16) as seen:
        policy(sequences, term=objective.logit_term, reference=policy.frozen_copy()).term.sum().backward()
    assert seen.rows == 3 < len(sequences.targets)


@pytest.mark.slow
def test_one_token_rollout_learns_what_it_draws(make_policy: MakePolicy) -> None:
    """From a policy that SFT has brought near the demonstrations: one that never draws their tokens learns nothing."""
    policy = make_policy()
    batch = make_batch(policy, DEMONSTRATIONS)
    settings = RAW.model_copy(update={"steps": 15, "learning_rate": 1e-2, "token_budget": 40})
    Trainer(policy, get_objective("sft"), Fixed(batch), settings).run()
    torch.manual_seed(0)
    steps = Trainer(policy, get_objective("otr"), Fixed(batch), settings).run().steps
    assert steps[-1]["logp"] > steps[0]["logp"] + 0.3
    assert steps[0]["loss"] == pytest.approx(steps[0]["logit_term"]) and steps[0]["coefficient"] == 0


# Sampling by quality


def demonstrations(*rewards: float | None) -> OfflineBuffer:
    """One demonstration a reward; its completion says which."""
    rows = [Trajectory("", str(i), [5], [6 + i, 2], str(i), reward=reward) for i, reward in enumerate(rewards)]
    return OfflineBuffer.from_trajectories(rows)


def drawn(source: BufferSource, batches: int) -> list[str]:
    return [row.completion for _ in range(batches) for row in source.draw()[0]]


@pytest.mark.slow
def test_rows_are_drawn_in_proportion_to_their_quality() -> None:
    buffer = demonstrations(1.0, 0.0, 3.0, 0.5)
    view = buffer.view(DEMONSTRATIONS, **get_objective("sft-q").view_options)
    assert view.units == ((0,), (1,), (2,), (3,)) and view.weights == (1.0, 0.0, 3.0, 0.5)
    count = Counter(drawn(BufferSource(buffer, view, 4, seed=0), 2250))
    # of 9000 draws 2000, 0, 6000 and 1000 are expected; within 5 standard deviations of the binomial
    for name, expected in (("0", 2000), ("2", 6000), ("3", 1000)):
        assert abs(count[name] - expected) < 5 * math.sqrt(expected * (1 - expected / 9000))
    assert count["1"] == 0
    assert buffer.view(DEMONSTRATIONS).weights is None


@pytest.mark.slow
def test_a_source_that_draws_by_quality_goes_on_bit_for_bit() -> None:
    buffer = demonstrations(1.0, 0.25, 3.0, 0.5, 2.0)
    view = buffer.view(DEMONSTRATIONS, weighted=True)

    def source() -> BufferSource:
        return BufferSource(buffer, view, 2, seed=3)

    whole = drawn(source(), 40)
    assert drawn(source(), 40) == whole
    for stop in (1, 2, 5, 7):  # the last of them where an epoch of five ends, or in its midst
        before, after = source(), source()
        first = drawn(before, stop)
        after.restore(json.loads(json.dumps(before.state())))
        assert first + drawn(after, 40 - stop) == whole
    assert whole != drawn(BufferSource(buffer, view, 2, seed=4), 40)


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ((1.0, None, None), r"2 of 3 rows to draw by quality have no finite quality score: give .* \(row 1\)"),
        ((1.0, math.inf), r"row 2 of the data set: reward is inf"),
        ((1.0, 2.0, -0.5), r"1 of 3 rows .* have a negative quality score: .* \(row 2\)"),
        ((0.0, 0.0), r"all 2 rows .* have a quality of 0"),
    ],
)
def test_rows_that_cannot_be_drawn_by_quality(
    rewards: tuple[float | None, ...], reason: str, make_policy: MakePolicy
) -> None:
    with pytest.raises(UserError, match=reason) as error:
        train(make_policy(), get_objective("sft-q"), demonstrations(*rewards), RAW)
    assert "\n" not in str(error.value)


def test_views_of_more_than_single_rows_have_no_weights() -> None:
    with pytest.raises(UserError, match="unknown option of the view 'groups' 'weighted'"):
        demonstrations(1.0).view(Selection.GROUPS, weighted=True)
    with pytest.raises(UserError, match="'weigthed': did you mean 'weighted'"):
        demonstrations(1.0).view(DEMONSTRATIONS, weigthed=True)


@pytest.mark.slow
def test_training_by_quality_learns_what_is_good(make_policy: MakePolicy) -> None:
    """Two answers to one prompt, of quality 3 and 1: the likelihood is greatest at 3/4 and 1/4."""
    rows = [Trajectory("", "", [5], [6 + i], "0", reward=reward) for i, reward in enumerate((3.0, 1.0))]
    policy = make_policy()
    settings = RAW.model_copy(update={"steps": 60, "batch_size": 64})
    train(policy, get_objective("sft-q"), OfflineBuffer.from_trajectories(rows), settings, seed=1)
    p = policy(Sequences.collate([[5], [5]], [[6], [7]], CPU)).logp.detach().exp()[:, 0]
    assert p.tolist() == pytest.approx([0.75, 0.25], abs=0.08)


# The analyzer and the commands


def test_the_analyzer_draws_by_quality_too() -> None:
    buffer = demonstrations(*([1.0] * 10 + [0.0] * 10 + [9.0] * 10))
    named: dict[str, Objective] = {name: get_objective(name) for name in ("sft", "sft-q")}
    rows, subjects, skipped = subjects_of(named, buffer, 1000, 0, None)
    assert not skipped and len(subjects["sft"].units) == len(subjects["sft-q"].units) == 30
    assert sorted(rows[i] for i in subjects["sft"].rows) == list(range(30))
    by_quality = Counter(rows[i] for i in subjects["sft-q"].rows)
    assert len(set(subjects["sft-q"].rows)) == 30  # what is drawn twice is two rows
    assert max(by_quality.values()) > 1 and not set(by_quality) & set(range(10, 20))
    assert sum(by_quality[i] for i in range(20, 30)) > 20


@pytest.mark.slow
def test_a_unit_drawn_twice_counts_twice(make_policy: MakePolicy) -> None:
    """tr Σ over the drawn rows is that of a buffer that holds each of them as often."""
    policy = make_policy("llama")
    rows = [Trajectory("", "", [5, 6 + i], [7 + i, 9, 2], str(i), reward=float(i % 3)) for i in range(12)]
    buffer = OfflineBuffer.from_trajectories(rows)
    picked, subjects, _ = subjects_of({"sft-q": get_objective("sft-q")}, buffer, 100, 4, None)
    twice = OfflineBuffer.from_trajectories([rows[picked[i]] for i in subjects["sft-q"].rows])
    own = analyze_variance(policy, ["sft-q"], buffer, rows=100, draws=0, seed=4)["objectives"]["sft-q"]["data_noise"]
    other = analyze_variance(policy, ["sft"], twice, rows=100, draws=0)["objectives"]["sft"]["data_noise"]
    assert len(set(subjects["sft-q"].rows)) > len({picked[i] for i in subjects["sft-q"].rows})
    for key in ("trace_cov", "grad_norm_sq"):
        assert own[key]["value"] == pytest.approx(other[key]["value"], rel=1e-5)


NEW: tuple[str, ...] = ("power", "asft", "psft", "eaft", "deft", "floor-dft", "otr", "sft-q")
NEW += ("trsft", "infosft", "idft", "gift", "memft", "profit", "chord")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Demonstrations with a quality score, as a file of rlzoo's own rows."""
    monkeypatch.chdir(tmp_path)
    buffer = OfflineBuffer.from_trajectories(
        [Trajectory("", "", [5, 6 + i], [7 + i, 9, 2], str(i), reward=float(1 + i % 3)) for i in range(12)]
    )
    buffer.save(tmp_path / "buffer")
    return tmp_path / "buffer"


@pytest.mark.parametrize("name", NEW)
def test_the_command_trains_each(name: str, table: Path, tmp_path: Path) -> None:
    arguments = ["train", name, "--buffer", str(table), "--steps", "2", "--set", "batch_size=6", "--out", "trained"]
    if name == "profit":  # the base finds all of these random tokens less likely than its threshold
        arguments += ["--option", "threshold=0.0001"]
    assert main(arguments) == 0
    steps = json.loads((tmp_path / "trained" / "training.json").read_text())["steps"]
    assert all(math.isfinite(value) for row in steps for value in row.values()) and steps[0]["gradient_norm"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_comparison_of_them(tmp_path: Path) -> None:
    names: Sequence[str] = [name for name in NEW if name != "sft-q"]
    results = compare(small({name: {} for name in names}, training__updates_per_batch=2), tmp_path / "out")
    assert {cell["algorithm"] for cell in results["cells"]} == set(names) and not results["failed"]


@pytest.mark.slow
def test_the_analyzer_reads_each(make_policy: MakePolicy, table: Path) -> None:
    policy, buffer = make_policy("llama"), OfflineBuffer.load(table)
    found = analyze_variance(policy, ["sft", "dft", *NEW], buffer, rows=12, draws=256)
    json.dumps(found, allow_nan=False)
    assert found["skipped"] == {} and set(found["objectives"]) == {"sft", "dft", *NEW}
    noise = {name: entry["data_noise"] for name, entry in found["objectives"].items()}
    assert noise["psft"]["cosine_to_sft"]["value"] == pytest.approx(1)  # at its snapshot it is SFT
    own, plain = (found["objectives"][name]["layers"] for name in ("asft", "dft"))  # and at its reference ASFT is DFT
    for layer, entry in own.items():
        assert entry["trace_cov"]["value"] == pytest.approx(plain[layer]["trace_cov"]["value"], rel=1e-4)
    assert noise["otr"]["cosine_to_sft"]["value"] > 0.5
    assert "full-vocabulary term" in found["objectives"]["otr"]["token_moments"]["reason"]


def test_otr_leaves_it_to_the_trainer_to_tell_of_a_nan() -> None:
    term = get_objective("otr", samples=4).logit_term(torch.full((2, 5), math.nan), None, torch.tensor([0, 1]))
    assert term is not None and term.isnan().all()
    for wrong in ({"samples": 0}, {"temperature": 0.0}):
        with pytest.raises(UserError, match="otr needs samples ≥ 1 and temperature > 0"):
            get_objective("otr", **wrong)


def test_the_analyzer_draws_by_quality_from_other_rows_too() -> None:
    asked = {"sft-q": Selection.CORRECT}
    assert view_of("sft-q", get_objective("sft-q"), asked) == (Selection.CORRECT, {"weighted": True})
