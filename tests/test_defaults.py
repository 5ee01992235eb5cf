"""What ``auto`` stands for, on machines with and without GPUs, and what one GPU per worker means."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from rlzoo.comparison.resolve import check
from rlzoo.config import Experiment, Rollouts, Sampling, Training, load_experiment, validated
from rlzoo.errors import UserError
from rlzoo.inputs import Critic
from rlzoo.jobs.pool import visible_gpus
from rlzoo.objective import get_objective
from rlzoo.policy import Policy, load_policy
from rlzoo.policy.adapters import merged
from rlzoo.policy.defaults import (
    LEAST,
    bytes_of_training,
    bytes_per_token,
    device_of,
    dtype_of,
    make_deterministic,
    resolved,
    token_budget_of,
)
from rlzoo.policy.loading import load_for
from rlzoo.policy.sequences import Sequences
from rlzoo.rollout import TransformersSampler, VLLMSampler, engine_of, sampler_of
from rlzoo.testing.engine import SameRows, rows_of, units_of
from rlzoo.training import Trainer
from rlzoo.training.batches import BufferSource
from rlzoo.training.state import random_states, restore_random_states

MakePolicy = Callable[..., Policy]
GPU = torch.device("cuda", 0)


class Elsewhere(Policy):
    """A policy that says that it is on a GPU."""

    where = GPU

    @property
    def device(self) -> torch.device:
        return self.where


def on_gpu(policy: Policy, compute: torch.dtype | None = None) -> Policy:
    return Elsewhere(policy.model, policy.tokenizer, policy.name, compute)


# Devices


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("0", ["0"]),
        ("3,5", ["3", "5"]),
        (" 1 , 0 ", ["1", "0"]),
        ("GPU-8932f937-d72c,GPU-b1", ["GPU-8932f937-d72c", "GPU-b1"]),
        ("MIG-GPU-8932/1/0,MIG-GPU-8932/2/0", ["MIG-GPU-8932/1/0", "MIG-GPU-8932/2/0"]),
        ("2,-1,3", ["2"]),
        ("", []),
        ("-1", []),
    ],
)
def test_the_gpus_that_a_process_may_use(asked: str, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    assert visible_gpus() == found


def test_without_a_list_of_its_own_they_are_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert visible_gpus() == ["0", "1", "2"]


def test_the_device_that_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {str(device_of(asked)) for asked in (None, "auto", "cpu", torch.device("cpu"))} == {"cpu"}
    with pytest.raises(UserError, match=r"device 'cuda:1': this process sees 0 GPUs"):
        device_of("cuda:1")
    with pytest.raises(UserError, match="unknown device 'gpu': give auto, cpu, cuda, or one GPU"):
        load_for("embedded", Training(device="gpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(device_of(asked)) for asked in ("auto", None, "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    with pytest.raises(UserError, match=r"device 'cuda:2': this process sees 2 GPUs"):
        device_of("cuda:2")


def test_an_engine_and_its_policy_share_a_gpu(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlzoo.rollout.vllm.find_spec", lambda name: True)
    policy = on_gpu(make_policy("llama", dtype=torch.float32))
    monkeypatch.setattr(Elsewhere, "where", torch.device("cuda", 1))
    with pytest.raises(UserError, match=r"the policy is on cuda:1, .* start rlzoo with CUDA_VISIBLE_DEVICES=1"):
        VLLMSampler(policy)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("rlzoo.rollout.vllm._engines", {})
    monkeypatch.setattr("rlzoo.rollout.vllm._start", lambda *_: "an engine")
    monkeypatch.setattr(Elsewhere, "where", GPU)
    assert VLLMSampler(policy).engine == "an engine"


def test_an_earlier_accelerator_elsewhere_moves_nothing(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, objective = make_policy(), get_objective("sft")
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    Accelerator(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))  # as of a policy on a GPU
    source = SameRows(rows_of(policy, objective), units_of(objective))
    trainer = Trainer(policy, objective, source, Training(steps=1))
    assert trainer.accelerator.device.type == "meta"
    before = [p.detach().clone() for p in policy.parameters()]
    trainer.run()
    assert {p.device.type for p in policy.parameters()} == {"cpu"}
    assert any(not torch.equal(p, old) for p, old in zip(policy.parameters(), before, strict=True))


# Dtypes


def test_the_dtype_that_is_meant() -> None:
    assert dtype_of("auto", GPU) == "bfloat16-mixed" and dtype_of("auto", torch.device("cpu")) == "float32"
    assert dtype_of("float64", GPU) == "float64"
    policy = load_policy("embedded", device="cpu")
    assert policy.compute is None and {p.dtype for p in policy.parameters()} == {torch.float32}


def test_determinism_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    load_for("embedded", Training(deterministic=True))
    assert not asked and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        make_deterministic(GPU)
        assert asked == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    told: list[torch.device] = []
    monkeypatch.setattr("rlzoo.policy.loading.make_deterministic", told.append)
    for deterministic in (True, False):
        load_for("embedded", Training(deterministic=deterministic, device="cpu"))
    assert told == [torch.device("cpu")]


def test_each_process_has_the_random_numbers_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with states of their own; a third, which joins later, goes on with the main one's."""
    own = {0: torch.tensor([1, 2], dtype=torch.uint8), 1: torch.tensor([3, 4], dtype=torch.uint8)}
    restored: dict[int, list[int]] = {}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: own[device.index])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: restored.update({device.index: state.tolist()})
    )
    everyone: list[Any] = []

    def alone(value: Any) -> list[Any]:
        everyone.append(value)
        return [value]

    monkeypatch.setattr("rlzoo.training.state.gathered", alone)
    for number in (0, 1):
        random_states(torch.device("cuda", number))
    monkeypatch.setattr("rlzoo.training.state.gathered", lambda value: everyone)
    tensors, plain = random_states(GPU)
    for number in (0, 1, 2):
        monkeypatch.setattr("rlzoo.training.state.rank", lambda number=number: number)
        restore_random_states(tensors, plain, torch.device("cuda", number))
    assert restored == {0: [1, 2], 1: [3, 4], 2: [1, 2]}


