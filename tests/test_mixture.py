"""Mixtures: the gradient of a step is the weighted sum of the components' gradients, each on its own rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from batches import hand_batch, random_batch
from canonical import ppo
from comparisons import small
from test_checkpoints import EVERY, StopError, rows_of, same, stop_at
from torch import Tensor

from rlzoo import analyze_variance, compare
from rlzoo.buffers import OfflineBuffer
from rlzoo.cli import main
from rlzoo.cli.catalogue import catalogue
from rlzoo.comparison import resolve
from rlzoo.config import Training
from rlzoo.config.schedules import Schedule, Shape
from rlzoo.errors import UserError
from rlzoo.inputs import Behaviour, Critic, Mismatched, Reference, Snapshot
from rlzoo.objective import Objective, get_objective, surrogate, surrogate_of
from rlzoo.policy import Assembler, Models, Policy, Sequences
from rlzoo.policy.loading import save_policy
from rlzoo.testing.batches import gradients, prepared
from rlzoo.training import Trainer, train, with_reference
from rlzoo.training.batches import BufferSource, buffer_sources, seeds, shares, views_of
from rlzoo.training.sums import Readout, Sums, means_of
from rlzoo.types import Coefficients, Selection, Trajectory

MakePolicy = Callable[..., Policy]
Draw = tuple[list[Trajectory], list[tuple[int, ...]]]
RAW = EVERY.model_copy(update={"steps": 1, "batch_size": 16, "max_gradient_norm": 1e9})
OVER_TWO: Mapping[str, Mapping[str, float]] = {
    "sft+grpo": {"sft": 0.25, "grpo": 2.0},
    "dft+dpo": {"dft": 0.7, "dpo": 0.3},
    "ppo+kto": {"ppo": 1.0, "kto": 3.0},
}


Weights = Mapping[str, float | Mapping[float, float]]


def mixture(weights: Weights, **options: Mapping[str, Any]) -> Objective:
    return get_objective("mixture", weights=weights, options=options)


def shaped(weights: Weights, shape: str) -> Objective:
    return get_objective("mixture", weights=weights, shape=shape)


def filled(policy: Policy) -> OfflineBuffer:
    """Demonstrations and groups, with log-probs of a reference that is not the policy."""
    rows = list(with_reference(rows_of(policy), policy))
    moved = [[x - 0.1 * (i % 4) for i, x in enumerate(row.reference_logp or [])] for row in rows]
    return OfflineBuffer.from_trajectories(
        [replace(row, reference_logp=logp) for row, logp in zip(rows, moved, strict=True)]
    )


def kept_gradient(policy: Policy, objective: Objective, buffer: OfflineBuffer, settings: Training) -> Tensor:
    found: list[Tensor] = []

    def keep(trainer: Trainer, step: int) -> None:
        found.append(gradient_of(trainer.policy))

    train(policy, objective, buffer, settings, seed=3, callbacks=[keep])
    return found[0]


def gradient_of(policy: Policy) -> Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    return torch.cat([part.flatten() for part in parts]).clone()


def gradient_by_hand(policy: Policy, objective: Objective, drawn: Draw) -> Tensor:
    """∇ of the surrogate of one objective on its rows, all in one forward pass."""
    rows, units = drawn
    policy.zero_grad()
    scores = policy(Sequences.collate([r.prompt_ids for r in rows], [r.completion_ids for r in rows], policy.device))
    batch = Assembler(policy, Models(policy, {None: policy})).assemble(rows, units, objective)
    batch = objective.prepare(batch).replace(logp=scores.logp, **scores.of(objective.requires))
    torch.autograd.backward(surrogate(objective, batch))
    return gradient_of(policy)


# The gradient


@pytest.mark.parametrize("token_budget", [20, 4096])
@pytest.mark.parametrize("name", OVER_TWO)
def test_a_step_has_the_weighted_sum_of_the_parts_gradients(
    make_policy: MakePolicy, name: str, token_budget: int
) -> None:
    weights, policy = OVER_TWO[name], make_policy()
    buffer, settings = filled(policy), RAW.model_copy(update={"token_budget": token_budget})
    ours = kept_gradient(make_policy(), mixture(weights), buffer, settings)
    if Mismatched() in mixture(weights).requires:  # then the reference is the policy as it comes
        buffer = OfflineBuffer.from_trajectories(list(with_reference(buffer, policy)))
    policy.attach(mixture(weights).requires)
    theirs = torch.zeros_like(ours)
    norms = []
    for part, weight in weights.items():
        objective = get_objective(part)
        view = buffer.view(objective.learns_from, **objective.view_options)
        drawn = BufferSource(buffer, view, settings.batch_size // 2, seed=3).draw()
        gradient = gradient_by_hand(policy, objective, drawn)
        norms.append(float(weight * gradient.norm()))
        theirs += weight * gradient
    assert min(norms) > 1e-3 * max(norms), "each part is seen"
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


@pytest.mark.parametrize("name", ["sft", "dft-control", "iw-sft", "rft", "dpo", "ppo", "grpo", "kto"])
def test_a_mixture_of_one_part_is_that_part_bit_for_bit(make_policy: MakePolicy, name: str) -> None:
    runs = []
    for objective in (get_objective(name), mixture({name: 1.0})):
        policy = make_policy("llama", torch.float32)
        record = train(policy, objective, rows_of(policy), EVERY.model_copy(update={"updates_per_batch": 2}), seed=3)
        runs.append((list(policy.parameters()), record))
    (plain, alone), (mixed, record) = runs
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))
    whole = ("step", "loss", "gradient_norm", "learning_rate")
    for row, own in zip(record.steps, alone.steps, strict=True):
        renamed = {k if k in whole else f"{name}/{k}": v for k, v in own.items()}
        assert row == {**renamed, f"{name}/loss": own["loss"]}
    assert record.costs.gradient_tokens == alone.costs.gradient_tokens and record.costs.flops == alone.costs.flops


def test_the_moving_reference_of_a_part_moves(make_policy: MakePolicy) -> None:
    options = {"variant": "ema", "ema_decay": 0.5}
    runs = []
    for objective in (get_objective("iw-sft", **options), mixture({"iw-sft": 1.0}, **{"iw-sft": options})):
        policy = make_policy()
        steps = train(policy, objective, rows_of(policy), EVERY).steps
        runs.append([row.get("weight", row.get("iw-sft/weight")) for row in steps])
    assert runs[0] == runs[1] and runs[0][0] != runs[0][-1]


@pytest.mark.slow
@pytest.mark.parametrize(("anchored", "metric"), [("dpo", "margin"), ("asft", "logit_term")])
def test_parts_may_have_different_references(make_policy: MakePolicy, anchored: str, metric: str) -> None:
    """One is held to the policy as it came, iw-SFT's average follows it: each has the metrics that it has alone."""
    options = {"variant": "ema", "ema_decay": 0.5}
    policy = make_policy()
    both = train(policy, mixture({anchored: 1.0, "iw-sft": 0.0}, **{"iw-sft": options}), rows_of(policy), EVERY).steps
    policy = make_policy()
    alone = train(policy, mixture({anchored: 1.0, "sft": 0.0}), rows_of(policy), EVERY).steps
    name = f"{anchored}/{metric}"
    assert [row[name] for row in both] == pytest.approx([row[name] for row in alone], rel=1e-9, abs=1e-12)
    assert both[0]["iw-sft/weight"] == pytest.approx(1) and both[-1]["iw-sft/weight"] != both[0]["iw-sft/weight"]


