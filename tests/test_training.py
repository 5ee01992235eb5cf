"""The training loop: its gradient is that of the whole batch, however the batch is cut, for every objective."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from batches import built, of_each_kind
from scipy.stats import chisquare
from torch import Tensor

from rlzoo.buffers import OfflineBuffer, View
from rlzoo.config import Training
from rlzoo.inputs import Input, MovingReference, ReferenceLogits, Snapshot, Statistic
from rlzoo.objective import Objective, get_objective, is_composite, list_objectives, objective_class, surrogate
from rlzoo.policy import FirstPass, Policy, Sequences
from rlzoo.policy.assembly import fixed_batch
from rlzoo.policy.microbatches import log_probs, token_batches
from rlzoo.training import Trainer
from rlzoo.training.batches import BufferSource, micro_units
from rlzoo.types import Coefficients, Coupling, Selection, TokenBatch, Trajectory, WhichView

MakePolicy = Callable[..., Policy]
Batch = tuple[list[Trajectory], list[tuple[int, ...]]]
CPU = torch.device("cpu")
UNCLIPPED = 1e9
RAW = Training(steps=2, learning_rate=1e-2, weight_decay=0.0, max_gradient_norm=UNCLIPPED, warmup_ratio=0.0)


@dataclass(frozen=True)
class RelativeProbability(Objective):
    """c = p / mean(p) over the batch."""

    name: ClassVar[str] = "relative-probability"
    couples: ClassVar[Coupling] = Coupling.BATCH

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Statistic("entropy"),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        p = torch.where(batch.mask, batch.logp, 0).exp() * (1 + batch.inputs["entropy"])
        mean = p[batch.mask].mean() if batch.mask.any() else 1.0
        return Coefficients(p / mean, loss=-2 * batch.logp, metrics={"seen": batch.logp})


@dataclass(frozen=True)
class Anchored(Objective):
    """SFT with a KL to the reference over the whole vocabulary."""

    name: ClassVar[str] = "anchored"

    @property
    def requires(self) -> tuple[Input, ...]:
        return (ReferenceLogits(),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(torch.ones_like(batch.logp))

    def logit_term(self, policy_logits: Tensor, reference_logits: Tensor | None, target: Tensor) -> Tensor:
        assert reference_logits is not None
        reference = reference_logits.log_softmax(1)
        return 0.5 * (reference.exp() * (reference - policy_logits.log_softmax(1))).sum(1)


@dataclass(frozen=True)
class Flattened(Objective):
    """SFT with a pull of the whole distribution towards uniform, where the policy is surer than it is on average."""

    name: ClassVar[str] = "flattened"
    couples: ClassVar[Coupling] = Coupling.BATCH

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(torch.ones_like(batch.logp), logit_weight=batch.logp - batch.logp[batch.mask].mean())

    def logit_term(self, policy_logits: Tensor, reference_logits: Tensor | None, target: Tensor) -> Tensor:
        return -policy_logits.log_softmax(1).mean(1)


OBJECTIVES: Mapping[str, Objective] = {
    **{name: built(name) for name in list_objectives() if not is_composite(objective_class(name))},
    "dpo-hinge": get_objective("dpo", variant="hinge"),
    "dpo-ipo": get_objective("dpo", variant="ipo"),
    "otr": get_objective("otr", temperature=1e-6),  # draws the likeliest token, whatever the micro-batches
    "iw-sft-step": get_objective("iw-sft", variant="per_step"),
    "iw-sft-ema": get_objective("iw-sft", variant="ema", ema_decay=0.5),
    "gspo": get_objective("gspo", clip_low=0.9, clip_high=9.0),  # its own bounds clip all of a second update
    "ppo-shared": get_objective("ppo", critic="shared", dual_clip=2.0),
    "profit": get_objective("profit", threshold=0.01),  # a random model gives no token more than a few per cent
    "batch-coupled": RelativeProbability(),
    "logit-term": Anchored(),
    "logit-weight": Flattened(),
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)
every_kind = pytest.mark.parametrize("name", of_each_kind(OBJECTIVES))


def is_of_groups(objective: Objective) -> bool:
    return objective.learns_from is Selection.GROUPS


class Fixed:
    """The same batch at every draw."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def draw(self) -> Batch:
        return self.batch