def sequences_of(policy: Policy) -> Sequences:
    return Sequences.collate([[20, 21], [22]], [[23, 24, 25], [26, 27]], policy.device)


@pytest.mark.parametrize("shared", [True, False])
def test_a_critic_has_float32_values_under_mixed_precision(shared: bool, make_policy: MakePolicy) -> None:
    policy = make_policy("llama", dtype=torch.float32)
    policy.compute = torch.bfloat16
    policy.attach([Critic(shared=shared)])
    module: Any = policy.modules_of_inputs["value"]
    torch.nn.init.normal_(module.head.weight)
    sequences = sequences_of(policy)
    scores = policy(sequences)
    hidden = policy.hidden(sequences)  # of the policy's trunk, which that of a critic is a copy of
    expected = sequences.spread(module.head(hidden)[:, 0])
    assert hidden.dtype == scores.logp.dtype == torch.float32
    assert torch.equal(scores.inputs["value"], expected)
    assert not torch.equal(expected, expected.bfloat16().float())


def test_modules_and_adapters_beside_bfloat16_weights_train_in_float32(make_policy: MakePolicy) -> None:
    policy = make_policy("llama", dtype=torch.bfloat16)
    policy.add_lora(rank=2)
    policy.attach([Critic(shared=True)])
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and len(trained) > 4
    assert {p.dtype for p in policy.parameters() if not p.requires_grad} == {torch.bfloat16}
    scores = policy(sequences_of(policy))
    (scores.logp.sum() + scores.inputs["value"].sum()).backward()
    assert all(p.grad is not None for p in trained.values())
    weights = merged(policy.model, dict(policy.model.state_dict()))
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_weights_that_round_their_updates_away_do_not_train(make_policy: MakePolicy) -> None:
    policy = make_policy("llama", dtype=torch.bfloat16)
    wrong = "bfloat16 rounds away small updates of weights: use bfloat16-mixed"
    with pytest.raises(UserError, match=wrong):
        Trainer(policy, get_objective("sft"), BufferSource.__new__(BufferSource), Training())
    for changes, fits in (({"dtype": "bfloat16"}, False), ({"dtype": "bfloat16", "lora": {}}, True)):
        experiment = load_experiment("facts", {f"training.{name}": value for name, value in changes.items()})
        if fits:
            check(experiment)
        else:
            with pytest.raises(UserError, match=wrong):
                check(experiment)