def test_a_mixture_on_one_batch_is_the_sum_of_surrogates() -> None:
    batch = random_batch(0)
    objective = mixture({"grpo": 0.3, "dpo": 2.0}, dpo={"variant": "ipo"})
    expected = torch.zeros(2 * batch.logp.numel(), dtype=torch.float64)
    for weight, part in ((0.3, get_objective("grpo")), (2.0, get_objective("dpo", variant="ipo"))):
        expected += weight * gradients(surrogate(part, prepared(part, batch)), batch)
    torch.testing.assert_close(gradients(surrogate(objective, batch), batch), expected)
    with pytest.raises(ValueError, match="each of its components has its own denominator"):
        surrogate(objective, batch, denominator=3.0)


def test_a_mixture_in_a_mixture_is_flat() -> None:
    inner = {"weights": {"sft": 0.5, "dpo": 2.0}, "options": {"dpo": {"beta": 0.7}}}
    objective = mixture({"mixture": 0.5, "grpo": 1.0}, mixture=inner)
    found = [(component.label, component.weight, component.objective) for component in objective.components]
    dpo = get_objective("dpo", beta=0.7)
    assert found == [
        ("mixture/sft", 0.25, get_objective("sft")), ("mixture/dpo", 1.0, dpo), ("grpo", 1.0, get_objective("grpo")),
    ]  # fmt: skip


