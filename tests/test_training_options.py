"""What a training run can be asked for: adapters, recomputed activations, mixed precision, trackers."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import small
from torch.nn import functional

from rlzoo.buffers import OfflineBuffer
from rlzoo.comparison.runner import compare
from rlzoo.config import Training
from rlzoo.errors import UserError
from rlzoo.objective import get_objective
from rlzoo.policy import Policy, load_policy
from rlzoo.policy.adapters import adapters
from rlzoo.policy.loading import save_policy
from rlzoo.policy.microbatches import log_probs
from rlzoo.training import Trainer, train
from rlzoo.training.savings import gradients_in_place, layers_recomputed
from rlzoo.types import Trajectory

ROWS = [
    Trajectory("", "", [5, 6, 7 + i], [20 + i, 21, 22 + i % 3, 2][: 2 + i % 3], str(i // 2), source="policy",
               reward=float(i % 2), behaviour_logp=[-1.0] * (2 + i % 3), reference_logp=[-1.5] * (2 + i % 3))
    for i in range(8)
]  # fmt: skip
Make = Callable[..., Policy]
PAIRS = [(row.prompt_ids, row.completion_ids) for row in ROWS]


class Fixed:
    """All rows, in pairs where the objective wants them."""

    def __init__(self, pairs: bool = False) -> None:
        self.units: list[tuple[int, ...]] = [(i + 1, i) for i in range(0, 8, 2)] if pairs else [(i,) for i in range(8)]

    def draw(self) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
        return ROWS, self.units


def trained(policy: Policy, name: str = "dft", folder: Path | None = None, **settings: object) -> Trainer:
    torch.manual_seed(0)
    training = Training.model_validate({"steps": 3, "learning_rate": 1e-2, "token_budget": 16, **settings})
    objective = get_objective(name)
    trainer = Trainer(policy, objective, Fixed(name == "dpo"), training, folder=folder)
    trainer.run()
    return trainer


@pytest.mark.slow
def test_lora_trains_the_adapters_alone(tmp_path: Path) -> None:
    policy = load_policy("embedded")
    base = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    before = log_probs(policy, PAIRS)
    trainer = trained(policy, lora={})
    layers = adapters(policy.model)
    assert len(layers) == 7 * policy.model.config.num_hidden_layers and "lm_head" not in layers
    assert {layer.scaling["default"] for layer in layers.values()} == {2.0}  # r 8, alpha 16
    assert {layer.lora_A["default"].weight.shape[0] for layer in layers.values()} == {8}
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        if ".lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")])
    after = log_probs(policy, PAIRS)
    assert max(abs(a - b) for x, y in zip(after, before, strict=True) for a, b in zip(x, y, strict=True)) > 0.01

    reference = policy.reference()
    assert reference.model is policy.model, "a reference that is the policy without its adapter needs no copy"
    assert log_probs(reference, PAIRS) == before
    assert log_probs(policy, PAIRS) == after
    assert all(p.requires_grad == (".lora_" in name) for name, p in policy.model.named_parameters())
    full = load_policy("embedded")
    assert trainer.record.costs.flops < 0.8 * trained(full).record.costs.flops

    save_policy(policy, tmp_path / "saved")
    merged = log_probs(load_policy(str(tmp_path / "saved")), PAIRS)
    for x, y in zip(merged, after, strict=True):
        assert x == pytest.approx(y, abs=1e-4)
    from peft import PeftModel

    plain = load_policy("embedded")
    plain.model = PeftModel.from_pretrained(plain.model, tmp_path / "saved" / "adapter").base_model.model
    for x, y in zip(log_probs(plain, PAIRS), after, strict=True):
        assert x == pytest.approx(y, abs=1e-5)
    config = json.loads((tmp_path / "saved" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["base_model_name_or_path"] == "embedded"


@pytest.mark.slow
def test_adapters_are_drawn_by_the_seed_of_the_run() -> None:
    settings = Training.model_validate({"steps": 1, "batch_size": 8, "lora": {"rank": 2}})
    buffer = OfflineBuffer.from_trajectories(ROWS)
    found = []
    for attempt, seed in enumerate((3, 3, 4)):
        policy = load_policy("embedded")
        torch.rand(attempt)  # whatever was drawn before must not matter
        train(policy, get_objective("rft"), buffer, settings, seed=seed)
        found.append([layer.lora_A["default"].weight.detach() for layer in adapters(policy.model).values()])
    assert all(map(torch.equal, found[0], found[1])) and not any(map(torch.equal, found[0], found[2]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "ppo", "grpo", "iw-sft"])
def test_lora_goes_with_every_kind_of_objective(name: str) -> None:
    policy = load_policy("embedded")
    lora = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    trained(policy, name, lora=lora)
    assert {name.rsplit(".", 1)[1] for name in adapters(policy.model)} == {"q_proj", "v_proj"}
    trained(policy, name, lora=lora)  # what was trained is trained further


@pytest.mark.slow
def test_a_moving_reference_has_an_adapter_of_its_own() -> None:
    policy = load_policy("embedded")
    before, objective = log_probs(policy, PAIRS), get_objective("iw-sft", variant="ema", ema_decay=0.5)
    settings = Training.model_validate({"steps": 2, "learning_rate": 1e-2, "lora": {"rank": 2}})
    trainer = Trainer(policy, objective, Fixed(), settings)
    trainer.run()
    (reference,) = trainer.models.moving.values()
    average, after = log_probs(reference, PAIRS), log_probs(policy, PAIRS)
    assert before != average != after != before


def test_lora_of_layers_that_hold_their_weight_the_other_way_round(tmp_path: Path, make_policy: Make) -> None:
    """GPT-2's square projection would take a transposed product without a word."""
    policy = make_policy("gpt2", dtype=torch.float32)
    policy.add_lora(rank=2)
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in adapters(policy.model).values():
            layer.lora_B["default"].weight.normal_(0, 0.5)
    save_policy(policy, tmp_path / "saved")
    merged = log_probs(load_policy(str(tmp_path / "saved")), PAIRS)
    for x, y in zip(merged, log_probs(policy, PAIRS), strict=True):
        assert x == pytest.approx(y, abs=1e-3)


