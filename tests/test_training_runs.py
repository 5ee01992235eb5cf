"""Whole training runs: they learn, repeat to the bit, count their costs, and leave checkpoints that open."""

from __future__ import annotations

import json
import math
import mmap
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlzoo.buffers import Buffer, OfflineBuffer
from rlzoo.buffers.problems import Problem, demonstrations, encode_problems
from rlzoo.config import Sampling, Training
from rlzoo.errors import UserError
from rlzoo.objective import get_objective
from rlzoo.policy import Policy, Sequences, load_policy
from rlzoo.policy.loading import save_policy
from rlzoo.policy.microbatches import log_probs
from rlzoo.reward import Reward
from rlzoo.rollout import TransformersSampler, collect_rollouts
from rlzoo.training import Trainer, TrainingRecord, train
from rlzoo.training.batches import FreshSource
from rlzoo.training.costs import peak_memory_bytes, reset_peak_memory
from rlzoo.types import Selection, Trajectory

MakePolicy = Callable[..., Policy]
CPU = torch.device("cpu")
PROBLEMS = [Problem(str(i), f"{i}+{i}=?\n", {"answer": str(2 * i)}, (f"#### {2 * i}",)) for i in range(6)]
QUICK = Training(steps=3, batch_size=4, learning_rate=1e-2)


def demonstrated(policy: Policy) -> OfflineBuffer:
    return OfflineBuffer.from_trajectories(demonstrations(policy.tokenizer, PROBLEMS))


def sampled(policy: Policy, samples: int = 2) -> OfflineBuffer:
    """Samples whose rewards alternate, so that there are pairs, groups and correct ones."""
    rows = collect_rollouts(
        policy,
        TransformersSampler(policy),
        encode_problems(policy.tokenizer, PROBLEMS),
        Reward("alternate", lambda completions, **_: [float(i % 2) for i in range(len(completions))]),
        Sampling(samples=samples, max_new_tokens=5),
        seed=0,
    )
    return OfflineBuffer.from_trajectories(rows)


def mean_nll(policy: Policy, rows: Sequence[Trajectory]) -> float:
    logps = log_probs(policy, [(r.prompt_ids, r.completion_ids) for r in rows])
    flat = [x for logp in logps for x in logp]
    return -sum(flat) / len(flat)


@pytest.mark.parametrize(("kind", "dtype"), [("gpt2", "float64"), ("llama", "float32")])
def test_supervised_training_lowers_the_nll_of_demonstrations_and_of_their_ends(
    make_policy: MakePolicy, kind: str, dtype: str
) -> None:
    policy = make_policy(kind, dtype=getattr(torch, dtype))
    buffer = demonstrated(policy)
    eos = policy.tokenizer.eos_token_id
    assert all(row.completion_ids[-1] == eos for row in buffer)
    before = mean_nll(policy, list(buffer))
    record = train(policy, get_objective("sft"), buffer, QUICK.model_copy(update={"steps": 25, "batch_size": 6}))
    assert mean_nll(policy, list(buffer)) < 0.5 * before
    assert record.steps[-1]["loss"] < record.steps[0]["loss"] and len(record.steps) == 25
    last = log_probs(policy, [(r.prompt_ids, r.completion_ids) for r in buffer])
    assert min(logp[-1] for logp in last) > -1.5  # each demonstration's end of sequence is learned
    assert {p.dtype for p in policy.parameters()} == {getattr(torch, dtype)}


def test_a_cut_demonstration_does_not_teach_to_end(make_policy: MakePolicy) -> None:
    policy = make_policy()
    rows = demonstrations(policy.tokenizer, PROBLEMS, max_tokens=1)
    assert all(row.truncated and row.completion_ids == policy.tokenizer.encode("#### ") for row in rows)
    settings = QUICK.model_copy(update={"steps": 1, "batch_size": 6})
    record = train(policy, get_objective("sft"), OfflineBuffer.from_trajectories(rows), settings)
    assert record.costs.gradient_tokens == sum(len(r.prompt_ids) + 1 for r in rows)