# The run


def test_the_metrics_are_those_of_the_parts(make_policy: MakePolicy) -> None:
    policy = make_policy()
    row = train(policy, mixture({"sft": 0.25, "grpo": 2.0}), rows_of(policy), RAW).steps[0]
    assert row["loss"] == pytest.approx(0.25 * row["sft/loss"] + 2.0 * row["grpo/loss"])
    assert row["sft/loss"] == pytest.approx(-row["sft/logp"])
    assert {"grpo/ratio", "grpo/clipped", "grpo/kl", "grpo/reward", "sft/coefficient"} <= set(row)
    assert row["grpo/reward"] == 0.5 and "sft/reward" not in row


def test_the_parts_share_the_batch(make_policy: MakePolicy) -> None:
    assert shares(64, 1) == [64] and shares(64, 2) == [32, 32] and shares(8, 3) == [3, 3, 2] and shares(1, 2) == [1, 1]
    policy = make_policy()
    objective = mixture({"sft": 1.0, "grpo": 1.0})
    sft, grpo = buffer_sources(rows_of(policy), views_of(objective), 12, seed=0)
    assert len(sft.draw()[0]) == 6
    rows, units = grpo.draw()
    assert len(rows) == 4 == len(units[0]) and {row.source for row in rows} == {"policy"}


FALLING: Weights = {"sft": {0: 0.9, 0.8: 0.05}, "grpo": {0: 0.1, 0.8: 0.95}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "weights", [{"sft": 0.3, "grpo": 0.7}, {"ppo": 0.5, "dpo": 0.5}, FALLING], ids=["sft+grpo", "ppo+dpo", "falling"]
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    make_policy: MakePolicy, tmp_path: Path, weights: Weights
) -> None:
    def run(folder: Path | None, *callbacks: Callable[[Trainer, int], None]) -> Any:
        policy = make_policy("llama", torch.float32)
        settings = EVERY.model_copy(update={"batch_size": 8})
        return policy, train(policy, mixture(weights), rows_of(policy), settings, 3, callbacks, checkpoints=folder)

    whole = run(None)
    for last in (3, 6):
        with pytest.raises(StopError):
            run(tmp_path, stop_at(last))
    assert same(run(tmp_path), whole)
    other = mixture(dict.fromkeys(weights, 0.6))
    policy = make_policy("llama", torch.float32)
    with pytest.raises(UserError, match="the checkpoints are of another run"):
        train(policy, other, rows_of(policy), EVERY.model_copy(update={"batch_size": 8}), 3, checkpoints=tmp_path)


MIXED = {
    "objective": "mixture",
    "options": {"weights": {"sft": 0.2, "grpo": 0.8}, "options": {"grpo": {"kl_coefficient": 0.0}}},
}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_comparison_runs_a_mixture(mode: str, tmp_path: Path) -> None:
    experiment = small({"sft": {}, "sft+grpo": {**MIXED, "mode": mode}})
    found = compare(experiment, tmp_path / "out")
    (run,) = (run for run in found["cells"] if run["algorithm"] == "sft+grpo")
    assert len(run["training"]) == 2
    for row in run["training"]:
        assert row["loss"] == pytest.approx(0.2 * row["sft/loss"] + 0.8 * row["grpo/loss"])
    assert (run["costs"]["sampled_tokens"] > 0) and found["failed"] == []
    if mode == "online":  # the samples of a fresh batch are the policy's own, those of the buffer the base's
        assert run["training"][0]["grpo/ratio"] == pytest.approx(1, abs=1e-4)