def test_a_reference_is_without_the_adapter_of_the_output_layer_too() -> None:
    policy = load_policy("embedded")
    before = log_probs(policy, PAIRS)
    policy.add_lora(rank=2, target_modules=["lm_head"])
    with torch.no_grad():
        adapters(policy.model)["lm_head"].lora_B["default"].weight.fill_(0.5)
    assert log_probs(policy.reference(), PAIRS) == before != log_probs(policy, PAIRS)
    policy.requires_grad_(False)
    log_probs(policy.reference(), PAIRS)
    assert not any(p.requires_grad for p in policy.parameters()), "a frozen policy stays frozen"


def test_lora_of_layers_that_are_not_there() -> None:
    with pytest.raises(UserError, match="target_modules"):
        load_policy("embedded").add_lora(target_modules=["nowhere"])
    policy = load_policy("embedded")
    policy.add_lora()
    with pytest.raises(UserError, match="already"):
        policy.add_lora()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_comparison_with_lora_and_a_choice_of_learning_rates(tmp_path: Path) -> None:
    experiment = small(
        {"sft": {"learning_rates": [1e-3, 1e-2]}, "grpo": {"mode": "online"}}, training__lora={"rank": 2},
        training__trackers=["tensorboard"],
    )  # fmt: skip
    results = compare(experiment, tmp_path / "out")
    assert {cell["algorithm"] for cell in results["cells"]} == {"sft", "grpo"} and not results["failed"]
    logs = {path.parts[-3] for path in (tmp_path / "out" / "logs").glob("*/rlzoo/events.out.tfevents.*")}
    assert logs == {"base", "grpo-lr5e-05-seed0", "sft-lr0.001-seed0", "sft-lr0.01-seed0"}


@pytest.mark.slow
def test_recomputed_activations_change_nothing_but_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, again = load_policy("embedded", "float64"), load_policy("embedded", "float64")
    calls = {"plain": 0, "again": 0}
    for label, policy in (("plain", plain), ("again", again)):
        layer = policy.model.model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_, label=label: calls.__setitem__(label, calls[label] + 1))
    trained(plain, dtype="float64")
    trained(again, dtype="float64", gradient_checkpointing=True)
    assert calls["again"] == 2 * calls["plain"] > 0
    for a, b in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any("forward" in vars(module) for module in again.modules()), "the model is left as it was"
    with (
        pytest.raises(UserError, match="no layers that transformers would checkpoint"),
        layers_recomputed(plain.head.layer),
    ):
        pass


@pytest.mark.parametrize("padding", [None, 5])
def test_gradients_in_place_are_those_of_autograd(padding: int | None) -> None:
    torch.manual_seed(0)
    table, inner = torch.nn.Embedding(11, 6, padding_idx=padding), torch.nn.Linear(6, 6)
    head = torch.nn.Linear(6, 11, bias=False)
    head.weight = table.weight  # tied
    model = torch.nn.Sequential(table, inner, torch.nn.Tanh(), head).double()
    batches = [torch.randint(0, 11, (3, 4)) for _ in range(3)]
    found = []
    for context in (nullcontext(), gradients_in_place(model)):
        model.zero_grad(set_to_none=True)
        with context:
            for batch in batches:  # added up over micro-batches
                model(batch).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) == 3
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert not any("forward" in vars(module) for module in model.modules())


