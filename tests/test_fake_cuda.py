"""Every objective on a GPU that is not there: nothing is left on the CPU, and the host waits once per step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from batches import built, of_each_kind
from fake_cuda import GPU, FakeCUDA, fake_cuda
from packaging.version import Version

from rlzoo.config import Packing, Sampling, Training
from rlzoo.objective import Objective, get_objective, list_objectives
from rlzoo.policy import Policy, log_probs
from rlzoo.rollout import TransformersSampler, static_decoding
from rlzoo.testing.engine import SameRows, rows_of, units_of
from rlzoo.training import Trainer

if Version(torch.__version__) < Version("2.9"):
    pytest.skip("torch 2.8 crashes after some dozens of fake CUDA models", allow_module_level=True)

VARIANTS: dict[str, dict[str, Any]] = {
    "iw-sft": {"variant": "ema"},
    "dft-control": {"variant": "shuffled"},
    "power": {"threshold": 0.1},
    "ppo": {"critic": "shared", "bootstrap_truncated": True},
    "grpo": {"truncated": "mask", "kl_correction": True},
}
CASES: list[tuple[str, dict[str, Any]]] = [*((name, {}) for name in list_objectives()), *VARIANTS.items()]
KINDS = of_each_kind({name: built(name) for name in list_objectives()})
MORE_WAITS = {("dft-control", "shuffled"): 2}
"""A permutation of N tokens asks how many they are, and is drawn on the host."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCUDA]:
    with fake_cuda(monkeypatch) as mode:
        yield mode


@pytest.fixture
def policy(gpu: FakeCUDA, tokenizer: Any) -> Policy:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    found = Policy(LlamaForCausalLM(config), tokenizer, "fake", torch.bfloat16)
    found.to(GPU)
    assert found.device == GPU
    return found.eval()


def trainer_of(policy: Policy, objective: Objective, **changes: Any) -> Trainer:
    rows = rows_of(policy, objective)
    sources = [SameRows(rows, units_of(component.objective)) for component in objective.components]
    settings = Training(**{"steps": 2, "token_budget": 100, **changes})
    return Trainer(policy, objective, sources, settings)


PACKED: list[tuple[str, dict[str, Any]]] = [("dft", {}), ("ppo", {}), ("asft", {}), ("grpo", {})]
STEPS = [
    pytest.param(name, options, "padded", marks=[] if not options and name in dict(PACKED) else pytest.mark.slow)
    for name, options in CASES
] + [pytest.param(*case, "packed") for case in PACKED]


@pytest.mark.parametrize(("name", "options", "packing"), STEPS, ids=lambda part: str(part))
def test_a_training_step_is_on_the_gpu_and_the_host_waits_once(
    gpu: FakeCUDA, policy: Policy, name: str, options: dict[str, Any], packing: Packing
) -> None:
    steps = 2 if options or name in KINDS else 1  # the second one differs by what the objective's inputs hold
    trainer = trainer_of(policy, built(name, **options), packing=packing, steps=steps)
    assert policy.packs == (packing == "packed")
    waits: list[list[str]] = []

    def note(_: Trainer, step: int) -> None:
        waits.append(list(gpu.waits))
        gpu.waits.clear()

    trainer.callbacks = [note]
    gpu.waits.clear()
    trainer.run()
    limit = 1 + MORE_WAITS.get((name, options.get("variant", "")), 0)
    assert all(len(one) <= limit for one in waits), waits


class Watched(SameRows):
    """Notes how often the host had waited in this step when the next one's rows were read."""

    def __init__(self, gpu: FakeCUDA, *rows: Any) -> None:
        super().__init__(*rows)
        self.gpu, self.waits = gpu, list[int]()

    def draw_ahead(self) -> None:
        self.waits.append(len(self.gpu.waits))


@pytest.mark.slow
@pytest.mark.parametrize("updates", [1, 2])
def test_the_next_rows_are_read_before_the_host_waits(gpu: FakeCUDA, policy: Policy, updates: int) -> None:
    objective = get_objective("dft")
    source = Watched(gpu, rows_of(policy, objective), units_of(objective))
    settings = Training(steps=3 * updates, updates_per_batch=updates, token_budget=100)
    trainer = Trainer(policy, objective, source, settings, [lambda *_: gpu.waits.clear()])
    gpu.waits.clear()
    trainer.run()
    assert source.waits == [0, 0]  # none after the last batch


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_what_a_step_copies_to_the_gpu_comes_from_pinned_memory(
    gpu: FakeCUDA, policy: Policy, packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(policy, get_objective("grpo"), packing=packing, importance_cap=2.0)
    monkeypatch.setattr("rlzoo.jobs.memory.pins", lambda device: device.type == "cuda")
    gpu.copies.clear()
    trainer.run()
    assert len(gpu.copies) > 8 and set(gpu.copies) == {"pinned, non-blocking"}, gpu.copies


@pytest.mark.slow
def test_scoring_is_on_the_gpu_and_the_host_waits_once(gpu: FakeCUDA, policy: Policy) -> None:
    rows = [([5, 6, 7][:n], [8, 9, 10, 11][: 5 - n]) for n in (1, 2, 3)]
    gpu.waits.clear()
    found = log_probs(policy, rows, 8, [0.7, 1.0, 1.0])
    assert [len(row) for row in found] == [4, 3, 2]
    assert len(gpu.waits) == 1, gpu.waits


@pytest.mark.slow
@pytest.mark.parametrize("greedy", [False, True])
def test_decoding_is_on_the_gpu_and_the_host_waits_now_and_then(gpu: FakeCUDA, policy: Policy, greedy: bool) -> None:
    settings = Sampling(samples=3, temperature=0.7, top_p=0.9, max_new_tokens=48, batch_size=64)
    sampler = TransformersSampler(policy)
    sampler.sample([[5]], settings, seed=0)  # asks once whether static shapes suit the model
    gpu.waits.clear()
    gpu.alternates = True  # some sequences leave
    found = sampler.sample([[5, 6], [7, 8, 9]], settings, seed=0, greedy=greedy)
    assert [len(samples) for samples in found] == ([1, 1] if greedy else [3, 3])
    assert len(gpu.waits) <= 1 + 47 // 16, gpu.waits


@pytest.mark.slow
def test_a_step_of_decoding_can_be_captured(gpu: FakeCUDA, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host neither waits for it nor gives it anything: a CUDA graph would repeat that for ever."""
    seen: list[int] = []
    step = static_decoding.StaticBatch.step

    def watched(batch: static_decoding.StaticBatch) -> None:
        gpu.waits.clear()
        gpu.copies.clear()
        step(batch)
        seen.append(len(batch.token))
        assert gpu.waits == gpu.copies == []

    monkeypatch.setattr(static_decoding.StaticBatch, "step", watched)
    settings = Sampling(samples=3, temperature=0.7, top_p=0.9, max_new_tokens=40, batch_size=64)
    sampler = TransformersSampler(policy)
    sampler.sample([[5]], settings, seed=0)
    assert seen[:2] == [2, 3]  # a trial, and all sequences
    gpu.alternates = True
    sampler.sample([[5, 6], [7, 8, 9]], settings, seed=0)
    assert seen[-1] < 6  # some have left