def test_a_mixture_of_demonstrations_alone_has_nothing_to_sample() -> None:
    rows = {"sft+dft": {"objective": "mixture", "options": {"weights": {"sft": 1, "dft": 1}}, "mode": "online"}}
    with pytest.raises(UserError, match="learns from demonstrations, so mode must be offline"):
        resolve.check(small(rows))
    with pytest.raises(UserError, match=r"algorithms.x: learns_from: 'mixture' is a composite, and each component"):
        resolve.views_of(small({"x": {**MIXED, "learns_from": "correct"}}), "x")


@pytest.mark.slow
def test_the_command_line_trains_a_mixture(
    make_policy: MakePolicy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = make_policy("llama", torch.float32)
    save_policy(policy, tmp_path / "model")
    rows_of(policy).save(tmp_path / "buffer")
    command = [
        "train", "mixture", "--buffer", str(tmp_path / "buffer"), "--model", str(tmp_path / "model"), "--steps", "1",
        "--option", "weights={sft: 0.5, dpo: 0.5}", "--option", "options={dpo: {beta: 0.2}}",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(command) == 0
    assert '"dpo/margin"' in (tmp_path / "out" / "training.json").read_text()
    assert "step 1/1" in capsys.readouterr().out


# Weights that change in training


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # at 0, 0.2 (the first point), 0.3, 0.4 (half-way), 0.6 (the second), 0.8 and 1 (after the last)
        ("linear", [0.8, 0.8, 0.7, 0.6, 0.4, 1.0, 1.0]),
        ("cosine", [0.8, 0.8, 0.8 - 0.4 * (1 - math.sqrt(0.5)) / 2, 0.6, 0.4, 1.0, 1.0]),
        ("steps", [0.8, 0.8, 0.8, 0.8, 0.4, 1.0, 1.0]),
    ],
)
def test_a_schedule_by_hand(shape: Shape, expected: list[float]) -> None:
    schedule = Schedule.of({0.2: 0.8, 0.8: 1.0, 0.6: 0.4}, shape)
    assert [schedule.at(x) for x in (0, 0.2, 0.3, 0.4, 0.6, 0.8, 1)] == pytest.approx(expected)
    assert Schedule.of({0.5: 0.3}, shape).at(0.1) == Schedule.of({0.5: 0.3}, shape).at(0.9) == 0.3


@pytest.mark.parametrize("shape", ["linear", "cosine", "steps"])
def test_the_weights_of_each_step_are_used_and_recorded(make_policy: MakePolicy, shape: Shape) -> None:
    policy, settings = make_policy(), EVERY.model_copy(update={"steps": 5, "batch_size": 8})
    steps = train(policy, shaped(FALLING, shape), rows_of(policy), settings, 3).steps
    mu = Schedule.of(FALLING["sft"], shape)  # type: ignore[arg-type]
    for number, row in enumerate(steps):
        weights = row["sft/mixture_weight"], row["grpo/mixture_weight"]
        assert weights == pytest.approx((mu.at(number / 5), 1 - mu.at(number / 5)))
        assert row["loss"] == pytest.approx(weights[0] * row["sft/loss"] + weights[1] * row["grpo/loss"])
    assert steps[0]["sft/mixture_weight"] == 0.9 and steps[4]["sft/mixture_weight"] == 0.05


@pytest.mark.slow
def test_a_gradient_is_that_of_the_weights_of_its_step(make_policy: MakePolicy) -> None:
    def after(weights: Weights, shape: str, steps: int) -> Tensor:
        policy, found = make_policy(), list[Tensor]()
        settings = EVERY.model_copy(update={"steps": 4, "batch_size": 8, "warmup_ratio": 0.0})

        def keep(trainer: Trainer, step: int) -> None:
            found.append(gradient_of(trainer.policy))

        train(policy, shaped(weights, shape), rows_of(policy), settings, 3, [keep])
        return torch.stack(found[:steps])

    halves = {"sft": {0: 1.0, 0.5: 0.0}, "grpo": {0: 0.0, 0.5: 1.0}}
    first = after({"sft": 1.0, "grpo": 0.0}, "linear", 2)
    assert torch.equal(after(halves, "steps", 2), first)
    assert not torch.equal(after(halves, "linear", 2), first)
    both = {"sft": 0.3, "grpo": 0.7}
    assert torch.equal(
        after({name: {0.1: w, 0.7: w} for name, w in both.items()}, "cosine", 4), after(both, "linear", 4)
    )