class InTurn:
    """One batch after the other, again and again."""

    def __init__(self, *batches: Batch) -> None:
        self.batches, self.drawn = batches, 0

    def draw(self) -> Batch:
        self.drawn += 1
        return self.batches[(self.drawn - 1) % len(self.batches)]


def make_batch(policy: Policy, selection: WhichView, seed: int = 0) -> Batch:
    """Eight rows of 4 prompts and many lengths, with log-probs near the policy's; all that any objective asks for."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 120) for _ in range(rng.randint(low, high))]

    prompts = [tokens(1, 6) for _ in range(4)]
    pairs = [(prompts[i // 2], tokens(1, 1 if i == 5 else 9)) for i in range(8)]
    scores = log_probs(policy, pairs)
    rows = [
        Trajectory(
            "", "", prompt, completion, str(i // 2), source="policy", reward=float(i % 2 == 0 or i == 7),
            behaviour_logp=[x + rng.gauss(0, 0.3) for x in logp], reference_logp=[x + rng.gauss(0, 0.3) for x in logp],
            columns={"answer": "7"}, inputs={"logp of embedded": [-0.5] * len(logp)},
        )
        for i, ((prompt, completion), logp) in enumerate(zip(pairs, scores, strict=True))
    ]  # fmt: skip
    together = selection in (Selection.PAIRS, Selection.GROUPS)
    return rows, [(i, i + 1) for i in range(0, 8, 2)] if together else [(i,) for i in range(8)]


def permuted(batch: Batch, seed: int) -> Batch:
    """The same units and rows in another order."""
    rows, units = batch
    rng = random.Random(seed)
    order = rng.sample(range(len(rows)), len(rows))
    place = {row: new for new, row in enumerate(order)}
    moved = [tuple(place[row] for row in unit) for unit in units]
    return [rows[i] for i in order], rng.sample(moved, len(moved))


def trained(policy: Policy, objective: Objective, batch: Batch | InTurn, settings: Training) -> dict[str, list[Tensor]]:
    """The gradient of each step and, at the end, the weights, by parameter."""
    found: dict[str, list[Tensor]] = {}

    def keep(trainer: Trainer, step: int) -> None:
        for name, parameter in trainer.policy.named_parameters():
            value = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            found.setdefault(name, []).append(value)

    source = batch if isinstance(batch, InTurn) else Fixed(batch)
    trainer = Trainer(policy, objective, source, settings, [keep])
    trainer.run()
    for name, parameter in trainer.policy.named_parameters():
        found[name].append(parameter.detach().clone())
    return found


def distance(a: Mapping[str, list[Tensor]], b: Mapping[str, list[Tensor]]) -> float:
    """The greatest relative distance between the two runs' gradients and weights, all parameters together."""
    worst = 0.0
    for place in range(len(next(iter(a.values())))):
        left, right = (torch.cat([values[place].flatten() for values in x.values()]) for x in (a, b))
        assert float(left.norm()) > 0
        worst = max(worst, float((left - right).norm() / left.norm()))
    return worst


@pytest.mark.slow
@every_kind
def test_neither_micro_batches_nor_the_order_of_rows_matter(name: str, make_policy: MakePolicy) -> None:
    objective = OBJECTIVES[name]
    batch = make_batch(make_policy(), objective.learns_from)
    settings = RAW.model_copy(update={"steps": 3, "updates_per_batch": 2})
    whole = trained(make_policy(), objective, batch, settings)
    for budget, rows in ((1, batch), (33, permuted(batch, 1)), (4096, permuted(batch, 2))):
        cut = trained(make_policy(), objective, rows, settings.model_copy(update={"token_budget": budget}))
        assert distance(whole, cut) < 1e-6