# Token budgets


def qwen(tokenizer: Any, layers: int = 3) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=96, intermediate_size=560, num_attention_heads=6, num_key_value_heads=1,
        num_hidden_layers=layers, vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=1,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def kept(policy: Policy, tokens: int) -> int:
    """What a forward pass keeps for its backward pass, weights left out, in bytes."""
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    sequences = Sequences.collate([[5] * (tokens - 1)] * 2, [[6]] * 2, policy.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logp = policy(sequences).logp
    assert logp.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize("kind", ["embedded", "qwen"])
@pytest.mark.parametrize(
    ("dtype", "compute"),
    [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None), (torch.float64, None)],
)
def test_the_memory_of_a_token(kind: str, dtype: torch.dtype, compute: torch.dtype | None, tokenizer: Any) -> None:
    """The formula against what autograd keeps of 32 more tokens."""
    model = load_policy("embedded").model if kind == "embedded" else qwen(tokenizer)
    policy = Policy(model.to(dtype), tokenizer, kind, compute)
    per_token = (kept(policy, 48) - kept(policy, 32)) / 32
    assert bytes_per_token(policy) == pytest.approx(per_token, rel=0.3)


def test_a_budget_from_what_is_free(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("llama", dtype=torch.float32)
    assert token_budget_of(policy, 77) == 77
    assert [token_budget_of(policy, asked) for asked in ("auto", "auto/4", "auto/8192")] == [4096, 1024, 1]
    there = on_gpu(policy, torch.bfloat16)

    def needed_for(tokens: int) -> float:
        return bytes_of_training(there) + tokens * bytes_per_token(there) / 0.85

    for tokens, found in ((20_000, 20_000), (10, LEAST), (10**9, 65536)):
        monkeypatch.setattr("rlzoo.policy.defaults.free_bytes", lambda device, tokens=tokens: needed_for(tokens))
        assert token_budget_of(there, "auto") == pytest.approx(found, abs=1)
        assert token_budget_of(there, "auto/4") == pytest.approx(found / 4, abs=1)
    monkeypatch.setattr("rlzoo.policy.defaults.free_bytes", lambda device: needed_for(20_000))
    monkeypatch.setattr("rlzoo.policy.defaults.gathered", lambda own: [own, own // 2, 2 * own])
    assert token_budget_of(there, "auto") == pytest.approx(10_000, abs=1), "that of the process with the least memory"
    monkeypatch.setattr("rlzoo.policy.defaults.gathered", lambda own: [own])
    # AdamW's moments and gradients are in float32, and a copy of the weights is in bfloat16
    weights = sum(p.numel() for p in there.parameters())
    assert bytes_of_training(there) - bytes_of_training(on_gpu(policy)) == 2 * weights
    needed = bytes_of_training(there)
    # and three float32 chunks of at most 2²⁶ logits, whose rows are a multiple of 128
    assert needed == 14 * weights + 3 * 4 * (2**26 // policy.vocabulary // 128 * 128) * policy.vocabulary
    head = policy.model.lm_head.weight
    head.grad = torch.zeros_like(head)
    assert needed - bytes_of_training(there) == 3 * 4 * head.numel(), "gradient and moments are there already"
    head.grad = None
    # an engine in this process may take 0.3 of all memory
    monkeypatch.setattr("rlzoo.policy.defaults.find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10**7))
    monkeypatch.setattr("rlzoo.policy.defaults.free_bytes", lambda device: needed_for(20_000) + 3 * 10**6)
    assert token_budget_of(there, "auto") == pytest.approx(20_000, abs=1)


def test_keys_need_not_be_as_wide_as_hidden_states(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("llama", dtype=torch.float32)
    config = policy.model.config
    before = bytes_per_token(policy)
    monkeypatch.setattr(config, "head_dim", config.hidden_size // config.num_attention_heads + 5)
    wider = 8 * 5 * config.num_key_value_heads * config.num_hidden_layers
    assert bytes_per_token(policy) - before == wider


def test_a_token_takes_as_much_in_bfloat16_as_in_mixed_precision(make_policy: MakePolicy) -> None:
    mixed, whole = make_policy("llama", dtype=torch.float32), make_policy("llama", dtype=torch.bfloat16)
    mixed.compute = torch.bfloat16
    assert bytes_per_token(whole) == bytes_per_token(mixed) < bytes_per_token(make_policy("llama", dtype=torch.float32))


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "automatic", "auto/0", None])
def test_a_budget_that_is_none(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"token_budget: .* is neither a whole number of at least 1 nor auto"):
        validated(Training, {"token_budget": wrong}, "training")


def test_parts_of_a_budget() -> None:
    experiment: Experiment = load_experiment("arithmetic", {"training.token_budget": "auto", "seeds": [0]})
    parts = experiment.with_smaller_batches(2).with_smaller_batches(4)
    assert parts.training.token_budget == "auto/8" and parts.training_of("sft").token_budget == "auto/8"


# Engines


def test_the_engine_that_is_meant(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    here = make_policy("llama", dtype=torch.float32)
    there = on_gpu(here)
    for installed, expected in ((True, "vllm"), (None, "transformers")):
        monkeypatch.setattr("rlzoo.rollout.sampler.find_spec", lambda name, found=installed: found)
        assert engine_of(Sampling(), there) == expected and engine_of(Sampling(), here) == "transformers"
        assert engine_of(Sampling(engine="transformers"), there) == "transformers"
        assert engine_of(Sampling(url="http://here"), here) == "vllm"
        assert engine_of(Rollouts(behaviour="sampler")) == expected, "it may be on a GPU"
        assert engine_of(Sampling(engine_options={"max_model_len": 9})) == expected
        with monkeypatch.context() as several:  # none of which can hold an engine
            several.setattr("rlzoo.rollout.sampler.world_size", lambda: 2)
            assert engine_of(Sampling(), there) == "transformers"
    assert isinstance(sampler_of(here, Sampling()), TransformersSampler)
    assert engine_of(Sampling()) == engine_of(Rollouts(behaviour="sampler")) == "transformers"


def test_a_run_records_what_auto_was(make_policy: MakePolicy) -> None:
    found = resolved(load_policy("embedded", "bfloat16-mixed"), Training(token_budget="auto/2"), "transformers")
    assert found == {
        "device": "cpu", "dtype": "bfloat16-mixed", "token_budget": 2048, "packing": "padded", "compile": False,
        "engine": "transformers",
    }  # fmt: skip
    assert resolved(make_policy(), Training())["dtype"] == "float64"


# Memory that runs out


@pytest.mark.slow
def test_sampling_is_halved_until_it_fits(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, settings = [[20, 21], [22, 23, 24], [25]], Sampling(samples=4, max_new_tokens=6, batch_size=64)
    whole = TransformersSampler(make_policy()).sample(prompts, settings, seed=3)
    sampler, sizes, told = TransformersSampler(make_policy()), list[int](), list[int]()
    assert sampler.decoder is not None
    plain = sampler.decoder.decode

    def limited(prompts: Any, copies: int, *rest: Any) -> Any:
        sizes.append(len(prompts) * copies)
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return plain(prompts, copies, *rest)

    monkeypatch.setattr(sampler.decoder, "decode", limited)
    assert sampler.sample(prompts, settings, seed=3, progress=told.append) == whole
    assert sizes[:3] == [12, 6, 3] or sizes[:2] == [12, 4], sizes
    assert sum(told) == 3
    sizes.clear()
    sampler.sample(prompts, settings, seed=4)
    assert max(sizes) <= 3, "what fits is remembered"
    monkeypatch.setattr(sampler.decoder, "decode", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(UserError, match="out of memory while sampling a single sequence: no room"):
        sampler.sample(prompts, settings, seed=3)