class Doubled(torch.nn.Linear):
    """A layer that is more than its base class."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"max_norm": 0.5}], ids=str)
def test_gradients_in_place_leave_alone_what_is_no_plain_layer(options: dict[str, Any]) -> None:
    found = []
    for context in (lambda _: nullcontext(), gradients_in_place):
        torch.manual_seed(0)
        table = torch.nn.Embedding(11, 6, **options)
        patched, frozen = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6).requires_grad_(False)
        tripled = partial(lambda layer, input: functional.linear(3 * input, layer.weight), patched)
        patched.forward = tripled  # type: ignore[method-assign]
        model = torch.nn.Sequential(table, Doubled(6, 6), patched, torch.nn.Tanh(), frozen)
        ids = torch.randint(0, 11, (3, 9))
        with context(model):
            model(ids).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    theirs, ours = found
    assert ours["4.weight"] is None and "forward" in vars(patched)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_mixed_precision_keeps_float32_weights() -> None:
    plain, mixed = load_policy("embedded"), load_policy("embedded", "bfloat16-mixed")
    seen = []
    mixed.model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    exact, rough = trained(plain), trained(mixed, dtype="bfloat16-mixed")
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    first, rougher = exact.record.steps[0]["loss"], rough.record.steps[0]["loss"]
    assert rougher == pytest.approx(first, rel=0.05) and rougher != first
    assert all(isinstance(x, float) for row in log_probs(mixed, PAIRS) for x in row)
    assert log_probs(mixed.reference(), PAIRS) == log_probs(mixed, PAIRS) != log_probs(plain, PAIRS)
    mixed.add_lora()  # whose reference is itself without it
    assert log_probs(mixed.reference(), PAIRS) == log_probs(mixed, PAIRS)


def test_a_tracker_gets_every_step(tmp_path: Path) -> None:
    trainer = trained(load_policy("embedded"), folder=tmp_path / "run", trackers=["tensorboard"])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = trainer.accelerator.trackers
    assert tracker.tracker.all_writers is None, "its run is ended"
    events = EventAccumulator(str(tmp_path / "run" / "rlzoo"))
    events.Reload()
    told = {event.step: event.value for event in events.Scalars("loss")}
    assert told == pytest.approx({row["step"]: row["loss"] for row in trainer.record.steps}, rel=1e-6)


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlzoo.training.trackers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        trained(load_policy("embedded"), trackers=["wandb"])


@pytest.mark.slow
# the coefficients of dft-control are those of the whole batch, and the loss of power is not -c log p
@pytest.mark.parametrize("name", ["sft", "dft-control", "power"])
def test_truncated_importance_weights_what_another_engine_sampled(name: str) -> None:
    """Rows whose engine said log 2 less for every token: each of their tokens has weight min(2, cap)."""
    half = torch.log(torch.tensor(2.0)).item()
    losses = []

    def gradient(marked: range, cap: float | None) -> torch.Tensor:
        engine = [[x - half for x in row.behaviour_logp or []] if i in marked else None for i, row in enumerate(ROWS)]
        rows = [replace(row, sampler_logp=logp) for row, logp in zip(ROWS, engine, strict=True)]
        settings = Training(steps=1, learning_rate=1e-9, max_gradient_norm=1e9, importance_cap=cap, token_budget=16)
        source, policy = Fixed(), load_policy("embedded")
        source.draw = lambda: (rows, source.units)  # type: ignore[method-assign]
        record = Trainer(policy, get_objective(name), source, settings).run()
        assert record.events == []
        losses.append(record.steps[0]["loss"])
        return torch.cat([p.grad.flatten().double() for p in policy.parameters() if p.grad is not None])

    def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
        return bool((found - expected).norm() < 1e-5 * expected.norm())

    plain = gradient(range(0), None)
    for cap in (3.0, 1.5):
        assert same(gradient(range(8), cap), min(2.0, cap) * plain)
        assert losses[-1] == pytest.approx(min(2.0, cap) * losses[0], rel=1e-5)
    even, odd = gradient(range(0, 8, 2), 3.0), gradient(range(1, 8, 2), 3.0)
    assert same(even + odd, 3 * plain) and not same(even, odd)