def full_batch(policy: Policy, objective: Objective, batch: Batch) -> TokenBatch:
    """The whole batch through the policy at once, put together here and not by the trainer."""
    rows, _ = batch
    needs = objective.requires
    scores = policy(
        Sequences.collate([r.prompt_ids for r in rows], [r.completion_ids for r in rows], CPU),
        statistics=[one for one in needs if one.is_statistic],
    )
    value = scores.inputs.get("value")
    size = scores.logp.shape[1]

    def padded(values: Sequence[list[float] | None]) -> Tensor:
        return torch.tensor([[*(value or []), *[0.0] * (size - len(value or []))] for value in values])

    partner = torch.tensor([i + 1 - 2 * (i % 2) for i in range(len(rows))])
    mask = torch.tensor([[t < len(r.completion_ids) for t in range(size)] for r in rows])
    whole = TokenBatch(
        logp=scores.logp,
        mask=mask,
        behaviour_logp=padded([r.behaviour_logp for r in rows]),
        reference_logp=scores.logp.detach()
        if any(isinstance(one, MovingReference) for one in needs)
        else padded([r.reference_logp for r in rows]),
        snapshot_logp=scores.logp.detach(),
        old_value=None if value is None else value.detach(),
        reward=torch.tensor([r.reward or 0.0 for r in rows]),
        outcome=torch.tensor([r.reward or 0.0 for r in rows]),  # all rows are samples
        from_demonstration=torch.zeros(len(rows)),
        group=torch.tensor([int(r.prompt_id) for r in rows]),
        partner=partner,
        chosen=torch.arange(len(rows)) % 2 == 0,
        mismatched=torch.zeros(len(rows)),  # at the first step the policy is its reference
        teacher_logp=padded([r.inputs["logp of embedded"] for r in rows]),
        privileged_logp=padded(log_probs(policy, [(policy.tokenizer.encode("\n\n7"), r.completion_ids) for r in rows])),
        statistics=scores.inputs,
    )
    fixed = objective.prepare(whole.detach())
    return whole.replace(mask=fixed.mask, advantage=fixed.advantage, returns=fixed.get("returns"))


def term_of(policy: Policy, objective: Objective, batch: Batch, reference: Policy | None = None) -> Tensor:
    """The objective's term from the full logits of one row after the other, averaged over tokens."""
    found, logp = [], []
    for row in batch[0]:
        if row.completion_ids:
            ids, start = torch.tensor([row.prompt_ids + row.completion_ids]), len(row.prompt_ids) - 1
            logits = policy.model(ids).logits[0, start:-1]
            with torch.no_grad():
                anchor = (reference or policy).model(ids).logits[0, start:-1]
            target = torch.tensor(row.completion_ids)
            term = objective.logit_term(logits, anchor, target)
            assert term is not None
            logp.append(logits.detach().log_softmax(1).gather(1, target[:, None])[:, 0])
            found.append(term)
    weight = torch.cat(logp) - torch.cat(logp).mean() if isinstance(objective, Flattened) else 1
    return (weight * torch.cat(found)).mean()


@every_objective
def test_the_gradient_of_a_step_is_that_of_the_surrogate(name: str, make_policy: MakePolicy) -> None:
    objective, policy = OBJECTIVES[name], make_policy()
    batch = make_batch(policy, objective.learns_from)
    still = RAW.model_copy(update={"token_budget": 20, "learning_rate": 1e-15})  # the second step is the first again
    found = trained(make_policy(), objective, batch, still)
    policy.attach(objective.requires)
    loss = surrogate(objective, full_batch(policy, objective, batch))
    if objective.has_logit_term:
        loss = loss + term_of(policy, objective, batch)
    torch.autograd.backward(loss)
    expected = {n: [torch.zeros_like(p) if p.grad is None else p.grad] for n, p in policy.named_parameters()}
    assert distance({n: 2 * values for n, values in expected.items()}, found) < 1e-6


