"""The contract that every registered objective keeps, and the traps that each of them must not fall into."""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import pytest
import torch
from canonical import CANONICAL, CANONICAL_IN_LOGITS, Case, LogitsCase
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlzoo.objective import (
    Normaliser,
    Objective,
    get_objective,
    is_composite,
    list_objectives,
    objective_class,
    reduce,
    surrogate,
    surrogate_of,
)
from rlzoo.types import Coefficients, TokenBatch

CASES = [pytest.param(name, case, id=f"{name}[{case}]") for name in CANONICAL for case in CANONICAL[name]]
SEEDS = range(4)
over_cases = pytest.mark.parametrize(("name", "case"), CASES)
IN_LOGITS = [
    pytest.param(name, case, id=f"{name}[{case}]") for name, cases in CANONICAL_IN_LOGITS.items() for case in cases
]
over_cases_in_logits = pytest.mark.parametrize(("name", "case"), IN_LOGITS)
# a mixture has no coefficients and no denominator: they are those of its parts
over_single_cases = pytest.mark.parametrize(
    ("name", "case"), [case for case in CASES if not is_composite(objective_class(str(case.values[0])))]
)

GROUP_SIZES = (4, 4, 3, 2, 1)
FLAT_GROUP = slice(4, 8)
SINGLE_TOKEN, EMPTY = (1, 6, 9), (3, 7)
ROWS, LENGTH = sum(GROUP_SIZES), 11
PADDING = (float("nan"), float("inf"), -float("inf"), 1e9, 0.0)


