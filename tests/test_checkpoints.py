"""Training that is stopped, killed, runs out of memory or meets infinite numbers."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.problems import Problem, demonstrations
from rlzoo.config import Experiment, Training
from rlzoo.errors import UserError
from rlzoo.inputs import MovingReference
from rlzoo.jobs.interrupts import Terminated
from rlzoo.objective import Objective, get_objective
from rlzoo.policy import Policy, Sequences
from rlzoo.training import Trainer, TrainingRecord, train, with_reference
from rlzoo.training.batches import BufferSource
from rlzoo.training.checkpoints import Checkpoints
from rlzoo.types import Coefficients, Selection, TokenBatch, Trajectory

MakePolicy = Callable[..., Policy]
PROBLEMS = [Problem(str(i), f"{i}+{i}=?\n", {"answer": str(2 * i)}, (f"#### {2 * i}",)) for i in range(6)]
EVERY = Training(steps=7, batch_size=4, learning_rate=1e-2, checkpoint_seconds=0)
OBJECTIVES = ("sft", "iw-sft", "iw-sft-ema", "rft", "dpo", "ppo", "grpo", "kto", "sdft")
OPTIONS: dict[str, dict[str, Any]] = {
    "iw-sft-ema": {"variant": "ema", "ema_decay": 0.5},
    "sdft": {"template": "{prompt}Once more: {prompt}", "teacher_decay": 0.5},
}


def rows_of(policy: Policy) -> OfflineBuffer:
    """Demonstrations, and samples of which every second one is right."""
    shown = demonstrations(policy.tokenizer, PROBLEMS)
    samples = [
        replace(
            row, source="policy", reward=float(i % 2), completion_ids=row.completion_ids[i % 2 :],
            behaviour_logp=[-1.0] * len(row.completion_ids[i % 2 :]),
        )
        for row in shown
        for i in range(4)
    ]  # fmt: skip
    return OfflineBuffer.from_trajectories([*shown, *samples])


def trained(
    make_policy: MakePolicy,
    objective: str,
    folder: Path | None,
    settings: Training = EVERY,
    callback: Callable[[Trainer, int], None] = lambda trainer, step: None,
) -> tuple[Policy, TrainingRecord]:
    policy = make_policy("llama", torch.float32)

    def noisy(trainer: Trainer, step: int) -> None:
        noise = [step, float(torch.rand(())), float(np.random.rand()), random.random()]
        trainer.record.kept.setdefault("noise", []).append(noise)
        callback(trainer, step)

    np.random.seed(5)
    random.seed(5)
    asked = get_objective(objective.removesuffix("-ema"), **OPTIONS.get(objective, {}))
    logs = None if folder is None else folder / "logs"
    record = train(policy, asked, rows_of(policy), settings, 3, [noisy], folder=logs, checkpoints=folder)
    return policy, record


def same(one: tuple[Policy, TrainingRecord], other: tuple[Policy, TrainingRecord]) -> bool:
    (policy, record), (policy_2, record_2) = one, other
    weights = [torch.equal(a, b) for a, b in zip(policy.parameters(), policy_2.parameters(), strict=True)]
    costs = [
        {k: v for k, v in r.costs.as_dict().items() if k in ("flops", "gradient_tokens")} for r in (record, record_2)
    ]
    return all(weights) and record.steps == record_2.steps and record.kept == record_2.kept and costs[0] == costs[1]


class StopError(Exception):
    pass


def stop_at(last: int) -> Callable[[Trainer, int], None]:
    def stop(trainer: Trainer, step: int) -> None:
        if step == last:
            raise StopError

    return stop


# Going on


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    make_policy: MakePolicy, tmp_path: Path, objective: str
) -> None:
    """Optimizer, schedule, place in a shuffled epoch, critic, moving reference, random numbers, costs: all go on."""
    whole = trained(make_policy, objective, None)
    with pytest.raises(StopError):
        trained(make_policy, objective, tmp_path, callback=stop_at(3))
    with pytest.raises(StopError):
        trained(make_policy, objective, tmp_path, callback=stop_at(6))
    assert same(trained(make_policy, objective, tmp_path), whole)
    assert same(trained(make_policy, objective, tmp_path), whole), "a run at its end is not trained further"


@pytest.mark.slow
def test_several_updates_a_batch_and_adapters_go_on_too(make_policy: MakePolicy, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    settings = EVERY.model_validate({**EVERY.model_dump(), "updates_per_batch": 3, "lora": {"rank": 2}})
    whole = trained(make_policy, "grpo", None, settings)
    with pytest.raises(StopError):
        trained(make_policy, "grpo", tmp_path, settings, stop_at(5))
    assert same(trained(make_policy, "grpo", tmp_path, settings), whole)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [2, 6, 7])
def test_a_budget_goes_on_too_and_so_does_the_end(make_policy: MakePolicy, tmp_path: Path, stopped: int) -> None:
    """The seventh of at most 90 steps spends the budget, in the middle of its batch."""
    budget = {"gradient_tokens": 240}
    settings = EVERY.model_validate({**EVERY.model_dump(), "steps": 90, "budget": budget, "updates_per_batch": 2})
    _, record = whole = trained(make_policy, "sft", None, settings)
    assert record.ended == "budget" and len(record.steps) == 7, record.costs.gradient_tokens
    with pytest.raises(StopError):
        trained(make_policy, "sft", tmp_path, settings, stop_at(stopped))
    for _ in range(2):
        resumed = trained(make_policy, "sft", tmp_path, settings)
        assert same(resumed, whole) and resumed[1].ended == "budget"


def test_a_run_that_a_callback_ended_is_not_trained_further(make_policy: MakePolicy, tmp_path: Path) -> None:
    def end(trainer: Trainer, step: int) -> None:
        if step == 3:
            trainer.stop("enough")

    _, record = whole = trained(make_policy, "sft", tmp_path, callback=end)
    assert record.ended == "enough" and len(record.steps) == 3
    assert same(trained(make_policy, "sft", tmp_path), whole)


@pytest.mark.usefixtures("hears_interrupts")
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_is_raised_after_a_checkpoint(
    make_policy: MakePolicy, tmp_path: Path, number: signal.Signals, raised: type[BaseException]
) -> None:
    settings = EVERY.model_copy(update={"checkpoint_seconds": 1e6})
    whole = trained(make_policy, "sft", None, settings)
    done: list[int] = []

    def interrupt(trainer: Trainer, step: int) -> None:
        done.append(step)
        if step == 4:
            signal.raise_signal(number)
            done.append(-1)  # not raised where it falls

    with pytest.raises(raised) as caught:
        trained(make_policy, "sft", tmp_path, settings, interrupt)
    assert caught.type is raised
    assert done == [1, 2, 3, 4, -1]
    assert [path.stem for path in tmp_path.glob("*.result")] == ["step-00000004"]
    assert same(trained(make_policy, "sft", tmp_path, settings), whole)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "state"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(make_policy: MakePolicy, tmp_path: Path, damage: str) -> None:
    whole = trained(make_policy, "sft", None)
    with pytest.raises(StopError):
        trained(make_policy, "sft", tmp_path, callback=stop_at(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-0000000{step}.{kind}" for step in (4, 5) for kind in ("result", "safetensors")
    ]
    newest = tmp_path / ("step-00000005.result" if damage == "state" else "step-00000005.safetensors")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        newest.unlink()
    else:
        newest.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    found = Checkpoints(tmp_path, 0).newest()
    assert found is not None and found[1]["step"] == 4
    assert same(trained(make_policy, "sft", tmp_path), whole)


OTHER: dict[str, Any] = {
    "budget": {"tokens": 1e6}, "steps": 9, "batch_size": 3, "updates_per_batch": 2, "mini_batches": 2,
    "learning_rate": 2e-2, "betas": (0.9, 0.99),
    "weight_decay": 0.0, "warmup_ratio": 0.5, "max_gradient_norm": 2.0, "importance_cap": 2.0,
    "max_completion_tokens": 7, "special_tokens": "allow", "turns": "all", "behaviour": "current",
    "dtype": "bfloat16-mixed", "lora": {"rank": 2}, "gradient_checkpointing": True, "on_nonfinite": "skip",
    "device": "cpu", "deterministic": True, "packing": "packed", "compile": False,
    "max_length": 30, "chat_template": "other",
}  # fmt: skip
"""Another value of each setting that decides what a run finds."""


@pytest.mark.slow
def test_the_checkpoints_of_another_run_are_refused(make_policy: MakePolicy, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        trained(make_policy, "iw-sft", tmp_path, callback=stop_at(3))
    free = {"token_budget", "checkpoint_seconds", "trackers", "epochs"}  # epochs are steps by then
    assert OTHER.keys() | free == Training.model_fields.keys()
    for name, value in OTHER.items():
        settings = Training.model_validate({**EVERY.model_dump(), name: value})
        with pytest.raises(UserError, match=rf"of another run \({name}: .* there, .* here\): remove them"):
            trained(make_policy, "iw-sft", tmp_path, settings)
    with pytest.raises(UserError, match="objective: 'iw-sft' there, 'dft' here"):
        trained(make_policy, "dft", tmp_path)
    with pytest.raises(UserError, match=r"objective\.\w+: .* there, .* here"):
        trained(make_policy, "iw-sft-ema", tmp_path)

    def mixed(*arguments: Any) -> Policy:
        """As auto may mean."""
        policy = make_policy(*arguments)
        policy.compute = torch.bfloat16
        return policy

    with pytest.raises(UserError, match=r"computed: 'cpu, torch.float32' there, 'cpu, torch.bfloat16' here"):
        trained(mixed, "iw-sft", tmp_path)
    other = EVERY.model_copy(update={"token_budget": 40, "checkpoint_seconds": 9.0, "trackers": ["tensorboard"]})
    assert len(trained(make_policy, "iw-sft", tmp_path, other)[1].steps) == 7


def test_micro_batches_that_had_to_be_smaller_stay_so(make_policy: MakePolicy, tmp_path: Path) -> None:
    """Or each continuation would run out of memory again. One that is asked for fewer tokens yet takes fewer."""

    def shrink(trainer: Trainer, step: int) -> None:
        trainer.micro.token_budget = 100
        stop_at(3)(trainer, step)

    with pytest.raises(StopError):
        trained(make_policy, "sft", tmp_path, callback=shrink)
    for asked, taken in ((EVERY.token_budget, 100), (60, 60)):
        budgets: list[int] = []

        def keep(trainer: Trainer, step: int, budgets: list[int] = budgets) -> None:
            budgets.append(trainer.micro.token_budget)
            raise StopError

        with pytest.raises(StopError):
            trained(make_policy, "sft", tmp_path, EVERY.model_copy(update={"token_budget": asked}), keep)
        assert budgets == [taken]


def test_a_source_that_cannot_go_on_is_told_before_the_end(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy()
    buffer = rows_of(policy)

    class Plain:
        def draw(self) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
            return [buffer[0]], [(0,)]

    with pytest.raises(UserError, match="a checkpoint cannot hold a Plain"):
        Trainer(policy, get_objective("sft"), Plain(), EVERY, checkpoints=tmp_path).run()


@pytest.mark.parametrize("drawn", [0, 1, 2, 3, 7])
def test_the_place_in_the_epochs_is_restored(make_policy: MakePolicy, drawn: int) -> None:
    policy = make_policy()
    buffer = rows_of(policy)
    view = buffer.view(Selection.DEMONSTRATIONS)

    def source() -> BufferSource:
        return BufferSource(buffer, view, 4, seed=9)

    first, second = source(), source()
    for _ in range(drawn):
        first.draw()
    second.restore(first.state())
    assert [first.draw() for _ in range(5)] == [second.draw() for _ in range(5)]


@pytest.mark.parametrize("drawn", range(8))
def test_a_batch_that_is_read_ahead_changes_no_row_and_no_state(make_policy: MakePolicy, drawn: int) -> None:
    buffer = rows_of(make_policy())
    view = buffer.view(Selection.DEMONSTRATIONS)
    plain, ahead, resumed = (BufferSource(buffer, view, 4, seed=9) for _ in range(3))
    for _ in range(drawn):
        ahead.draw_ahead()
        assert ahead.draw() == plain.draw()
    ahead.draw_ahead()
    ahead.draw_ahead()  # once is enough
    assert ahead.state() == plain.state()
    resumed.draw_ahead()
    resumed.restore(ahead.state())
    following = [plain.draw() for _ in range(5)]
    assert [ahead.draw() for _ in range(5)] == following == [resumed.draw() for _ in range(5)]


def test_a_row_that_cannot_be_read_is_an_error_of_its_own_step(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the step in which it is read ahead."""
    policy, bad, done = make_policy("llama", torch.float32), set[int](), list[int]()
    buffer = rows_of(policy)
    source = BufferSource(buffer, buffer.view(Selection.DEMONSTRATIONS), 4, seed=9)
    read = type(buffer).at

    def rows(self: Any, indices: Sequence[int]) -> Any:
        if bad & set(indices):
            raise UserError(f"row {indices[0]} is damaged")
        return read(self, indices)

    def damage(trainer: Trainer, step: int) -> None:
        done.append(step)
        if step == 1:
            bad.update(range(len(buffer)))

    monkeypatch.setattr(type(buffer), "at", rows)
    trainer = Trainer(policy, get_objective("sft"), source, EVERY, [damage])
    with pytest.raises(UserError, match=r"row \d+ is damaged"):
        trainer.run()
    assert done == [1, 2]  # the second batch was read before the damage, and the third was not