def test_coupled_coefficients_see_the_policy_of_each_update(make_policy: MakePolicy) -> None:
    policy = make_policy()
    settings = RAW.model_copy(update={"steps": 3, "updates_per_batch": 3, "token_budget": 20})
    trainer = Trainer(policy, RelativeProbability(), Fixed(make_batch(policy, Selection.DEMONSTRATIONS)), settings)
    steps = trainer.run().steps
    assert len({row["logp"] for row in steps}) == 3
    for row in steps:
        assert row["seen"] == pytest.approx(row["logp"], rel=1e-9)
        assert row["loss"] == pytest.approx(-2 * row["logp"], rel=1e-9)


@dataclass(frozen=True)
class Watching(Objective):
    """Policy gradient on a snapshot's ratio; keeps what it was given."""

    name: ClassVar[str] = "watching"
    learns_from: ClassVar[Selection] = Selection.GROUPS
    seen: ClassVar[list[TokenBatch]] = []

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Snapshot(),)

    def advantages(self, batch: TokenBatch) -> Tensor:
        assert batch.reward is not None
        return (batch.reward - batch.reward.mean())[:, None].expand_as(batch.logp).to(batch.logp.dtype)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        self.seen.append(batch)
        snapshot, advantage = self.needed(batch, "snapshot_logp", "advantage")
        return Coefficients((batch.logp - snapshot).exp() * advantage)


def test_what_is_fixed_stays_fixed_during_the_updates_on_a_batch(make_policy: MakePolicy) -> None:
    policy = make_policy().train()  # as a model may come; its dropout is no part of its log-probs
    Watching.seen.clear()
    settings = RAW.model_copy(update={"steps": 4, "updates_per_batch": 2})
    Trainer(policy, Watching(), Fixed(make_batch(policy, Selection.GROUPS)), settings).run()
    a, b, c, d = Watching.seen
    assert a.snapshot_logp is not None and b.snapshot_logp is not None and c.snapshot_logp is not None
    torch.testing.assert_close(a.logp, a.snapshot_logp)
    assert torch.equal(a.snapshot_logp, b.snapshot_logp) and a.advantage is not None and b.advantage is not None
    assert torch.equal(a.advantage, b.advantage)
    assert not torch.allclose(b.logp, a.logp)
    torch.testing.assert_close(c.logp, c.snapshot_logp)  # the second batch has a snapshot of its own
    assert not torch.allclose(c.snapshot_logp, a.snapshot_logp) and d is not c


def halves(batch: Batch) -> tuple[Batch, Batch]:
    rows, units = batch
    cut = len(rows) // 2
    moved = [tuple(row - cut for row in unit) for unit in units if unit[0] >= cut]
    return (rows[:cut], [unit for unit in units if unit[0] < cut]), (rows[cut:], moved)


@pytest.mark.parametrize("name", ["dpo", "dr-grpo", "kto"])
def test_mini_batches_are_batches_of_whole_units(name: str, make_policy: MakePolicy) -> None:
    """For an objective that fixes nothing over the whole batch."""
    objective = OBJECTIVES[name]
    batch = make_batch(make_policy(), objective.learns_from)
    settings = RAW.model_copy(update={"steps": 4, "learning_rate": 1e-3})
    split = trained(
        make_policy(), objective, batch, settings.model_copy(update={"mini_batches": 2, "token_budget": 20})
    )
    assert distance(trained(make_policy(), objective, InTurn(*halves(batch)), settings), split) < 1e-6