def random_batch(seed: int, padding: tuple[float, ...] = PADDING) -> TokenBatch:
    """Fourteen rows with all that any objective asks for, in float64, and rubbish at masked positions.

    Among them: a group of equal rewards, a group of one, rows of one token or none. Pairs are consecutive.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(ROWS, LENGTH, dtype=torch.float64, generator=draw)

    length = torch.randint(2, LENGTH + 1, (ROWS,), generator=draw)
    length[list(SINGLE_TOKEN)], length[list(EMPTY)] = 1, 0
    mask = torch.arange(LENGTH) < length[:, None]
    rubbish = torch.tensor(padding, dtype=torch.float64).repeat(ROWS * LENGTH)[: ROWS * LENGTH]

    def padded(values: Tensor) -> Tensor:
        return torch.where(mask, values, rubbish.view(ROWS, LENGTH))

    logp, old_value = -normal().abs() - 0.01, normal(0.3)
    reward = torch.rand(ROWS, dtype=torch.float64, generator=draw).round(decimals=1)
    reward[FLAT_GROUP] = 1.0
    first = torch.arange(0, ROWS, 2)
    better = first + torch.randint(0, 2, (ROWS // 2,), generator=draw)
    batch = TokenBatch(
        logp=padded(logp).requires_grad_(),
        mask=mask,
        behaviour_logp=padded(logp + normal(0.4)),
        reference_logp=padded(logp + normal()),
        snapshot_logp=padded(logp + normal(0.2)),
        value=padded(old_value + normal(0.3)).requires_grad_(),
        old_value=padded(old_value),
        reward=reward,
        group=torch.arange(len(GROUP_SIZES)).repeat_interleave(torch.tensor(GROUP_SIZES)),
        partner=torch.arange(ROWS).view(-1, 2).flip(1).flatten(),
        chosen=torch.zeros(ROWS, dtype=torch.bool).index_fill(0, better, True),
        truncated=torch.arange(ROWS) % 3 == 0,
        mismatched=torch.randn((), dtype=torch.float64, generator=draw).expand(ROWS),
    )
    assert batch.snapshot_logp is not None
    p, share = batch.snapshot_logp.exp(), torch.rand(ROWS, LENGTH, dtype=torch.float64, generator=draw)
    statistics = {  # each within its bounds, of which one is the token's own probability
        "entropy": math.log(64) * share,
        "top_entropy": math.log(20) * share,
        "square_mass": p.square() + share * (1 - p).square(),
    }
    return batch.replace(statistics={name: padded(value) for name, value in statistics.items()})


def prepared(objective: Objective, batch: TokenBatch) -> TokenBatch:
    with torch.no_grad():
        return objective.prepare(batch)


def gradients(loss: Tensor, batch: TokenBatch) -> Tensor:
    """The gradient over log-probs and values, as one vector; 0 where the loss does not look."""
    leaves = [leaf for leaf in (batch.logp, batch.get("value")) if leaf is not None]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    return torch.cat([(torch.zeros_like(leaf) if g is None else g).flatten() for leaf, g in pairs])


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    """Equal up to ``tolerance`` relative to the norm of ``theirs``, which must not be 0."""
    assert theirs.norm() > 0
    assert torch.isfinite(ours).all()
    assert float((ours - theirs).norm() / theirs.norm()) <= tolerance


def hand_batch(probabilities: list[list[float]], **columns: Any) -> TokenBatch:
    """A batch from token probabilities; rows are padded to the longest with 0, which is masked."""
    width = max(map(len, probabilities))
    table = torch.tensor([row + [0.0] * (width - len(row)) for row in probabilities], dtype=torch.float64)
    return TokenBatch(logp=table.log().requires_grad_(), mask=table > 0, **columns)


# The contract


def test_every_objective_has_a_canonical_loss_for_every_closed_option() -> None:
    assert set(CANONICAL) | set(CANONICAL_IN_LOGITS) == set(list_objectives())
    for name in list_objectives():
        found = objective_class(name)
        cases: list[Case | LogitsCase] = [*CANONICAL.get(name, []), *CANONICAL_IN_LOGITS.get(name, [])]
        assert (name in CANONICAL_IN_LOGITS) == (found.logit_term is not Objective.logit_term)
        hints = typing.get_type_hints(found)
        for option in set(fields(found)) - set(fields(Objective)):
            if typing.get_origin(hints[option.name]) is Literal:
                covered = {case.options.get(option.name, option.default) for case in cases}
                assert covered == set(typing.get_args(hints[option.name])), f"{name}.{option.name}"


@over_cases
@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_is_the_canonical_one(name: str, case: Case, seed: int) -> None:
    objective, batch = get_objective(name, **case.options), random_batch(seed)
    ours = gradients(surrogate(objective, prepared(objective, batch)), batch)
    assert_same(ours, gradients(case.loss(batch), batch))


@over_single_cases
@pytest.mark.parametrize("seed", SEEDS)
def test_the_reported_loss_is_the_canonical_one(name: str, case: Case, seed: int) -> None:
    objective, batch = get_objective(name, **case.options), random_batch(seed).replace(value=None)
    ready = prepared(objective, batch)
    reported = objective.coefficients(ready.detach()).loss
    if reported is None:
        ours = surrogate(objective, ready)
    else:
        ours = reduce(reported, ready, objective.normaliser, objective.normaliser.denominator(ready))
    torch.testing.assert_close(ours, case.loss(batch), rtol=1e-10, atol=1e-12)


@over_cases
def test_an_unprepared_batch_is_prepared_on_the_way(name: str, case: Case) -> None:
    objective, batch = get_objective(name, **case.options), random_batch(0)
    ours = gradients(surrogate(objective, batch), batch)
    assert_same(ours, gradients(surrogate(objective, prepared(objective, batch)), batch))


@over_cases
def test_what_stands_at_masked_positions_does_not_matter(name: str, case: Case) -> None:
    objective = get_objective(name, **case.options)
    clean, *dirty = (random_batch(0, padding) for padding in ((0.0,), (math.nan,), (math.inf,), (-1e9,)))
    loss = surrogate(objective, prepared(objective, clean))
    for batch in dirty:
        other = surrogate(objective, prepared(objective, batch))
        assert torch.equal(other, loss)
        gradient = gradients(other, batch)
        assert torch.equal(gradient, gradients(surrogate(objective, prepared(objective, clean)), clean))
        assert (gradient.view(2, ROWS, LENGTH)[:, ~batch.mask] == 0).all()


@over_single_cases
def test_coefficients_carry_no_graph(name: str, case: Case) -> None:
    objective, batch = get_objective(name, **case.options), random_batch(0)
    inputs = {
        f: getattr(batch, f).clone().requires_grad_()
        for f in ("behaviour_logp", "reference_logp", "snapshot_logp", "old_value", "reward", "mismatched")
    }
    ready = prepared(objective, replace(batch, **inputs))
    found = objective.coefficients(ready)
    tensors = [found.values, *found.metrics.values(), *([] if found.loss is None else [found.loss])]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert found.values.shape == batch.logp.shape
    leaves = list(inputs.values())
    through = torch.autograd.grad(surrogate(objective, ready.replace(value=None)), leaves, allow_unused=True)
    assert all(gradient is None for gradient in through)


@over_single_cases
@pytest.mark.parametrize("rows", [2, 4, 10])
def test_the_gradient_does_not_depend_on_the_micro_batches(name: str, case: Case, rows: int) -> None:
    objective, batch = get_objective(name, **case.options), random_batch(1)
    ready = prepared(objective, batch)
    whole, denominator = surrogate(objective, ready), objective.normaliser.denominator(ready)
    pairs = torch.arange(ROWS).view(-1, 2)[torch.randperm(ROWS // 2, generator=torch.manual_seed(0))]
    indices = torch.split(pairs.flatten(), rows)
    parts = [ready.rows(index, max(int(ready.mask[index].sum(1).max()), 1)) for index in indices]
    assert sum(objective.normaliser.denominator(part) for part in parts) == denominator
    coefficients = objective.coefficients(ready.detach()).values if objective.is_coupled else None
    losses = []
    for index, part in zip(indices, parts, strict=True):
        if coefficients is None:
            losses.append(surrogate(objective, part, denominator))
        else:  # they look at the whole batch, and are known before the first backward
            own = Coefficients(coefficients[index, : part.mask.shape[1]])
            losses.append(surrogate_of(own, objective, part, denominator))
    summed = torch.stack(losses).sum()
    torch.testing.assert_close(summed, whole, rtol=1e-12, atol=1e-12)
    assert_same(gradients(summed, batch), gradients(whole, batch), 1e-12)


@over_cases
def test_the_order_of_rows_does_not_matter(name: str, case: Case) -> None:
    objective, batch = get_objective(name, **case.options), random_batch(2)
    shuffled = batch.rows(torch.randperm(ROWS, generator=torch.manual_seed(0)), LENGTH)
    loss = surrogate(objective, prepared(objective, batch))
    other = surrogate(objective, prepared(objective, shuffled))
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=1e-12)
    assert_same(gradients(other, batch), gradients(loss, batch), 1e-12)


def wider(batch: TokenBatch, extra: int) -> TokenBatch:
    """The same batch with so many more masked positions, full of rubbish, at its end."""

    def widen(value: Tensor) -> Tensor:
        filler = value.new_zeros(ROWS, extra) if value.dtype == torch.bool else value.new_full((ROWS, extra), math.nan)
        return torch.cat([value, filler], dim=1)

    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    tables: dict[str, Any] = {k: widen(v) for k, v in found.items() if isinstance(v, Tensor) and v.ndim == 2}
    return batch.replace(**tables, statistics={k: widen(v) for k, v in batch.inputs.items()})


@over_single_cases
@given(
    seed=st.integers(0, 2**31),
    order=st.permutations(range(ROWS // 2)),
    extra=st.integers(0, 3),
    pairs=st.integers(1, 7),
)
@settings(max_examples=10, deadline=None, derandomize=True)
def test_rows_may_be_shuffled_padded_and_split(
    name: str, case: Case, seed: int, order: list[int], extra: int, pairs: int
) -> None:
    objective, batch = get_objective(name, **case.options), random_batch(seed)
    loss = surrogate(objective, prepared(objective, batch))
    places = torch.arange(ROWS).view(-1, 2)[torch.tensor(order)].flatten()
    ready = prepared(objective, wider(batch, extra).rows(places, LENGTH + extra))
    denominator = objective.normaliser.denominator(ready)
    coefficients = objective.coefficients(ready.detach()).values if objective.is_coupled else None
    total = torch.zeros((), dtype=torch.float64)
    for index in torch.split(torch.arange(ROWS), 2 * pairs):
        part = ready.rows(index, LENGTH + extra)
        if coefficients is None:
            total = total + surrogate(objective, part, denominator)
        else:
            total = total + surrogate_of(Coefficients(coefficients[index]), objective, part, denominator)
    torch.testing.assert_close(total, loss, rtol=1e-11, atol=1e-11)
    assert_same(gradients(total, batch), gradients(loss, batch), 1e-11)


@over_cases
def test_an_all_masked_batch_gives_zero_and_a_warning(name: str, case: Case) -> None:
    objective = get_objective(name, **case.options)
    batch = replace(random_batch(0), mask=torch.zeros(ROWS, LENGTH, dtype=torch.bool))
    with pytest.warns(UserWarning, match="every token of the batch is masked"):
        loss = surrogate(objective, prepared(objective, batch))
    assert loss.item() == 0
    assert (gradients(loss, batch) == 0).all()


@over_cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_close(name: str, case: Case, dtype: torch.dtype, tolerance: float) -> None:
    objective = get_objective(name, **case.options)
    low = cast(random_batch(0), dtype)
    high = cast(low, torch.float64)  # the same rounded numbers
    loss = surrogate(objective, prepared(objective, low))
    assert loss.dtype == dtype
    exact = gradients(surrogate(objective, prepared(objective, high)), high)
    assert_same(gradients(loss, low).double(), exact, tolerance)


def cast(batch: TokenBatch, dtype: torch.dtype) -> TokenBatch:
    """The batch with all its floating-point columns rounded to ``dtype``, as fresh leaves."""
    columns = {f.name: getattr(batch, f.name) for f in fields(batch)}
    rounded: dict[str, Any] = {
        n: v.detach().to(dtype).requires_grad_(v.requires_grad)
        for n, v in columns.items()
        if isinstance(v, Tensor) and v.is_floating_point()
    }
    return batch.replace(**rounded, statistics={k: v.to(dtype) for k, v in batch.inputs.items()})


# The contract of full-vocabulary terms, held in the logits


VOCABULARY = 9


@dataclass(frozen=True)
class Logits:
    """Logits of a policy and a reference, a token each, and the batch that they go with."""

    batch: TokenBatch
    policy: Tensor
    reference: Tensor
    target: Tensor


def random_logits(seed: int, dtype: torch.dtype = torch.float64) -> Logits:
    """Logits for the rows of `random_batch`, NaN where these are masked."""
    batch, draw = random_batch(seed), torch.Generator().manual_seed(seed)
    shape = (ROWS, LENGTH, VOCABULARY)
    policy, reference = (2 * torch.randn(shape, dtype=torch.float64, generator=draw) for _ in range(2))
    policy[~batch.mask] = reference[~batch.mask] = math.nan
    target = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=draw)
    return Logits(batch, policy.to(dtype).requires_grad_(), reference.to(dtype), target)


def loss_in_logits(objective: Objective, logits: Logits, mask: Tensor, denominator: float | None = None) -> Tensor:
    """The surrogate and the reduced term at the positions under ``mask``, as the trainer adds them up."""
    flat, target = logits.policy[mask], logits.target[mask]
    term = objective.logit_term(flat, logits.reference[mask], target)
    assert term is not None and term.shape == target.shape
    logp, per_token = (
        torch.zeros(mask.shape, dtype=flat.dtype).masked_scatter(mask, found)
        for found in (flat.log_softmax(1).gather(1, target[:, None])[:, 0], term)
    )
    batch = TokenBatch(logp, mask)
    z = objective.normaliser.denominator(batch) if denominator is None else denominator
    return surrogate(objective, batch, z) + reduce(per_token, batch, objective.normaliser, z)


@over_cases_in_logits
@pytest.mark.parametrize("seed", SEEDS)
def test_the_gradient_in_the_logits_is_the_canonical_one(name: str, case: LogitsCase, seed: int) -> None:
    objective, logits = get_objective(name, **case.options), random_logits(seed)
    mask = logits.batch.mask
    torch.manual_seed(seed)
    ours = loss_in_logits(objective, logits, mask)
    torch.manual_seed(seed)
    theirs = case.loss(mask, logits.policy, logits.reference, logits.target)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    (own,), (expected,) = (torch.autograd.grad(loss, logits.policy) for loss in (ours, theirs))
    assert_same(own[mask], expected[mask])
    assert (own[~mask] == 0).all()


@over_cases_in_logits
def test_the_gradient_in_the_logits_does_not_depend_on_the_micro_batches(name: str, case: LogitsCase) -> None:
    if case.random:
        return
    objective, logits = get_objective(name, **case.options), random_logits(1)
    mask = logits.batch.mask
    (whole,) = torch.autograd.grad(loss_in_logits(objective, logits, mask), logits.policy)
    denominator, total = objective.normaliser.denominator(logits.batch), torch.zeros_like(whole)
    for rows in torch.split(torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)), 4):
        part = torch.zeros_like(mask)
        part[rows] = mask[rows]
        total += torch.autograd.grad(loss_in_logits(objective, logits, part, denominator), logits.policy)[0]
    assert_same(total[mask], whole[mask], 1e-12)


@over_cases_in_logits
def test_float32_logits_stay_close(name: str, case: LogitsCase) -> None:
    objective, high = get_objective(name, **case.options), random_logits(0)
    low = random_logits(0, torch.float32)
    found = []
    for logits in (low, high):
        torch.manual_seed(0)
        loss = loss_in_logits(objective, logits, logits.batch.mask)
        assert loss.dtype == logits.policy.dtype
        found.append(torch.autograd.grad(loss, logits.policy)[0][logits.batch.mask].double())
    assert_same(found[0], found[1], 1e-5)


# The random batches really reach every branch


@pytest.mark.parametrize("seed", SEEDS)
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
def test_clipping_is_active_on_both_sides(name: str, options: dict[str, Any], seed: int) -> None:
    objective = get_objective(name, **options)
    batch = prepared(objective, random_batch(seed)).detach()
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
        batch = prepared(objective, random_batch(seed)).detach()
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


@pytest.mark.parametrize("seed", SEEDS)
def test_the_other_bounds_are_active_too(seed: int) -> None:
    batch = random_batch(seed).detach()
    inside = batch.mask
    step = get_objective("iw-sft", variant="per_step").coefficients(batch).values[inside]
    assert {0.2, 1.8} < set(step.tolist())
    sequence = get_objective("iw-sft", kappa=2.0, weight_max=1.1).coefficients(batch).values[inside]
    assert 0 < (sequence == 1.1).sum() < len(sequence)
    hinge = get_objective("dpo", beta=0.7, variant="hinge").coefficients(batch).values[inside]
    assert (hinge == 0).any() and (hinge > 0).any() and (hinge < 0).any()
    correct = get_objective("rft", threshold=0.8).coefficients(batch).values[inside]
    assert {0.0, 1.0} == set(correct.tolist())
    weight = get_objective("cispo", ratio_min=0.8, ratio_max=1.28).coefficients(batch).metrics
    ratio = weight["ratio"][inside]
    assert (ratio < 0.8).any() and (ratio > 1.28).any() and 0 < weight["clipped"][inside].sum() < len(ratio)
    dropped = inside & ~prepared(get_objective("dapo"), batch).mask
    assert dropped[FLAT_GROUP].any() and dropped[-1].any()  # a group of equal rewards, and one of one row
    ready = prepared(get_objective("ppo"), batch)
    value, old, returns = (t[inside] for t in get_objective("ppo").needed(ready, "value", "old_value", "returns"))
    near = value.clip(old - 0.2, old + 0.2)
    clipped = (near - returns).square() > (value - returns).square()
    assert (near == value).any() and clipped.any() and ((near != value) & ~clipped).any()


# The traps


def test_dft_weighs_by_p_and_divides_by_the_number_of_tokens() -> None:
    # p = 1/2, 1/4, 1/10: loss (ln 2 / 2 + ln 4 / 4 + ln 10 / 10) / 3, gradient -p / 3. Without stop-gradient
    # the last would be -(1/10)(1 - 2.302585)/3 > 0; divided by Σ p = 0.85 it would be -p / 0.85.
    batch = hand_batch([[0.5, 0.25], [0.1]])
    objective = get_objective("dft")
    expected = torch.tensor([0.5, 0.25, 0.1], dtype=torch.float64)
    torch.testing.assert_close(objective.coefficients(batch.detach()).values[batch.mask], expected)
    loss = surrogate(objective, batch)
    assert loss.item() == pytest.approx((0.34657359 + 0.34657359 + 0.23025851) / 3, rel=1e-7)
    torch.testing.assert_close(gradients(loss, batch).view(2, 2)[batch.mask], -expected / 3)


@pytest.mark.parametrize("variant", ["per_sequence", "per_step", "ema"])
def test_iw_sft_is_sft_when_the_reference_is_the_policy(variant: str) -> None:
    batch = random_batch(0)
    batch = batch.replace(reference_logp=batch.logp.detach())
    ours = surrogate(get_objective("iw-sft", variant=variant), batch)
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
    batch = random_batch(0)
    batch = batch.replace(behaviour_logp=batch.logp.detach(), value=None)
    objective = get_objective(name, kl_coefficient=0.0)
    ready = prepared(objective, batch)
    (advantage,) = objective.needed(ready, "advantage")
    found = objective.coefficients(ready.detach())
    assert torch.equal(found.values[batch.mask], advantage[batch.mask])
    assert gradients(surrogate(objective, ready), batch).norm() > 0


def test_ppo_takes_the_returns_before_whitening() -> None:
    batch = random_batch(0).detach()
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
