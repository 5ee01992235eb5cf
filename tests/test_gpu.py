"""What only a GPU can show: equal numbers on both, the same bits again, kernels that are fused, memory and time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlzoo.config import Sampling, Training
from rlzoo.objective import get_objective
from rlzoo.policy import Policy, load_policy
from rlzoo.policy.defaults import bytes_per_token, token_budget_of
from rlzoo.policy.sequences import Sequences
from rlzoo.rollout import TransformersSampler
from rlzoo.testing.engine import SameRows, rows_of, units_of
from rlzoo.training import Trainer, TrainingRecord

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and pytest -m gpu, which lets tests see it"),
]


def trained(name: str, device: str, dtype: str, **changes: Any) -> tuple[torch.Tensor, TrainingRecord]:
    torch.manual_seed(0)
    policy, objective = load_policy("embedded", dtype, device), get_objective(name)
    rows = rows_of(load_policy("embedded", "float64", "cpu"), objective)
    sources = [SameRows(rows, units_of(component.objective)) for component in objective.components]
    settings = Training.model_validate(
        {"steps": 2, "updates_per_batch": 2, "learning_rate": 1e-4, "warmup_ratio": 0.0, "token_budget": 64, **changes}
    )
    record = Trainer(policy, objective, sources, settings).run()
    return torch.cat([p.detach().double().cpu().flatten() for p in policy.parameters()]), record


@pytest.mark.parametrize("name", ["sft", "dft", "iw-sft", "dpo", "ppo", "grpo", "kto", "otb", "asft"])
def test_two_steps_are_those_of_the_cpu(name: str) -> None:
    """In float64: whatever differs more than by rounding computes something else."""
    (here, told), (there, said) = (trained(name, device, "float64") for device in ("cpu", "cuda"))
    assert (here - there).norm() <= 1e-9 * here.norm()
    for one, other in zip(told.steps, said.steps, strict=True):
        assert other == pytest.approx(one, rel=1e-6, abs=1e-8)
    assert said.costs.peak_memory_bytes > 4 * len(there) and said.costs.wall_seconds > 0


AGAIN = """
import hashlib, torch
from rlzoo.config import Training
from rlzoo.objective import get_objective
from rlzoo.policy.loading import load_for
from rlzoo.testing.engine import rows_of, SameRows, units_of
from rlzoo.training import Trainer

settings = Training(steps=5, learning_rate=1e-3, warmup_ratio=0.0, token_budget=64, deterministic=True)
for name in ("dft", "ppo", "grpo"):
    torch.manual_seed(0)
    policy, objective = load_for("embedded", settings), get_objective(name)
    rows = rows_of(policy, objective)
    Trainer(policy, objective, [SameRows(rows, units_of(objective))], settings).run()
    digest = hashlib.sha256()
    for parameter in policy.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    print(policy.compute, digest.hexdigest())
"""


def test_deterministic_runs_give_the_same_bits() -> None:
    runs = [
        subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, cwd=Path.cwd()) for _ in range(2)
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout and runs[0].stdout.count("torch.bfloat16") == 3


def test_greedy_samples_are_those_of_the_cpu() -> None:
    prompts, settings = [[20, 21], [22, 23, 24], [25]], Sampling(max_new_tokens=40)
    found = [
        TransformersSampler(load_policy("embedded", "float64", device)).sample(prompts, settings, 0, greedy=True)
        for device in ("cpu", "cuda")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16-mixed"])
def test_cuda_graphs_sample_the_same_tokens(dtype: str) -> None:
    policy, settings = load_policy("embedded", dtype, "cuda"), Sampling(samples=24, max_new_tokens=300)
    prompts = [[20, 21], [22, 23, 24], [25]]
    plain, replayed = TransformersSampler(policy, False), TransformersSampler(policy)
    expected, found = (one.sample(prompts, settings, 0) for one in (plain, replayed))
    assert replayed.decoder is not None and not replayed.decoder.refuses_graphs
    alike = [a.ids == b.ids for some in zip(expected, found, strict=True) for a, b in zip(*some, strict=True)]
    assert all(alike) if dtype == "float64" else sum(alike) > 0.8 * len(alike)  # bfloat16 may round a token away


@pytest.mark.parametrize("name", ["dft", "grpo"])
@pytest.mark.parametrize("how", [{}, {"gradient_checkpointing": True}, {"lora": {"rank": 2}}], ids=str)
def test_compiled_layers_train_the_same_weights(name: str, how: dict[str, Any]) -> None:
    (plain, _), (fast, _) = (trained(name, "cuda", "float32", compile=compile, **how) for compile in (False, True))
    assert (plain - fast).norm() <= 1e-4 * plain.norm()


@pytest.mark.parametrize("dtype", ["bfloat16-mixed", "float32"])
def test_attention_of_grouped_heads_is_not_quadratic_in_memory(dtype: str, tokenizer: Any) -> None:
    """The products of all positions with all, written out, would take 8 GB here."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = Qwen2Config(**sizes, num_hidden_layers=1, vocab_size=len(tokenizer), max_position_embeddings=32768)
    mixed = torch.bfloat16 if dtype == "bfloat16-mixed" else None
    policy = Policy(Qwen2ForCausalLM(config).to("cuda").eval(), tokenizer, "qwen", mixed)
    torch.cuda.reset_peak_memory_stats()
    policy(Sequences.collate([[5] * 16000], [[6] * 384], policy.device)).logp.sum().backward()
    assert torch.cuda.max_memory_allocated() < 2 * 2**30


def test_a_budget_is_from_free_memory_and_a_step_fits_into_it() -> None:
    policy = load_policy("embedded")
    assert policy.device.type == "cuda" and policy.compute == torch.bfloat16
    tokens = token_budget_of(policy, "auto")
    assert tokens * bytes_per_token(policy) < torch.cuda.mem_get_info()[0]