@pytest.mark.parametrize("name", ["ppo", "reinforce-pp", "psft"])
def test_the_gradients_of_mini_batches_add_up_to_that_of_the_batch(name: str, make_policy: MakePolicy) -> None:
    """Weighted by their tokens, while the policy stands still: advantages are taken over the batch."""
    objective = OBJECTIVES[name]
    batch = make_batch(make_policy(), objective.learns_from)
    still = RAW.model_copy(update={"steps": 4, "learning_rate": 1e-12})
    whole = trained(make_policy(), objective, batch, still)
    parts = trained(make_policy(), objective, batch, still.model_copy(update={"mini_batches": 4}))
    tokens = torch.tensor([float(sum(len(row.completion_ids) for row in batch[0][i : i + 2])) for i in (0, 2, 4, 6)])
    weights = tokens / tokens.sum()
    added = {n: [sum(w * g for w, g in zip(weights, found[:4], strict=True))] for n, found in parts.items()}
    assert distance({n: found[:1] for n, found in whole.items()}, added) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "batch-coupled"])
def test_micro_batches_do_not_matter_within_mini_batches(name: str, make_policy: MakePolicy) -> None:
    objective = OBJECTIVES[name]
    batch = make_batch(make_policy(), objective.learns_from)
    settings = RAW.model_copy(update={"steps": 4, "mini_batches": 2, "updates_per_batch": 2, "learning_rate": 1e-3})
    small = trained(make_policy(), objective, batch, settings.model_copy(update={"token_budget": 1}))
    assert distance(small, trained(make_policy(), objective, batch, settings)) < 1e-6


def test_mini_batches_after_the_first_have_moved_away_from_the_snapshot(make_policy: MakePolicy) -> None:
    batch = make_batch(make_policy(), Selection.DEMONSTRATIONS)
    settings = RAW.model_copy(update={"steps": 8, "mini_batches": 2, "updates_per_batch": 2, "learning_rate": 1e-3})
    steps = Trainer(make_policy(), get_objective("psft"), Fixed(batch), settings).run().steps
    assert [row["ratio_deviation"] < 1e-12 for row in steps] == [True, False, False, False] * 2