def test_a_schedule_follows_a_budget(make_policy: MakePolicy) -> None:
    policy = make_policy()
    settings = Training.model_validate(
        {**EVERY.model_dump(), "steps": 90, "batch_size": 8, "budget": {"gradient_tokens": 400}}
    )
    spent: list[float] = [0.0]
    steps = train(
        policy,
        mixture({"sft": {0: 1.0, 1: 0.0}, "grpo": 1.0}),
        rows_of(policy),
        settings,
        callbacks=[lambda trainer, step: spent.append(trainer.record.costs.gradient_tokens / 400)],
    ).steps
    assert 2 < len(steps) < 90
    assert [row["sft/mixture_weight"] for row in steps] == pytest.approx([1 - share for share in spent[: len(steps)]])
    assert "grpo/mixture_weight" not in steps[0], "constant weights are in the settings"


def test_schedules_of_nested_mixtures_multiply() -> None:
    inner = {"weights": {"sft": {0: 1.0, 1: 0.0}, "dpo": 2.0}}
    objective = mixture({"mixture": {0: 0.5, 1: 1.0}, "grpo": 1.0}, mixture=inner)
    found = {component.label: component.at(0.5).weight for component in objective.components}
    assert found == {"mixture/sft": 0.75 * 0.5, "mixture/dpo": 1.5, "grpo": 1.0}
    batch = random_batch(0)
    at_the_end = surrogate(mixture({"dpo": {0: 5.0, 1: 0.3}}), batch, progress=1.0)
    assert torch.equal(at_the_end, surrogate(mixture({"dpo": 0.3}), batch))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_comparison_runs_chord(tmp_path: Path) -> None:
    """As an experiment file has it: through YAML, and online."""
    row = yaml.safe_load(
        "{objective: mixture, mode: online, options: {weights: {chord: {0: 0.9, 0.5: 0.05}, grpo: {0: 0.1, 0.5: 0.95}},"
        " shape: cosine, options: {grpo: {kl_coefficient: 0}}}}"
    )
    found = compare(small({"chord+grpo": row}, seeds=[1]), tmp_path / "out")
    (cell,) = found["cells"]
    assert [step["chord/mixture_weight"] for step in cell["training"]] == pytest.approx([0.9, 0.05])
    assert [step["grpo/mixture_weight"] for step in cell["training"]] == pytest.approx([0.1, 0.95])
    assert cell["training"][0]["grpo/ratio"] == pytest.approx(1, abs=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("weights", "options", "told"),
    [
        ({}, {}, "a mixture needs weights, such as"),
        ({"sft": -1.0}, {}, "weights of 0 or more: 'sft' has -1.0"),
        ({"sft": float("nan")}, {}, "weights of 0 or more: 'sft' has nan"),
        ({"sft": 0.0, "dft": {0: 0.0, 1: 0.0}}, {}, "a weight above 0: sft, dft have none"),
        ({"sfft": 1.0}, {}, "unknown objective 'sfft'"),
        ({"sft": {}}, {}, r"a schedule needs values by fraction of training, such as \{0: 0.9, 0.5: 0.05\}"),
        ({"sft": {0: 1.0, 200: 0.1}}, {}, "a schedule is by fraction of training, from 0 to 1: 200 is not one"),
        ({"sft": {0: 1.0, 1: -0.1}}, {}, "weights of 0 or more: 'sft' has -0.1"),
        ({"dpo": 1.0}, {"dpo": {"bta": 1}}, "unknown option of objective 'dpo' 'bta'"),
        ({"dpo": 1.0}, {"grpo": {"clip": 0.1}}, "unknown component with options 'grpo'"),
    ],
)
def test_a_wrong_mixture_is_one_line(weights: Weights, options: Mapping[str, Mapping[str, Any]], told: str) -> None:
    with pytest.raises(UserError, match=told) as found:
        mixture(weights, **options)
    assert "\n" not in str(found.value)


def test_weights_must_be_given() -> None:
    with pytest.raises(UserError, match="weights"):
        get_objective("mixture")
    with pytest.raises(UserError, match="option 'weights' = 'sft'"):
        get_objective("mixture", weights="sft")