def test_a_pad_that_is_the_end_of_sequence_changes_nothing(make_policy: MakePolicy) -> None:
    policies = [make_policy(), make_policy()]
    found = []
    kept = policies[0].tokenizer.pad_token
    try:
        for policy, pad in zip(policies, (kept, policies[0].tokenizer.eos_token), strict=True):
            policy.tokenizer.pad_token = pad
            found.append(train(policy, get_objective("sft"), demonstrated(policy), QUICK).steps)
    finally:
        policies[0].tokenizer.pad_token = kept
    assert found[0] == found[1]


def _small(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    """The share of tokens from the first half of the vocabulary."""
    return [sum(token < 93 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_online_training_raises_a_trivial_reward(name: str, make_policy: MakePolicy) -> None:
    policy = make_policy("llama", dtype=torch.float32, seed=1)
    prompts = encode_problems(policy.tokenizer, PROBLEMS[:4])
    rewards: list[float] = []

    def collect(version: int) -> Buffer:
        rows = collect_rollouts(
            policy, TransformersSampler(policy), prompts, Reward("small", _small),
            Sampling(samples=16, max_new_tokens=4), seed=version, version=version,
        )  # fmt: skip
        rewards.append(sum(row.reward or 0.0 for row in rows) / len(rows))
        assert {row.policy_version for row in rows} == {version}
        return OfflineBuffer.from_trajectories(rows)

    torch.manual_seed(0)
    settings = Training(steps=12, learning_rate=1e-2, warmup_ratio=0.0)
    source = FreshSource(collect, Selection.GROUPS)
    Trainer(policy, get_objective(name, kl_coefficient=0.0), source, settings).run()
    assert len(rewards) == 12
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.2


def test_each_fresh_batch_is_of_a_later_version_also_after_a_stop(make_policy: MakePolicy) -> None:
    rows = list(sampled(make_policy("llama")))

    class Collect:
        asked: list[int]

        def __call__(self, version: int) -> Buffer:
            self.asked.append(version)
            return OfflineBuffer.from_trajectories([replace(row, policy_version=version) for row in rows])

        def state(self) -> list[int]:
            return self.asked

        def restore(self, state: list[int]) -> None:
            self.asked = [*state]

    first, second = Collect(), Collect()
    first.asked, second.asked = [], []
    source, later = FreshSource(first, Selection.GROUPS), FreshSource(second, Selection.GROUPS)
    assert [{row.policy_version for row in source.draw()[0]} for _ in range(3)] == [{0}, {1}, {2}]
    source.left_out["groups of equal rewards"] += 2
    later.restore(json.loads(json.dumps(source.state())))
    assert later.left_out == source.left_out
    later.draw()
    assert second.asked == [0, 1, 2, 3] and first.asked == [0, 1, 2]


def test_a_fresh_batch_with_nothing_to_learn_from_is_sampled_again(make_policy: MakePolicy) -> None:
    rows = list(sampled(make_policy("llama")))
    asked: list[int] = []

    def collect(version: int) -> Buffer:
        asked.append(version)
        reward = 1.0 if len(asked) > 3 else 0.0
        return OfflineBuffer.from_trajectories([replace(row, reward=reward) for row in rows])

    drawn, units = FreshSource(collect, Selection.CORRECT, per_prompt=1).draw()
    assert asked == [0, 0, 0, 0] and len(units) == len({row.prompt_id for row in rows}) == len(drawn)
    with pytest.raises(UserError, match="8 fresh batches in a row have nothing to learn from"):
        FreshSource(collect, Selection.CORRECT, threshold=2.0).draw()


def test_a_fresh_batch_is_not_sampled_again_for_what_no_other_batch_cures(make_policy: MakePolicy) -> None:
    rows = list(sampled(make_policy("llama")))
    asked: list[int] = []
    lacks: dict[str, Any] = {}

    def collect(version: int) -> Buffer:
        asked.append(version)
        return OfflineBuffer.from_trajectories([replace(row, **lacks) for row in rows])

    def refused(selection: Selection, told: str, **options: object) -> None:
        asked.clear()
        with pytest.raises(UserError, match=told):
            FreshSource(collect, selection, **options).draw()
        assert asked == [0]

    refused(Selection.CORRECT, "unknown option of the view 'correct' 'thresold': did you mean", thresold=2.0)
    refused(Selection.GROUPS, "no groups of 99 samples", size=99)
    lacks["behaviour_logp"] = None
    refused(Selection.GROUPS, "have a reward but no behaviour log-probs")
    lacks["reward"] = None
    refused(Selection.GROUPS, "the reward is None for every sample of the first batch, .*: check the reward")
    source = FreshSource(collect, Selection.CORRECT, threshold=0.0)
    lacks.clear()
    source.draw()
    lacks["reward"] = None  # a later batch may consist of problems that the reward does not apply to
    asked.clear()
    with pytest.raises(UserError, match=r"8 fresh batches in a row .* no rewards"):
        source.draw()
    assert asked == [1] * 8


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(make_policy: MakePolicy) -> None:
    policy = make_policy("llama", dtype=torch.float32)
    buffer = sampled(policy)
    broken = buffer.with_behaviour_logp([[math.nan] * len(row.completion_ids) for row in buffer])
    before = [p.detach().clone() for p in policy.parameters()]
    with pytest.raises(UserError, match="the gradient norm is nan and the loss nan: lower learning_rate"):
        train(policy, get_objective("grpo"), broken, QUICK)
    assert all(map(torch.equal, before, policy.parameters()))


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "ppo"])
def test_the_same_seed_gives_the_same_weights_to_the_bit(name: str, make_policy: MakePolicy) -> None:
    base = make_policy("llama", dtype=torch.float32)
    buffer = demonstrated(base).concatenate(sampled(base))

    def weights(seed: int) -> list[torch.Tensor]:
        policy = make_policy("llama", dtype=torch.float32)
        torch.rand(seed + 1)  # whatever was drawn before must not matter
        train(policy, get_objective(name), buffer, QUICK, seed=seed)
        return [p.detach() for p in policy.parameters()]

    first, again, other = weights(0), weights(0), weights(1)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "ppo"), ("llama", "sft")])
