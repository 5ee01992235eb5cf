"""Training ends when its budget is spent, and its learning rate follows what is spent."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparisons import small
from rich.console import Console

from rlzoo import cli
from rlzoo.buffers import OfflineBuffer
from rlzoo.comparison import one_cell, runner
from rlzoo.comparison.curves import is_flat
from rlzoo.comparison.forecast import forecast
from rlzoo.config import Budget, Training
from rlzoo.errors import UserError
from rlzoo.objective import get_objective
from rlzoo.policy import Policy
from rlzoo.policy.loading import load_shape
from rlzoo.training import Costs, Trainer, TrainingRecord
from rlzoo.training.schedule import Progress, cosine, cosine_between
from rlzoo.types import Trajectory

MakePolicy = Callable[..., Policy]
ROWS = [Trajectory("", "", [5, 6], [20 + i, 21, 2], str(i), source="demonstration") for i in range(4)]
STEP = 4 * 5
"""Gradient tokens per step: four rows of two prompt and three completion tokens."""


class Sampled:
    """The same rows at every draw, each time said to have been sampled at a cost."""

    def __init__(self, sampled: int = 0) -> None:
        self.sampled = sampled
        self.draws = 0

    def draw(self) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
        self.draws += 1
        return ROWS, [(i,) for i in range(4)]

    def spent(self) -> dict[str, float]:
        return {"sampled_tokens": self.sampled}


def trained(
    policy: Policy, source: Sampled | None = None, record: TrainingRecord | None = None, **settings: Any
) -> Any:
    some = Training.model_validate({"steps": 1000, "learning_rate": 1e-3, **settings})
    trainer = Trainer(policy, get_objective("sft"), source or Sampled(), some, record=record)
    trainer.run()
    return trainer.record


def test_a_budget_is_one_cost() -> None:
    assert (Budget(tokens=5).cost, Budget(tokens=5).amount) == ("tokens", 5.0)
    for wrong in ({}, {"tokens": 1, "flops": 2}, {"tokens": 0}, {"flops": math.inf}, {"seconds": 5}):
        with pytest.raises(ValueError, match=r"exactly one|greater than|finite|not permitted"):
            Budget.model_validate(wrong)


def test_training_ends_after_the_step_that_reaches_the_budget(make_policy: MakePolicy) -> None:
    policy = make_policy("gpt2")

    def ended(sampled: int = 0, **settings: Any) -> tuple[int, str | None]:
        record = trained(policy, Sampled(sampled), **settings)
        return len(record.steps), record.ended

    assert ended(budget={"gradient_tokens": 3 * STEP}) == (3, "budget")
    assert ended(budget={"gradient_tokens": 3 * STEP + 1}) == (4, "budget")
    assert ended(7, budget={"gradient_tokens": 3 * STEP}) == (3, "budget"), "samples are other tokens"
    assert ended(30, budget={"tokens": 3 * (STEP + 30)}) == (3, "budget")
    assert ended(30, budget={"tokens": 3 * (STEP + 30) + 1}, updates_per_batch=2) == (5, "budget"), "30 per 2 steps"
    flops = trained(policy, steps=1).costs.flops
    assert ended(budget={"flops": 2.5 * flops}) == (3, "budget")
    assert ended(steps=2) == (2, "steps")
    record = trained(policy, steps=2, budget={"gradient_tokens": 8 * STEP})
    assert (len(record.steps), record.ended) == (2, "steps")
    told = "training ended after 2 steps with 25 % of the budget spent: raise training.steps"
    assert told in record.events


def test_what_was_spent_before_counts_and_may_be_too_much(make_policy: MakePolicy) -> None:
    policy = make_policy("gpt2")
    before = TrainingRecord(costs=Costs(sampled_tokens=2 * STEP))
    record = trained(policy, record=before, budget={"tokens": 6 * STEP})
    assert len(record.steps) == 4 and record.costs.tokens == 6 * STEP
    # the schedule covers what is left: the rates of four steps
    plain = trained(policy, steps=4, warmup_ratio=0.25)
    again = TrainingRecord(costs=Costs(sampled_tokens=2 * STEP))
    record = trained(policy, record=again, budget={"tokens": 6 * STEP}, warmup_ratio=0.25)
    rates, expected = ([row["learning_rate"] for row in one.steps] for one in (record, plain))
    assert rates == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UserError, match=r"training.budget.tokens of this run is 40, .* cost 40 before the first step"):
        trained(policy, record=TrainingRecord(costs=Costs(sampled_tokens=2 * STEP)), budget={"tokens": 2 * STEP})


@pytest.mark.parametrize(("steps", "ratio"), [(10, 0.0), (10, 0.2), (4, 0.5), (7, 0.0)])
def test_steps_of_equal_cost_have_the_schedule_of_steps(steps: int, ratio: float) -> None:
    settings = Training(steps=steps, warmup_ratio=ratio)
    found = [cosine_between(i / steps, (i + 1) / steps, ratio) for i in range(steps)]
    assert found == pytest.approx([cosine(i, settings) for i in range(steps)], rel=1e-12)


def test_steps_of_unequal_cost_follow_what_is_spent() -> None:
    settings = Training(steps=100, warmup_ratio=0.25, learning_rate=1.0, budget=Budget(gradient_tokens=80))
    costs = Costs()
    progress = Progress(settings, costs)
    rates = []
    for step, tokens in enumerate((10, 30, 20, 25), start=1):
        costs.gradient_tokens += tokens
        progress.move_to(step, costs)
        rates.append(progress.learning_rate())
    # before: 0, 1/8, 4/8, 6/8. Warm-up: (1/8)/(1/4 + 1/8) and (4/8)/(1/4 + 3/8); then (1 + cos(π/3))/2 and
    # (1 + cos(2π/3))/2
    assert rates == pytest.approx([1 / 3, 0.8, 0.75, 0.25])
    assert progress.ended == "budget" and progress.fraction == 1 and str(progress) == "step 4/100, 100 % of the budget"


def test_parts_of_training_are_parts_of_the_budget() -> None:
    def completed(parts: int, *spent: int) -> list[int]:
        costs = Costs()
        progress, found = Progress(Training(budget=Budget(gradient_tokens=100)), costs), []
        for step, tokens in enumerate(spent, start=1):
            costs.gradient_tokens += tokens
            progress.move_to(step, costs)
            found += [step] * progress.completes_part(parts)
        return found

    assert completed(4, 20, 20, 20, 20, 20) == [2, 3, 4, 5]
    assert completed(4, 60, 10, 50) == [1, 3]
    assert completed(1, 60, 10, 50) == [3]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_comparison_at_equal_cost(tmp_path: Path) -> None:
    """Samples of the shared buffer count, the curve has points at fractions of the budget, and the plan agrees."""
    training = {"steps": 500, "batch_size": 8, "budget": {"tokens": 1500}}
    rows = {"sft": {}, "rft": {}, "grpo": {"mode": "online"}, "kto": {"training": {"budget": {"flops": 2e10}}}}
    evaluation = {"samples": 1, "max_new_tokens": 8, "curve_points": 2, "curve_problems": 2, "curve_samples": 1}
    experiment = small(rows, training=training, evaluation=evaluation)
    results = runner.compare(experiment, tmp_path / "out", 1, console=Console(file=io.StringIO()))
    sampled = results["buffer"]["sampled_tokens"]
    cells = {cell["algorithm"]: cell for cell in results["cells"]}
    plan = forecast(experiment, load_shape("embedded"), sampled / results["buffer"]["samples"])
    for row in plan.rows:
        cell, costs = cells[row.algorithm], cells[row.algorithm]["costs"]
        steps, tokens = len(cell["training"]), costs["gradient_tokens"] + costs["sampled_tokens"]
        assert cell["ended"] == "budget" and 3 < steps < 500
        assert row.steps == pytest.approx(steps, rel=0.2), row.algorithm
        if row.algorithm == "kto":
            assert 2e10 <= costs["flops"] < 2e10 * (1 + 2 / steps)
        else:
            assert 1500 <= tokens < 1500 * (1 + 2 / steps)
        assert cell["start"]["sampled_tokens"] == (sampled if row.algorithm in ("rft", "kto") else 0)
        first, last = cell["curve"]
        assert last["step"] == steps and last["flops"] == costs["flops"] and last["seconds"] <= costs["wall_seconds"]
        assert cell["start"]["gradient_tokens"] == 0 < first["gradient_tokens"] < last["gradient_tokens"]
        rates = [step["learning_rate"] for step in cell["training"]]
        assert rates[-1] < 0.2 * max(rates), "the schedule ends with the budget"
    with pytest.raises(
        UserError, match=rf"training\.budget\.tokens of rft is 20, .* has cost {sampled} before"
    ) as told:
        runner.compare(small({"sft": {}, "rft": {}}, training__budget={"tokens": 20}), tmp_path / "none", 1)
    assert "\n" not in str(told.value) and not (tmp_path / "none").exists()
    with pytest.raises(UserError, match=r"training\.budget\.tokens of rft is 20"):
        forecast(small({"sft": {}, "rft": {}}, training__budget={"tokens": 20}), load_shape("embedded"))


def test_a_curve_is_flat_if_it_does_not_rise_by_more_than_its_error() -> None:
    low, high = [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]  # rises by 1/2 ± 0.29
    one = [1.0, 0.0, 0.0, 1.0]  # by 1/4 ± 1/4, which is not more
    assert not is_flat([low], 1) and is_flat([low, low], 1) and not is_flat([low, low], 2)
    assert is_flat([low, one], 1) and not is_flat([low, high], 1)
    assert not is_flat([low, one, high], 1), "a slow rise is measured from where it began"
    assert is_flat([high, low, low], 2) and not is_flat([low, high, low], 2)
    assert is_flat([[0.5], [0.5]], 1) and not is_flat([[0.5], [1.0]], 1)


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_cell_ends_when_its_validation_curve_is_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = {"samples": 2, "k": 1, "max_new_tokens": 4, "curve_points": 8, "curve_problems": 3, "until_flat": 2}
    rows: dict[str, Any] = {"sft": {}, "dft": {}}
    experiment = small(rows, evaluation=evaluation, training__steps=16, validation__limit=3)
    real, run, now = one_cell.curve_point, one_cell._run_cell, []

    def named(experiment: Any, cell: Any, *more: Any) -> Any:
        now.append(cell.algorithm)
        return run(experiment, cell, *more)

    def point(policy: Policy, experiment: Any, step: int, *more: Any, **named: Any) -> dict[str, Any]:
        """One row rises for all of its steps, the other for half of them."""
        found = real(policy, experiment, step, *more, **named)
        assert len(found["validation"]["by_problem"]) == 3 and found["metrics"]["facts"]["by_problem"]
        rises = (step if now == ["sft"] else min(step, 8)) / 16
        return {**found, "validation": {"avg_at_k": rises, "by_problem": [rises] * 3}}

    monkeypatch.setattr(one_cell, "_run_cell", named)
    monkeypatch.setattr(one_cell, "curve_point", point)
    results = runner.compare(experiment, tmp_path / "out", 1, console=Console(file=io.StringIO()))
    assert [(c["algorithm"], c["ended"], len(c["training"])) for c in results["cells"]] == [
        ("sft", "steps", 16),
        ("dft", "flat", 12),
    ]
    for changes, told in (
        ({"validation": None}, "until_flat needs a validation problem set"),
        ({"evaluation": {**evaluation, "curve_points": 3}}, "curve_points = 3 must be at least 4"),
    ):
        with pytest.raises(UserError, match=told):
            small(rows, **{"evaluation": evaluation, **changes})


@pytest.mark.parametrize("option", [["--set", "training.budget.gradient_tokens=25"], ["--steps", "2"]])
def test_the_command_shows_how_much_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    OfflineBuffer.from_trajectories(ROWS).save(tmp_path / "buffer")
    command = ["train", "sft", "--buffer", "buffer", "--out", "out", "--set", "batch_size=4", *option]
    assert cli.main(command) == 0
    budget = option[0] == "--set"
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("step 2/100, 100 % of the budget  loss " if budget else "step 2/2  loss ")
    found = json.loads((tmp_path / "out" / "training.json").read_text())
    assert found["ended"] == ("budget" if budget else "steps") and len(found["steps"]) == 2


@pytest.mark.slow
def test_a_plan_says_where_a_budget_is_not_spent(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "facts", "--gpu", "h100", "--limit", "4", "--algorithms", "sft,dft", "--steps", "40"]
    dear, cheap = ("training.budget.gradient_tokens=1e9", "algorithms.sft.training.budget.gradient_tokens=600")
    assert cli.main([*command, "--set", dear, "--set", cheap]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "training.steps ends dft before the budget is spent: raise it" in told
    assert "until_flat" not in told
    flat = ["--set", "evaluation.until_flat=2", "--set", "evaluation.curve_points=8"]
    assert cli.main([*command, *flat]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Cells end earlier if their validation curve is flat" in told and "raise it" not in told