def test_what_a_callback_keeps_is_given_back_into_its_own_list(make_policy: MakePolicy, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        trained(make_policy, "sft", tmp_path, callback=stop_at(4))
    policy, held = make_policy("llama", torch.float32), list[Any]()
    record = TrainingRecord(kept={"noise": held}, events=["lost"])
    source = BufferSource(rows_of(policy), rows_of(policy).view(Selection.DEMONSTRATIONS), 4, seed=3)
    trainer = Trainer(policy, get_objective("sft"), source, EVERY, record=record, checkpoints=tmp_path)
    assert trainer.step == 3 and [row[0] for row in held] == [1, 2, 3] and record.events == []
    assert record.costs.gradient_tokens > 0 and record.costs.wall_seconds > 0


@pytest.mark.slow
def test_checkpoints_come_when_they_are_due(
    make_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every batch takes 4 seconds, and one is due 10 seconds after the last."""
    now = 1000.0
    monkeypatch.setattr("rlzoo.training.checkpoints.time.monotonic", lambda: now)

    def passes(trainer: Trainer, step: int) -> None:
        nonlocal now
        now += 4.0
        seen.append(sorted(int(path.stem.removeprefix("step-")) for path in tmp_path.glob("*.result")))

    seen: list[list[int]] = []
    settings = EVERY.model_copy(update={"steps": 8, "checkpoint_seconds": 10.0})
    trained(make_policy, "sft", tmp_path, settings, passes)
    assert seen == [[], [], [], [3], [3], [3], [3, 6], [3, 6]]
    none = EVERY.model_copy(update={"checkpoint_seconds": None})
    assert len(trained(make_policy, "sft", tmp_path / "none", none)[1].steps) == 7 and not (tmp_path / "none").exists()


# Numbers that are not finite


class Boundless(Objective):
    """SFT that reports an infinite loss beside a sound gradient."""

    name = "boundless"
    learns_from = Selection.DEMONSTRATIONS

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(torch.ones_like(batch.logp), torch.full_like(batch.logp, torch.inf))


def test_a_loss_that_is_not_finite_stops_the_run(make_policy: MakePolicy) -> None:
    policy = make_policy()
    with pytest.raises(UserError, match=r"step 1: the gradient norm is \d.* and the loss inf"):
        train(policy, Boundless(), rows_of(policy), EVERY)


class Steep(Objective):
    """SFT whose gradient is too long for its norm to be a float32, with a finite loss."""

    name = "steep"
    learns_from = Selection.DEMONSTRATIONS

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(torch.full_like(batch.logp, 1e30))


def test_a_gradient_that_is_not_finite_stops_the_run(make_policy: MakePolicy) -> None:
    policy = make_policy("llama", torch.float32)
    with pytest.raises(UserError, match=r"step 1: the gradient norm is inf and the loss \d"):
        train(policy, Steep(), rows_of(policy), EVERY)


class Broken(Objective):
    """SFT with a moving reference, whose coefficients are infinite in the third step that is made with it."""

    name = "broken"
    learns_from = Selection.DEMONSTRATIONS
    requires = (MovingReference(0.5),)
    calls = 0

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        type(self).calls += 1
        return Coefficients(torch.full_like(batch.logp, torch.inf if type(self).calls == 3 else 1.0))


def broken_run(policy: Policy, folder: Path | None, on_nonfinite: str) -> tuple[TrainingRecord, list[list[Tensor]]]:
    Broken.calls = 0
    seen: list[list[Tensor]] = []

    def look(trainer: Trainer, step: int) -> None:
        (reference,) = trainer.models.moving.values()
        both = trainer.policy, reference
        seen.append([p.detach().clone() for model in both for p in model.parameters()])

    settings = EVERY.model_validate({**EVERY.model_dump(), "on_nonfinite": on_nonfinite})
    return train(policy, Broken(), rows_of(policy), settings, 0, [look], checkpoints=folder), seen


def test_a_step_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"step 3: the gradient norm is (nan|inf).*on_nonfinite=skip"):
        broken_run(make_policy(), tmp_path, "stop")
    found = Checkpoints(tmp_path, 0).newest()
    assert found is not None and found[1]["step"] == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found[0].values() if tensor.is_floating_point())


def test_a_step_that_is_not_finite_can_be_skipped_and_is_counted(make_policy: MakePolicy) -> None:
    record, seen = broken_run(make_policy(), None, "skip")
    assert len(record.steps) == 7 and len(record.events) == 1
    assert json.loads(json.dumps(record.plain_steps(), allow_nan=False))[2]["gradient_norm"] is None
    assert record.events[0].startswith("step 3: ") and record.events[0].endswith("skipped")
    changed = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairwise(seen)]
    assert changed == [True, False, True, True, True, True], "neither the policy nor what follows it"
    rates = [row["learning_rate"] for row in record.steps]
    assert all(a != b for a, b in pairwise(rates)), "the schedule goes on"
    assert all(bool(torch.isfinite(p).all()) for p in seen[-1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_never_saved(value: float, make_policy: MakePolicy, tmp_path: Path) -> None:
    def spoil(trainer: Trainer, step: int) -> None:
        if step == 7:
            with torch.no_grad():
                next(trainer.policy.parameters())[0] = value

    with pytest.raises(UserError, match="the last step made weights infinite"):
        trained(make_policy, "sft", tmp_path, callback=spoil)
    found = Checkpoints(tmp_path, 0).newest()
    assert found is not None and found[1]["step"] == 6


# Memory


def hungry(policy: Policy, entries: int) -> Policy:
    """The policy, which runs out of memory in a forward pass of more padded tokens."""
    forward = policy.forward

    def limited(sequences: Sequences | None = None, **options: Any) -> Any:
        if sequences is not None and sequences.ids.numel() > entries:
            raise MemoryError
        return forward(sequences, **options)

    policy.forward = limited  # type: ignore[method-assign]
    return policy


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_micro_batches_are_halved_until_they_fit(make_policy: MakePolicy, name: str) -> None:
    policy = make_policy()
    buffer = OfflineBuffer.from_trajectories(list(with_reference(rows_of(policy), policy)))
    settings = EVERY.model_copy(update={"steps": 2, "batch_size": 12})
    whole = train(make_policy(), get_objective(name), buffer, settings)
    found = train(hungry(make_policy(), 40), get_objective(name), buffer, settings)
    longest = max(len(row.prompt_ids) + len(row.completion_ids) for row in buffer)
    assert longest <= 20 and found.events
    told = [re.fullmatch(r"step 1: out of memory with (\d+) tokens .*, now (\d+)", event) for event in found.events]
    pairs = [tuple(map(int, match.groups())) for match in told if match is not None]
    assert len(pairs) == len(told) and pairs[0][0] == 4096 and pairs[0][1] < 12 * longest
    assert all(now <= before / 2 for before, now in pairs) and 20 <= pairs[-1][1] <= 40
    for row, parted in zip(whole.steps, found.steps, strict=True):
        assert parted == pytest.approx(row, rel=1e-6, abs=1e-9)
    with pytest.raises(UserError, match="out of memory with one sequence per micro-batch"):
        train(hungry(make_policy(), 4), get_objective(name), buffer, settings)


def test_a_failed_attempt_holds_no_gradients_when_its_memory_is_given_back(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, calls, held = make_policy(), count(1), list[bool]()
    forward = policy.forward

    def second_fails(*arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and next(calls) == 2:
            raise MemoryError
        return forward(*arguments, **options)

    policy.forward = second_fails  # type: ignore[method-assign]
    release = lambda: held.append(any(p.grad is not None for p in policy.parameters()))  # noqa: E731
    monkeypatch.setattr("rlzoo.policy.microbatches.release_memory", release)
    train(policy, get_objective("sft"), rows_of(policy), EVERY.model_copy(update={"steps": 1, "token_budget": 20}))
    assert held == [False]


def test_all_that_is_scored_before_training_keeps_to_the_token_budget(make_policy: MakePolicy) -> None:
    policy = make_policy()
    bare = OfflineBuffer.from_trajectories(
        [replace(row, behaviour_logp=None) for row in rows_of(policy) if row.source == "policy"]
    )
    changes: dict[str, Any] = {"steps": 1, "token_budget": 40, "behaviour": "current"}
    record = train(hungry(policy, 40), get_objective("grpo"), bare, EVERY.model_copy(update=changes))
    assert [event for event in record.events if "memory" in event] == []


HUNGRY = """
import resource, torch
from pathlib import Path
from rlzoo.buffers import OfflineBuffer
from rlzoo.config import Training
from rlzoo.inputs import MovingReference
from rlzoo.objective import get_objective
from rlzoo.policy import load_policy
from rlzoo.training import train
from rlzoo.types import Trajectory

torch.set_num_threads(1)
buffer = OfflineBuffer.from_trajectories([Trajectory("p", "c", [20] * 128, [21] * 128, "0", "demonstration")] * 16)
for budget in (256, 16 * 256):
    if budget > 256:  # what is loaded once has been
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 80 * 2**20, -1))
    settings = Training(steps=2, batch_size=16, token_budget=budget)
    record = train(load_policy("embedded"), get_objective("sft"), buffer, settings)
    print(*record.events, *(step["gradient_norm"] for step in record.steps), sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space")
def test_a_batch_that_does_not_fit_is_taken_in_smaller_parts() -> None:
    """The limit on memory is the system's, and the gradient is the one of the whole batch."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", HUNGRY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second, *events, third, fourth = done.stdout.splitlines()
    assert events[0].startswith("step 1: out of memory with 4096 tokens per micro-batch, now 2048")
    assert [float(third), float(fourth)] == pytest.approx([float(first), float(second)], rel=1e-5)


def test_smaller_parts_of_an_experiment() -> None:
    experiment = Experiment.model_validate(
        {
            "name": "x", "model": "embedded", "reward": "exact", "train": {"source": "world:facts/train"},
            "benchmarks": {"facts": {"source": "world:facts/test"}},
            "algorithms": {"sft": {}, "dft": {"training": {"token_budget": 100}}},
        }
    )  # fmt: skip
    smaller: Any = experiment.with_smaller_batches(4)
    assert experiment.training.token_budget == "auto" and smaller.training_of("sft").token_budget == "auto/4"
    assert smaller.training_of("dft").token_budget == 25
    assert smaller.evaluation.batch_size == experiment.evaluation.batch_size // 4
    assert experiment.with_smaller_batches(1) is experiment