@pytest.mark.parametrize(("name", "updates"), [("ppo", 1), ("ppo", 2), ("psft", 1), ("batch-coupled", 2)])
def test_the_first_micro_batch_runs_once_for_its_log_probs_and_its_gradient(
    name: str, updates: int, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the policy is the same for both, and with the same numbers to the bit."""
    objective, rows = OBJECTIVES[name], list[int]()
    batch = make_batch(make_policy("llama", torch.float32), objective.learns_from)
    settings = RAW.model_copy(update={"steps": 2 * updates, "updates_per_batch": updates, "token_budget": 50})

    def run() -> tuple[dict[str, list[Tensor]], int]:
        policy = make_policy("llama", torch.float32)
        policy.model.model.embed_tokens.register_forward_hook(lambda _, ids, out: rows.append(len(out)))
        rows.clear()
        return trained(policy, objective, batch, settings), sum(rows)

    found, passed = run()
    monkeypatch.setattr(FirstPass, "take", lambda self, index: self.drop())
    twice, all_rows = run()
    assert distance(twice, found) == 0
    lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in batch[0]]
    first = len(next(iter(token_batches([(i,) for i in range(8)], lengths, 50))))
    kept, trunks = 2 * updates if objective.is_coupled else 2, 2 if name == "ppo" else 1
    assert 1 < first < 8 and all_rows - passed == kept * trunks * first


def test_the_first_pass_is_let_go_when_memory_runs_out(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, held, passes = make_policy(), list[object](), list[bool]()
    settings = RAW.model_copy(update={"steps": 1, "token_budget": 50})
    trainer = Trainer(policy, get_objective("psft"), Fixed(make_batch(policy, Selection.DEMONSTRATIONS)), settings)

    def fails(*_: object) -> None:
        passes.append(torch.is_grad_enabled())
        if len(passes) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    policy.model.transformer.register_forward_pre_hook(fails)
    monkeypatch.setattr("rlzoo.policy.microbatches.release_memory", lambda: held.append(trainer._first._kept))
    record = trainer.run()
    assert passes[:3] == [True, False, True] and held == [None]
    assert len(record.steps) == 1 and record.events[0].startswith("step 1: out of memory with 50 tokens")


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_ratios_leave_one_and_clip_on_the_second_update(name: str, make_policy: MakePolicy) -> None:
    policy = make_policy()
    rows, units = make_batch(policy, Selection.GROUPS)
    logps = log_probs(policy, [(r.prompt_ids, r.completion_ids) for r in rows])
    rows = [replace(r, behaviour_logp=logp) for r, logp in zip(rows, logps, strict=True)]
    settings = RAW.model_copy(update={"updates_per_batch": 2})
    objective = get_objective(name, kl_coefficient=0.0)
    first, second = Trainer(policy, objective, Fixed((rows, units)), settings).run().steps
    assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["clipped"] == 0  # GPT-2's dropout is off
    assert abs(second["ratio"] - 1) > 1e-3 and second["clipped"] > 0


@pytest.mark.parametrize("name", [name for name in of_each_kind(OBJECTIVES) if is_of_groups(OBJECTIVES[name])])
def test_a_batch_of_masked_rows_gives_no_nan(name: str, make_policy: MakePolicy) -> None:
    objective, policy = replace(OBJECTIVES[name], truncated="mask"), make_policy()
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    rows, units = make_batch(policy, objective.learns_from)
    record = Trainer(policy, objective, Fixed(([replace(row, truncated=True) for row in rows], units)), RAW).run()
    assert [row["gradient_norm"] for row in record.steps] == [0, 0]
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in record.steps)


def test_the_moving_reference_moves_by_its_decay(make_policy: MakePolicy) -> None:
    policy, before = make_policy(), make_policy()
    objective = get_objective("iw-sft", variant="ema", ema_decay=0.75)
    trainer = Trainer(policy, objective, Fixed(make_batch(policy, objective.learns_from)), RAW)
    averages: dict[str, Tensor] = {n: p.detach().clone() for n, p in before.model.named_parameters()}

    def check(running: Trainer, step: int) -> None:
        (reference,) = running.models.moving.values()
        for name, parameter in running.policy.model.named_parameters():
            averages[name] = 0.75 * averages[name] + 0.25 * parameter.detach()
            torch.testing.assert_close(reference.model.get_parameter(name), averages[name], check_stride=False)

    trainer.callbacks = [check]
    steps = trainer.run().steps
    assert steps[0]["weight"] == pytest.approx(1, abs=1e-12) and steps[1]["weight"] > 1 + 1e-3


def test_a_reference_that_is_given_is_the_one_that_is_held_to(make_policy: MakePolicy) -> None:
    objective, other = OBJECTIVES["logit-term"], make_policy(seed=1).frozen_copy()
    batch = make_batch(make_policy(), objective.learns_from)
    first, _ = Trainer(make_policy(), objective, Fixed(batch), RAW, reference=other).run().steps
    expected = float(term_of(make_policy(), objective, batch, other).detach())
    assert first["logit_term"] == pytest.approx(expected, rel=1e-6) and expected > 0.1


@pytest.mark.parametrize("updates", [1, 2])
def test_the_baseline_of_kto_is_the_policys_as_it_has_become(updates: int, make_policy: MakePolicy) -> None:
    """The mean over both prompts of log π(y')/π_ref(y'), y' being the other prompt's completion (arXiv 2402.01306)."""
    objective, means = get_objective("kto", undesirable_weight=0.0), [0.0]
    rows = [Trajectory("", "", [5, 6 + i], [20 + i, 30], str(i), source="policy", reward=1.0, reference_logp=[-1.0] * 2)
            for i in range(2)]  # fmt: skip
    swapped = [(rows[0].prompt_ids, rows[1].completion_ids), (rows[1].prompt_ids, rows[0].completion_ids)]

    def total(policy: Policy) -> float:
        return sum(map(sum, log_probs(policy, swapped)))

    def measure(trainer: Trainer, step: int) -> None:
        means.append((total(trainer.policy) - total(make_policy())) / 2)

    settings = RAW.model_copy(update={"steps": 3, "updates_per_batch": updates})
    steps = Trainer(make_policy(), objective, Fixed((rows, [(0,), (1,)])), settings, [measure]).run().steps
    assert [row["kl"] for row in steps] == pytest.approx(means[:3], rel=1e-6) and means[1] > 0.1


@pytest.mark.parametrize("owners", ["AABBC", "CBABA", "AAAB"])
def test_kto_shows_each_prompt_a_completion_of_another(owners: str, make_policy: MakePolicy) -> None:
    """Each completion once; of a prompt with more than half of the rows, as many as have a counterpart."""

    def pairs(order: list[int]) -> set[tuple[str, int]]:
        known: dict[str, Any] = {"source": "policy", "reward": 1.0, "reference_logp": [-1.0]}
        rows = [Trajectory("", "", [ord(owners[i])], [20 + i], owners[i], **known) for i in order]
        seen: list[list[int]] = []
        reference = make_policy().frozen_copy()
        reference.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0].ids.tolist()))
        source, settings = Fixed((rows, [(i,) for i in range(len(rows))])), RAW.model_copy(update={"steps": 1})
        Trainer(make_policy(), get_objective("kto"), source, settings, reference=reference).run()
        assert len(seen) == (2 if owners == "AAAB" else 5)
        return {(chr(prompt), completion - 20) for prompt, completion in seen}

    found = pairs([*range(len(owners))])
    assert all(owners[completion] != prompt for prompt, completion in found)
    assert len({completion for _, completion in found}) == len(found) == (2 if owners == "AAAB" else 5)
    assert sorted(prompt for prompt, _ in found) == (["A", "B"] if owners == "AAAB" else sorted(owners))
    assert pairs([*reversed(range(len(owners)))]) == found


def test_the_optimizer_is_adamw_as_the_settings_say(make_policy: MakePolicy) -> None:
    """θ ← θ - η λ θ - η m̂/(√v̂ + ε), with the gradients that the run itself left (arXiv 1711.05101, algorithm 2)."""
    policy = make_policy()
    decay, betas = 0.3, (0.6, 0.7)
    settings = RAW.model_copy(update={"steps": 4, "betas": betas, "weight_decay": decay})
    weights = {n: p.detach().clone() for n, p in policy.named_parameters()}
    first, second = ({n: torch.zeros_like(p) for n, p in weights.items()} for _ in range(2))

    def check(trainer: Trainer, step: int) -> None:
        rate = trainer.record.steps[-1]["learning_rate"]
        for name, parameter in trainer.policy.named_parameters():
            assert parameter.grad is not None
            first[name] = betas[0] * first[name] + (1 - betas[0]) * parameter.grad
            second[name] = betas[1] * second[name] + (1 - betas[1]) * parameter.grad.square()
            mean, square = first[name] / (1 - betas[0] ** step), second[name] / (1 - betas[1] ** step)
            weights[name] = weights[name] * (1 - rate * decay) - rate * mean / (square.sqrt() + 1e-8)
            torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-7, atol=1e-10)

    Trainer(policy, get_objective("sft"), Fixed(make_batch(policy, Selection.CORRECT)), settings, [check]).run()


def test_the_schedule_warms_up_and_follows_a_cosine(make_policy: MakePolicy) -> None:
    settings = RAW.model_copy(update={"steps": 6, "warmup_ratio": 0.3, "learning_rate": 1e-3})
    policy = make_policy()
    steps = Trainer(policy, get_objective("sft"), Fixed(make_batch(policy, Selection.CORRECT)), settings).run().steps
    # 1.8 steps of warm-up are two, 1/3 and 2/3; then (1 + cos(π i/4))/2 for i = 0 … 3; i = 4 would be 0
    expected = [1 / 3, 2 / 3, 1, 0.8535533906, 0.5, 0.1464466094]
    assert [row["learning_rate"] for row in steps] == pytest.approx([1e-3 * x for x in expected], rel=1e-8)
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    warm = RAW.model_copy(update={"steps": 2, "warmup_ratio": 1.0})
    steps = Trainer(policy, get_objective("sft"), Fixed(make_batch(policy, Selection.CORRECT)), warm).run().steps
    assert [row["learning_rate"] for row in steps] == pytest.approx([1e-2 / 3, 2e-2 / 3], rel=1e-8)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 7])
@pytest.mark.parametrize("selection", [Selection.PAIRS, Selection.GROUPS])
def test_an_epoch_draws_every_unit_once_and_whole(selection: Selection, batch_size: int) -> None:
    rng = random.Random(0)
    rows: list[Trajectory] = []
    for prompt in range(12):
        for i in range(2 if selection is Selection.PAIRS else rng.randint(1, 4)):
            known: dict[str, Any] = {"source": "policy", "reward": float(i == 0), "behaviour_logp": [-1.0]}
            rows.append(Trajectory("", str(len(rows)), [1], [2], str(prompt), **known))
    buffer = OfflineBuffer.from_trajectories(rows)
    view = buffer.view(selection)
    source = BufferSource(buffer, view, batch_size, seed=3)
    wanted = sorted(tuple(rows[i].completion for i in unit) for unit in view.units)
    drawn: list[tuple[str, ...]] = []
    room = 0
    while len(drawn) < 3 * len(wanted):
        found, units = source.draw()
        assert len(found) <= batch_size or len(units) == 1
        assert len(units[0]) > room, "the batch before had room for it"
        room = batch_size - len(found)
        assert [i for unit in units for i in unit] == list(range(len(found)))
        drawn += [tuple(found[i].completion for i in unit) for unit in units]
    for epoch in range(3):
        assert sorted(drawn[epoch * len(wanted) : (epoch + 1) * len(wanted)]) == wanted
    assert drawn[: len(wanted)] != drawn[len(wanted) : 2 * len(wanted)]  # shuffled anew


@pytest.mark.slow
def test_units_with_weights_are_drawn_in_proportion_to_them() -> None:
    rows = [Trajectory("", str(i), [1], [2], str(i), source="policy") for i in range(4)]
    weights = (0.0, 1.0, 2.0, 5.0)
    view = View(Selection.CORRECT, tuple((i,) for i in range(4)), weights)
    source = BufferSource(OfflineBuffer.from_trajectories(rows), view, 4, seed=0)  # an epoch is as many units
    counted = Counter(row.completion for _ in range(400) for row in source.draw()[0])
    assert counted.keys() == {"1", "2", "3"}
    assert chisquare([counted[str(i)] for i in (1, 2, 3)], [200, 400, 1000]).pvalue > 1e-3


def test_coupled_rows_share_a_micro_batch() -> None:
    units = [(0, 1), (2, 3), (4, 5)]
    for batch in token_batches(micro_units(units, Coupling.PAIR), [3, 9, 2, 2, 8, 1], token_budget=1):
        assert tuple(batch) in units
    assert micro_units(units, Coupling.GROUP) == units
    assert micro_units(units, Coupling.NONE) == micro_units(units, Coupling.BATCH) == [(i,) for i in range(6)]


def test_samples_of_two_policy_versions_are_two_groups() -> None:
    rows = [
        Trajectory("", "", [1], [2], "same", source="policy", reward=r, behaviour_logp=[-1.0]) for r in (0, 1, 1, 1)
    ]
    batch = fixed_batch(rows, [(0, 1), (2, 3)], get_objective("grpo"), CPU)
    assert batch.group is not None and batch.group.tolist() == [0, 0, 1, 1]
    alone = fixed_batch(rows, [(i,) for i in range(4)], get_objective("rft"), CPU)
    assert alone.group is not None and alone.group.tolist() == [0, 0, 0, 0]