def test_a_part_without_a_source_is_refused(make_policy: MakePolicy) -> None:
    policy = make_policy()
    buffer = rows_of(policy)
    source = BufferSource(buffer, buffer.view(Selection.DEMONSTRATIONS), 4, 0)
    with pytest.raises(UserError, match="has 2 components and 1 sources"):
        Trainer(policy, mixture({"sft": 1.0, "dft": 1.0}), source, RAW)


@pytest.mark.slow
def test_the_analyzer_refuses_a_mixture_in_one_line(make_policy: MakePolicy) -> None:
    policy = make_policy("gpt2")
    named = {"both": mixture({"sft": 1.0, "dft": 1.0}), "sft": get_objective("sft")}
    found = analyze_variance(policy, named, rows_of(policy), rows=6, draws=0)
    assert set(found["objectives"]) == {"sft"}
    assert found["skipped"]["both"].startswith("'mixture' is a composite: analyse its components")
    with pytest.raises(UserError, match="analyse its components"):
        analyze_variance(policy, [named["both"]], rows_of(policy), rows=6, draws=0)


def test_a_mixture_needs_what_its_parts_need() -> None:
    objective = mixture({"sft": 1.0, "ppo": 1.0, "kto": 1.0}, ppo={"critic": "shared"})
    own = {Behaviour(), Critic(shared=True), Snapshot("value"), Snapshot(), Reference(), Mismatched()}
    assert set(objective.requires) == own and len(objective.requires) == len(own)
    (listed,) = (row for row in catalogue()["objectives"] if row["name"] == "mixture")
    assert listed["learns_from"] == "its components' views"
    assert get_objective("sft").components[0].label == "" and mixture({"sft": 1.0}).components[0].label == "sft"


def test_parts_of_one_view_draw_other_rows(make_policy: MakePolicy) -> None:
    views = views_of(get_objective("mixture", weights={"sft": 1.0, "grpo": 1.0, "dft": 1.0}))
    assert seeds(views, 7) == [7, 7, 7 + 2**32]
    sft, _, dft = buffer_sources(rows_of(make_policy()), views, 9, seed=7)
    assert [sft.draw() for _ in range(3)] != [dft.draw() for _ in range(3)]
    buffer, settings = rows_of(make_policy()), RAW.model_copy(update={"batch_size": 4})
    (step,) = train(make_policy(), mixture({"sft": 1.0, "dft": 1.0}), [buffer, buffer], settings).steps
    assert step["sft/logp"] != step["dft/logp"], "also where each has a buffer of its own"


def test_a_reported_loss_has_what_auxiliary_losses_add() -> None:
    # of PPO the paper's loss takes the place of the surrogate, and the critic's stays beside it
    objective, batch = get_objective("ppo"), random_batch(0)
    ready, sums = prepared(objective, batch), Sums()
    coefficients, tokens = objective.coefficients(ready.detach()), objective.normaliser.denominator(ready)
    sums.add(objective, ready, coefficients, surrogate_of(coefficients, objective, ready, tokens), tokens)
    readout = Readout()
    places = sums.into(readout)
    assert means_of(places, readout.read())["loss"] == pytest.approx(ppo(batch).item(), rel=1e-9)
    assert ppo(batch).item() != pytest.approx(ppo(batch.replace(value=None)).item(), rel=1e-3)


def test_a_mean_is_over_the_tokens_and_rows_that_have_a_value() -> None:
    objective, batch, nan, sums = get_objective("sft"), hand_batch([[0.5, 0.5], [0.25]]), torch.nan, Sums()
    metrics = {"row": torch.tensor([nan, 3.0]), "token": torch.tensor([[1.0, nan], [5.0, 100.0]])}
    ones = torch.ones_like(batch.logp)
    sums.add(objective, batch, Coefficients(ones, metrics=metrics), torch.tensor(0.0), 1.0)
    readout = Readout()
    places = sums.into(readout)
    assert means_of(places, readout.read()) == pytest.approx(
        {"loss": 0.0, "row": 3.0, "token": 3.0, "coefficient": 1.0, "logp": 4 / 3 * math.log(0.5)}
    )
