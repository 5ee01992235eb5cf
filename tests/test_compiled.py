"""Compiled layers: the gradients of plain ones, one graph for all shapes, and nothing compiled where hooks look."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from rlzoo import analyze_variance
from rlzoo.buffers import OfflineBuffer
from rlzoo.config import Sampling, Training
from rlzoo.errors import UserError
from rlzoo.objective import get_objective
from rlzoo.policy import Policy, compiled
from rlzoo.policy import policy as policies
from rlzoo.policy.head import Head, token_log_probs
from rlzoo.policy.sequences import Row
from rlzoo.rollout import TransformersSampler
from rlzoo.testing.engine import SameRows, rows_of, units_of
from rlzoo.training import Trainer

MakePolicy = Callable[..., Policy]
COMPILED = Training(compile=True)


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers are traced, but their graphs run without kernels of their own, which take long to make."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rows(number: int, size: int) -> list[Row]:
    return [Row(list(range(20, 21 + size + i)), list(range(40, 41 + size + i))) for i in range(number)]


def gradient(policy: Policy, some: list[Row]) -> torch.Tensor:
    policy.zero_grad()
    policy(policy.collate(some)).logp.sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.slow
def test_gradients_are_those_of_plain_layers_and_no_shape_compiles_anew(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    plain, fast = (make_policy("llama", torch.float32) for _ in range(2))
    fast.compile_layers(COMPILED)
    assert fast.compiles and not plain.compiles
    graphs = list[int]()
    for number, size in ((2, 3), (5, 2), (3, 9), (7, 1), (4, 12)):
        expected, found = (gradient(policy, rows(number, size)) for policy in (plain, fast))
        assert (found - expected).norm() <= 1e-6 * expected.norm()
        with torch.no_grad():
            fast(fast.collate(rows(number, size)))
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1] <= 12  # for parts of a layer and of the head, however many layers there are


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how", "backend"),
    [
        ("grpo", {"gradient_checkpointing": True, "packing": "packed"}, "aot_eager"),
        ("dft", {"lora": {"rank": 2}}, "eager"),
    ],
)
def test_training_is_that_of_plain_layers(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, name: str, how: dict[str, Any], backend: str
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", backend)
    found = []
    for compile in (False, True):
        policy, objective = make_policy("llama", torch.float32), get_objective(name)
        settings = Training.model_validate(
            {"steps": 2, "updates_per_batch": 2, "learning_rate": 1e-3, "warmup_ratio": 0.0, "token_budget": 40,
             "compile": compile, **how}
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = Trainer(policy, objective, SameRows(rows_of(policy, objective), units_of(objective)), settings)
        trainer.run()
        assert policy.compiles == compile
        found.append((trainer.record.steps, torch.cat([p.detach().flatten() for p in policy.parameters()])))
    (steps, weights), (others, moved) = found
    assert (weights - moved).norm() <= 1e-5 * weights.norm()
    for one, other in zip(steps, others, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_decoding_is_not_compiled_and_a_copy_has_its_own_weights(make_policy: MakePolicy) -> None:
    policy = make_policy("llama", torch.float32)
    settings = Sampling(samples=2, max_new_tokens=6)
    expected = TransformersSampler(policy).sample([[20, 21]], settings, 0)
    policy.compile_layers(COMPILED)
    before = counters["stats"]["unique_graphs"]
    assert TransformersSampler(policy).sample([[20, 21]], settings, 0) == expected
    assert counters["stats"]["unique_graphs"] == before
    copied, held = policy.frozen_copy(), policy(policy.collate(rows(2, 3))).logp.detach()
    assert copied.compiles
    with torch.no_grad():
        for parameter in policy.model.base_model.layers.parameters():
            parameter.add_(0.1)
    torch.testing.assert_close(copied(copied.collate(rows(2, 3))).logp, held)
    assert not torch.allclose(policy(policy.collate(rows(2, 3))).logp, held, atol=1e-2)


@pytest.mark.slow
def test_hooks_are_seen_and_variances_are_those_of_plain_layers(make_policy: MakePolicy) -> None:
    found = []
    for compile in (False, True):
        policy, objective = make_policy("llama", torch.float32), get_objective("dft")
        if compile:
            policy.compile_layers(COMPILED)
            policy(policy.collate(rows(2, 3)))
        buffer = OfflineBuffer.from_trajectories(
            [replace(row, source="demonstration") for row in rows_of(policy, objective)]
        )
        analysis = analyze_variance(policy, [objective], buffer, rows=len(buffer), draws=0)
        found.append(analysis["objectives"]["dft"]["data_noise"]["trace_cov"]["value"])
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[0] > 0
    seen = list[int]()
    policy.model.base_model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    policy(policy.collate(rows(2, 3)))
    assert seen


def test_auto_is_for_long_runs_on_a_gpu(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "miscompiled", lambda policy: None)  # which compiles: see below
    policy = make_policy("llama", torch.float32)
    policy.compile_layers(Training(steps=10**9))
    assert not policy.compiles
    monkeypatch.setattr(policies, "pins", lambda device: True)
    for settings, compiles in (
        (Training(steps=10**9), True),
        (Training(steps=100), False),
        (Training(steps=10**9, deterministic=True), False),
        (Training(steps=10**9, compile=False), False),
        (Training(steps=1, compile=True), True),
    ):
        policy.compile_layers(settings)
        assert policy.compiles == compiles == ("forward" in vars(policy.model.base_model.layers[0]))


@pytest.mark.slow
def test_what_cannot_be_compiled_is_said_or_left_plain(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler")

    policy = make_policy("llama", torch.float32)
    expected = gradient(policy, rows(2, 3))
    monkeypatch.setattr(compiled, "BACKEND", fails)
    with pytest.raises(UserError, match=r"training\.compile: true: the model's layers cannot be compiled \(.*Failed"):
        policy.compile_layers(COMPILED)
    assert not policy.compiles
    monkeypatch.setattr(policies, "pins", lambda device: True)
    policy.compile_layers(Training(steps=10**9))
    assert not policy.compiles
    assert torch.equal(gradient(policy, rows(2, 3)), expected)


@pytest.mark.slow
def test_compiled_layers_are_compared_with_plain_ones(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout, whatever mode the policy is in."""

    def doubles(graph: Any, inputs: Any) -> Any:
        return lambda *values: tuple(2 * value for value in graph.forward(*values))

    policy = make_policy("gpt2", torch.float32).train()
    monkeypatch.setattr(compiled, "BACKEND", doubles)
    with pytest.raises(UserError, match="the model's layers give other results when compiled: set false, or auto"):
        policy.compile_layers(COMPILED)
    assert policy.training and not policy.compiles
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    policy.compile_layers(COMPILED)
    assert policy.training and policy.compiles


@pytest.mark.slow
@pytest.mark.parametrize(("entries", "backend"), [(2**26, "aot_eager"), (40, "aot_eager"), (40, "inductor")])
def test_fused_log_probs_and_their_gradient(entries: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk of the head, and in several, which are recomputed."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(compiled, "BACKEND", backend)
    monkeypatch.setattr("rlzoo.policy.head.CHUNK_ENTRIES", entries)
    torch.manual_seed(0)
    layer, target, pull = torch.nn.Linear(8, 13, bias=False), torch.randint(13, (9,)), torch.randn(9)
    found = []
    for fused in (False, True):
        hidden = torch.randn(9, 8, generator=torch.Generator().manual_seed(1)).mul_(20).requires_grad_()
        logp = token_log_probs(Head(layer, compiled=fused), hidden, target)["logp"]
        found.append((logp.detach(), *torch.autograd.grad(logp, [hidden, layer.weight], pull)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