def test_a_saved_checkpoint_opens_with_from_pretrained(
    kind: str, name: str, make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = make_policy(kind, dtype=torch.float32)
    train(policy, get_objective(name), demonstrated(policy).concatenate(sampled(policy)), QUICK)
    save_policy(policy, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[20, 21, 22, 23]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, policy.model.eval()(input_ids=ids).logits)
    reopened = load_policy(str(tmp_path))
    row = [([20, 21], [22, 23])]
    assert log_probs(reopened, row) == log_probs(policy, row)
    assert reopened.tokenizer.encode("17+25=?\n") == policy.tokenizer.encode("17+25=?\n")


def run(policy: Policy, name: str, buffer: Buffer, **changes: Any) -> TrainingRecord:
    return train(policy, get_objective(name), buffer, QUICK.model_copy(update={"steps": 2, **changes}))


@pytest.mark.slow
def test_costs_are_counted_exactly(make_policy: MakePolicy) -> None:
    policy = make_policy()
    rows = sampled(policy)
    rows = rows.with_values("reference_logp", rows.column("behaviour_logp"))
    prompts, completions = (sum(map(len, rows.column(f"{part}_ids"))) for part in ("prompt", "completion"))
    whole = {"batch_size": len(rows), "token_budget": 30}
    forward = policy.flops(prompts + completions, completions)
    costs = run(make_policy(), "grpo", rows, **whole).costs
    assert costs.gradient_tokens == 2 * (prompts + completions)
    assert costs.flops == pytest.approx(2 * 3 * forward, rel=1e-12)
    assert costs.wall_seconds > 0 and costs.peak_memory_bytes > 0 and costs.sampled_tokens == 0
    # a critic of its own doubles the trunk, and is asked once before the updates of each batch
    trunk = policy.flops(prompts + completions, 0)
    costs = run(make_policy(), "ppo", rows, **whole).costs
    assert costs.flops == pytest.approx(2 * (3 + 1) * (forward + trunk), rel=1e-12)
    costs = run(make_policy(), "ppo", rows, updates_per_batch=2, **whole).costs
    assert costs.flops == pytest.approx((2 * 3 + 1) * (forward + trunk), rel=1e-12)
    # a reference that gives logits makes a forward pass of its own with every update
    shown = demonstrated(policy)
    prompts, completions = (sum(map(len, shown.column(f"{part}_ids"))) for part in ("prompt", "completion"))
    costs = run(make_policy(), "asft", shown, batch_size=len(shown)).costs
    assert costs.flops == pytest.approx(2 * (3 + 1) * policy.flops(prompts + completions, completions), rel=1e-12)


@pytest.mark.parametrize("updates", [1, 2])
def test_time_is_that_of_drawing_and_training_and_no_callback_s(
    updates: int, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    class Slow:
        def draw(self) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
            passes(1.0)
            return rows, [(i,) for i in range(len(rows))]

    policy = make_policy()
    rows = list(demonstrated(policy))

    def waits(_: torch.device) -> float:
        passes(100.0)  # until the device has done what it was asked to
        return now

    monkeypatch.setattr("rlzoo.training.trainer.time.perf_counter", lambda: now)
    monkeypatch.setattr("rlzoo.training.trainer.now", waits)
    policy.model.transformer.wte.register_forward_hook(lambda *_: passes(10.0))
    settings = QUICK.model_copy(update={"steps": 4, "updates_per_batch": updates})
    trainer = Trainer(policy, get_objective("sft"), Slow(), settings, [lambda *_: passes(1000.0)])
    assert trainer.run().costs.wall_seconds == 4 / updates + 4 * 10 + 100, "the host waits once, at the end"


@pytest.mark.parametrize(("steps", "updates", "drawn"), [(5, 2, 3), (4, 2, 2), (1, 3, 1), (7, 3, 3)])
def test_a_run_has_as_many_steps_as_were_asked_for(
    steps: int, updates: int, drawn: int, make_policy: MakePolicy
) -> None:
    policy = make_policy()
    rows = list(demonstrated(policy))[:2]
    draws, told = [], list[int]()

    class Counted:
        def draw(self) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
            draws.append(1)
            return rows, [(0,), (1,)]

    settings = QUICK.model_copy(update={"steps": steps, "updates_per_batch": updates})
    record = Trainer(policy, get_objective("sft"), Counted(), settings, [lambda _, step: told.append(step)]).run()
    assert [row["step"] for row in record.steps] == told == list(range(1, steps + 1))
    assert len(draws) == drawn
    assert record.costs.gradient_tokens == steps * sum(len(r.prompt_ids) + len(r.completion_ids) for r in rows)


def test_peak_memory_is_the_highest_of_all_steps_and_no_callback_s(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak, step = 500, 0  # of what came before

    def rises(to: int) -> None:
        nonlocal peak
        peak = max(peak, to)

    def reset(device: torch.device) -> None:
        nonlocal peak
        peak = 0

    def callback(_: Trainer, done: int) -> None:
        nonlocal step
        step = done
        rises(1000)

    policy = make_policy()
    policy.model.transformer.wte.register_forward_hook(lambda *_: rises([10, 30, 20, 15][step]))
    monkeypatch.setattr("rlzoo.training.trainer.reset_peak_memory", reset)
    monkeypatch.setattr("rlzoo.training.trainer.peak_memory_bytes", lambda device: peak)
    settings = QUICK.model_copy(update={"steps": 4, "updates_per_batch": 2})
    record = train(policy, get_objective("sft"), demonstrated(policy), settings, callbacks=[callback])
    assert record.costs.peak_memory_bytes == 30


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the process")
def test_peak_memory_is_in_bytes_and_starts_anew() -> None:
    reset_peak_memory(CPU)
    before = peak_memory_bytes(CPU)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    assert before == pytest.approx(resident, rel=0.01)
    with mmap.mmap(-1, 2**26) as pages:  # closing gives them back to the system, as freeing a tensor need not
        for page in range(0, 2**26, mmap.PAGESIZE):
            pages[page] = 1
    peak = peak_memory_bytes(CPU)
    assert 2**25 < peak - before < 2**28
    reset_peak_memory(CPU)
    assert peak_memory_bytes(CPU) < peak - 2**25


def test_memory_is_measured_where_the_peak_cannot_be_reset(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError("clear_refs")

    policy = make_policy()
    buffer = demonstrated(policy)
    monkeypatch.setattr(Path, "write_text", refuse)
    assert run(policy, "sft", buffer).costs.peak_memory_bytes > 0


def test_missing_log_probs_are_user_errors(make_policy: MakePolicy) -> None:
    policy = make_policy()
    row = Trajectory("", "", [20], [21], "a", source="policy", reward=1.0, reference_logp=[-1.0])

    class One:
        def __init__(self, row: Trajectory) -> None:
            self.row = row

        def draw(self) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
            return [replace(row, behaviour_logp=[-1.0]), self.row], [(0, 1)]  # the first lacks nothing

    for name, bare, message in (
        ("grpo", row, "no behaviour log-probs: fill it with `rlzoo rollout`"),
        ("rft", replace(row, reward=None), "needs reward"),
    ):
        with pytest.raises(UserError, match=message):
            Trainer(policy, get_objective(name), One(bare), QUICK).run()
    with pytest.raises(UserError, match="no groups"):
        train(policy, get_objective("grpo"), demonstrated(policy), QUICK)
    steps = Trainer(policy, get_objective("dpo"), One(replace(row, reference_logp=None)), QUICK).run().steps
    assert steps[0]["margin"] == 0, "the policy as it came scores what a row lacks"


def test_training_computes_reference_log_probs_of_the_policy_as_it_comes(make_policy: MakePolicy) -> None:
    policy, kept = make_policy(), list[Policy | None]()
    settings, keep = QUICK.model_copy(update={"steps": 1}), lambda trainer, _: kept.append(trainer.models.initial)
    (first,) = train(policy, get_objective("dpo"), sampled(policy), settings, callbacks=[keep]).steps
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    assert kept == [None], "with its log-probs in the buffer, the model itself is not kept in memory"
    policy = make_policy()
    first, second = run(policy, "iw-sft", demonstrated(policy), batch_size=6).steps
    assert first["weight"] == pytest.approx(1, abs=1e-6)
    assert abs(second["weight"] - 1) > 1e-4


def test_runs_in_one_process_do_not_disturb_each_other(make_policy: MakePolicy) -> None:
    buffer = demonstrated(make_policy())
    alone = run(make_policy(), "sft", buffer).steps
    other = make_policy("llama", dtype=torch.float32)
    run(other, "ppo", sampled(other))
    assert run(make_policy(), "sft", buffer).steps == alone
    assert next(other.parameters()).dtype == torch.float32


def test_weight_decay_and_clipping_reach_the_optimizer(make_policy: MakePolicy) -> None:
    buffer = demonstrated(make_policy())
    norms = {}
    for limit in (1e-3, 1e9):
        policy = make_policy()
        kept: list[float] = []

        def measure(trainer: Trainer, step: int, kept: list[float] = kept) -> None:
            gradients = [p.grad.norm() for p in trainer.policy.parameters() if p.grad is not None]
            kept.append(float(torch.stack(gradients).norm()))

        settings = QUICK.model_copy(update={"steps": 1, "max_gradient_norm": limit})
        (step,) = train(policy, get_objective("sft"), buffer, settings, callbacks=[measure]).steps
        norms[limit] = (step["gradient_norm"], kept[0])
    assert norms[1e9][0] == pytest.approx(norms[1e9][1]) and norms[1e9][0] > 1e-2
    assert norms[1e-3] == pytest.approx((norms[1e9][0], 1e-3), rel=1e-3)


def test_completion_positions_are_the_only_ones_that_count(make_policy: MakePolicy) -> None:
    policy = make_policy()
    sequences = Sequences.collate([[20, 21]], [[22]], policy.device)
    policy(sequences).logp.sum().backward()
    logits = policy.model(input_ids=torch.tensor([[20, 21, 22]])).logits[0, 1]
    (expected,) = torch.autograd.grad(logits.log_softmax(0)[22], policy.model.transformer.wte.weight)
    torch.testing.assert_close(policy.model.transformer.wte.weight.grad, expected, rtol=1e-9, atol=1e-12)
