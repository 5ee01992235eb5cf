"""Sharded models: what each process reads and holds, and that the shards are the file's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sharding_worker
import torch
from safetensors.torch import load_file
from test_ranks import FSDP, launch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlzoo.errors import UserError
from rlzoo.inputs import MovingReference
from rlzoo.policy import load_policy, log_probs, sharding
from rlzoo.policy.defaults import bytes_of_training

WORKER = Path(sharding_worker.__file__)
ROWS = sharding_worker.ROWS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_policy: Any, tokenizer: Any) -> dict[str, str]:
    """A model with tied weights, one with an output layer of its own, and GPT-2, whose matrices are not `nn.Linear`."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    apart = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=48, tie_word_embeddings=False, initializer_range=0.3,
        )
    )  # fmt: skip
    for name, model in {"apart": apart, "gpt2": make_policy("gpt2", torch.float32).model}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {"embedded": "embedded", "apart": str(folder / "apart"), "gpt2": str(folder / "gpt2")}


@pytest.fixture(scope="module")
def found(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes finds."""
    folder = tmp_path_factory.mktemp("found")
    launch([str(WORKER), str(folder), *models.values()], 2, folder, FSDP)
    return [json.loads((folder / f"found-{number}.json").read_text()) for number in (0, 1)]


KINDS = ("embedded", "apart", "gpt2")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_main_process_alone_reads_weights_and_each_holds_a_shard(
    kind: str, models: dict[str, str], found: list[dict[str, Any]]
) -> None:
    own = [one[models[kind]] for one in found]
    assert [one["reads"] for one in own] == [1, 0]
    for one in own:
        assert one["refused"].startswith("the analyzer needs whole models: load the policy in a process of its own")
    total = sum(p.numel() for p in load_policy(models[kind]).model.parameters())
    assert all(one["in all"] == total for one in own)
    assert sum(one["held"] for one in own) == total
    assert all(abs(one["held"] - total / 2) < 0.02 * total for one in own)
    trained = bytes_of_training(load_policy(models[kind]))
    for one in own:  # gradients and two moments of shards in float32, and two layers whole
        assert one["training"] == trained - 12 * total + 12 * one["held"] + 4 * one["together"]
        assert kind != "embedded" or 0.5 < one["together"] / total < 0.6, "two of four layers, and the tied embedding"
    for model in ("reference", "teacher", "moving"):
        assert [one["shards"][model] for one in own] == [one["held"] for one in own]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_the_weights_of_the_file(kind: str, models: dict[str, str], found: list[dict[str, Any]]) -> None:
    """Tied weights, buffers that no file holds, log-probs, and a critic's trunk are those of a whole model."""
    whole = load_policy(models[kind], "float32", "cpu")
    weights = {name: sharding_worker.digest(value) for name, value in whole.model.state_dict().items()}
    if kind != "embedded":
        file = load_file(Path(models[kind]) / "model.safetensors")
        assert all(weights[name] == sharding_worker.digest(value) for name, value in file.items())
    expected = sharding_worker.found_in(whole)
    assert kind == "gpt2" or any(name.endswith("inv_freq") for name in expected["buffers"])
    for one in (one[models[kind]] for one in found):
        assert one["tied"] == (kind != "apart")
        assert one["buffers"] == expected["buffers"]
        assert one["weights"] == weights
        for row, row_alone in zip(one["logp"], expected["logp"], strict=True):
            assert row == pytest.approx(row_alone, rel=1e-5, abs=1e-6)
        zeros, sums = one["critic"]
        assert not any(zeros) and sums == pytest.approx(expected["critic"][1], rel=1e-4, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_shards_are_in_the_dtype_of_products_and_give_the_same_log_probs(
    kind: str, models: dict[str, str], found: list[dict[str, Any]]
) -> None:
    for one in (one[models[kind]] for one in found):
        assert one["mixed"]["reference"] == one["mixed"]["teacher"] == one["mixed"]["moving"] == one["mixed"]["policy"]
        assert set(one["dtypes"]["policy"].values()) == set(one["dtypes"]["moving"].values()) == {"torch.float32"}
        assert one["dtypes"]["reference"] == one["dtypes"]["teacher"]
        assert one["dtypes"]["reference"] == sharding_worker.dtypes(narrowed(models[kind]))


def narrowed(model: str) -> Any:
    return load_policy(model, "bfloat16-mixed", "cpu").reference()


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_model_holds_matrices_in_the_dtype_that_they_are_multiplied_in(
    kind: str, models: dict[str, str]
) -> None:
    """Autocast casts them in every forward pass: log-probs are equal to the bit. A moving average needs the digits."""
    policy = load_policy(models[kind], "bfloat16-mixed", "cpu")
    frozen, teacher = policy.reference(), load_policy(models[kind], "bfloat16-mixed", "cpu", frozen=True)
    expected = log_probs(policy, ROWS)
    assert log_probs(frozen, ROWS) == log_probs(teacher, ROWS) == expected
    for model in (frozen, teacher):
        assert not any(p.requires_grad for p in model.parameters())
        narrow = {name for name, p in model.model.named_parameters() if p.dtype == torch.bfloat16}
        kept = [m.weight for m in model.model.modules() if isinstance(m, nn.Embedding) or "Norm" in type(m).__name__]
        assert narrow and all(weight.dtype == torch.float32 for weight in kept)
        assert sum(p.numel() for p in model.model.parameters() if p.dtype == torch.bfloat16) > 0.5 * (
            sum(p.numel() for p in model.model.parameters()) - sum(weight.numel() for weight in kept)
        )
    moving = MovingReference(0.5).moving_model(policy)
    assert {p.dtype for p in moving.parameters()} == {torch.float32} and log_probs(moving, ROWS) == expected
    assert {p.dtype for p in load_policy(models[kind], "float32").reference().parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP 1"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1"),
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "weights offloaded to the CPU"),
    ],
)
def test_other_ways_to_divide_a_model_are_refused(
    variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not sharding.is_asked(), "one process holds the whole model, whatever the launcher says"
    monkeypatch.setattr("rlzoo.policy.sharding.world_size", lambda: 2)
    with pytest.raises(UserError, match=rf"does not support {told}.*: launch it with --use_fsdp --fsdp_version 2"):
        load_policy("embedded")


def test_a_sharded_model_is_not_in_4_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("rlzoo.policy.sharding.world_size", lambda: 2)
    with pytest.raises(UserError, match="weights in 4 bits cannot be sharded"):
        load_policy("embedded", load_in_4bit=True)


def test_gradients_are_clipped_as_by_torch() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(5, 4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for most in (0.1, 100.0):
        for model in models:
            model.zero_grad()
            model(torch.ones(2, 5)).square().sum().backward()
        norms = [
            sharding.clip_gradients(models[0].parameters(), most),
            nn.utils.clip_grad_norm_(models[1].parameters(), most),
        ]
        assert torch.equal(*norms)
        for pair in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(*(p.grad for p in pair if p.grad is not None))
    assert float(sharding.clip_gradients([nn.Parameter(torch.ones(1))], 1.0)) == 0.0
