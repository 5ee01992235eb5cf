"""Packed micro-batches: rows one after the other, without padding, and each as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from batches import built, of_each_kind
from fake_cuda import GPU, fake_cuda
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
    masking_utils,
)

from rlzoo.buffers import OfflineBuffer
from rlzoo.config import Lora, Sampling, Training
from rlzoo.errors import UserError
from rlzoo.inputs import Critic, Input, Stage, Statistic
from rlzoo.objective import get_objective, list_objectives
from rlzoo.policy import MicroBatches, Policy, packing
from rlzoo.policy.attention import NAME
from rlzoo.policy.microbatches import token_batches
from rlzoo.policy.sequences import Row
from rlzoo.rollout import TransformersSampler
from rlzoo.testing.engine import SameRows, rows_of, units_of
from rlzoo.training import Trainer
from rlzoo.variance import analyze_variance

SMALL: dict[str, Any] = {
    "vocab_size": 43, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "initializer_range": 0.3, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OLD: dict[str, Any] = {"vocab_size": 43, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WINDOW: dict[str, Any] = {"sliding_window": 3}
PACKED: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2 with windows": lambda: Qwen2Config(**SMALL, **WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=8),
    "gemma": lambda: GemmaConfig(**SMALL, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(
        **SMALL, **WINDOW, head_dim=8, query_pre_attn_scalar=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": lambda: MistralConfig(**SMALL, **WINDOW),
    "phi3": lambda: Phi3Config(**SMALL),
    "olmo2": lambda: Olmo2Config(**SMALL),
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=4.0, attention_multiplier=0.3),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.3),
    "gpt2": lambda: GPT2Config(**OLD, n_embd=32, n_layer=2, n_head=4, n_positions=16, initializer_range=0.3),
    "opt": lambda: OPTConfig(
        **OLD, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=16,
        word_embed_proj_dim=32, init_std=0.3,
    ),
}  # fmt: skip
PADDED: dict[str, tuple[Callable[[], Any], str]] = {
    "gemma2": (lambda: Gemma2Config(**SMALL, head_dim=8), "its attention uses softcap"),
    "bloom": (lambda: BloomConfig(**OLD, hidden_size=32, n_layer=1, n_head=4), "does not take position_ids"),
    "recurrent_gemma": (
        lambda: RecurrentGemmaConfig(**SMALL, block_types=["recurrent", "attention"]),
        "layers that are not attention|does not use transformers' attention",  # as transformers 5.0 and newer tell them
    ),
}
ROWS = [
    Row([1, 2, 3], [4, 5, 6, 7, 8]),
    Row([9], [10]),
    Row([11, 12, 13, 14, 15, 16], [17, 18, 19, 20, 21, 22, 23], 0.7),
    Row([5, 4], [3, 2, 9]),
]
every_model = pytest.mark.parametrize("kind", PACKED)


def model_of(config: Any, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def policy_of(config: Any, dtype: torch.dtype = torch.float64) -> Policy:
    tokenizer: Any = SimpleNamespace(eos_token_id=2, pad_token_id=0, get_vocab=dict)
    policy = Policy(model_of(config, dtype), tokenizer)
    if config.model_type in ("gpt2", "opt") and policy.model.config._attn_implementation != NAME:
        pytest.skip(f"in transformers {transformers.__version__} its code asks for the library's own attention")
    return policy


def packed(policy: Policy) -> Policy:
    policy.pack("packed")
    return policy


def gradient(policy: Policy, loss: Tensor) -> Tensor:
    policy.zero_grad()
    torch.autograd.backward(loss)
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@every_model
def test_a_pack_has_the_log_probs_and_gradients_of_padded_rows(kind: str) -> None:
    policy = policy_of(PACKED[kind]())
    statistics = [Statistic("entropy")]
    values, gradients = [], []
    for is_packed in (False, True):
        policy.pack("packed" if is_packed else "padded")
        sequences = policy.collate(ROWS)
        assert sequences.ids.shape == ((1, 28) if is_packed else (4, 13))
        found = policy(sequences, statistics=statistics)
        values.append(found.values())
        gradients.append(gradient(policy, (found.logp * torch.linspace(-1, 1, 7)).sum()))
    torch.testing.assert_close(values[1], values[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-6)  # Gemma's norms are in float32


@every_model
def test_rows_of_a_pack_do_not_change_each_other(kind: str) -> None:
    policy = packed(policy_of(PACKED[kind]()))
    before = policy(policy.collate(ROWS)).logp.detach()
    for place, row in enumerate(ROWS):
        other = Row([(i + 20) % 43 for i in row.prompt_ids], [(i + 20) % 43 for i in row.completion_ids])
        now = policy(policy.collate([*ROWS[:place], other, *ROWS[place + 1 :]])).logp.detach()
        changed = (now != before).any(1).tolist()
        assert changed == [i == place for i in range(len(ROWS))]


@pytest.mark.parametrize("kind", PADDED)
def test_a_model_that_cannot_pack_runs_padded_or_says_why(kind: str) -> None:
    make, reason = PADDED[kind]
    policy = policy_of(make())
    with pytest.raises(UserError, match=reason):
        policy.pack("packed")
    before = policy(policy.collate(ROWS)).logp
    for packing_ in ("auto", "padded"):
        policy.pack(packing_)
        assert not policy.packs
        assert torch.equal(policy(policy.collate(ROWS)).logp, before)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: functional.pad(x[:, :-1], (0, 0, 1, 0)),
        lambda x: 1e-6 * functional.pad(x[:, :-1], (0, 0, 1, 0)),
        lambda x: 1e-6 * functional.pad(x[:, 1:], (0, 0, 0, 1)),
        lambda x: torch.arange(x.shape[1], dtype=x.dtype)[:, None],
    ],
    ids=["the one before", "little of it", "little of the next", "its place in the pack"],
)
def test_a_layer_that_mixes_tokens_is_noticed(mixed: Callable[[Tensor], Tensor]) -> None:
    class Shifted(nn.Module):
        """Adds to each token another one, whoever's it is."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.inner(x + mixed(x))
            return found

    policy = policy_of(PACKED["llama"]())
    policy.model.model.layers[0].mlp = Shifted(policy.model.model.layers[0].mlp)
    with pytest.raises(UserError, match="rows of a pack affect each other"):
        policy.pack("packed")


def test_auto_packs_on_a_gpu_alone() -> None:
    policy = policy_of(PACKED["llama"](), torch.bfloat16)
    policy.pack("auto")
    assert not policy.packs


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None, window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What `torch.nn.attention.varlen.varlen_attn` is documented to compute, in plain products."""
    assert enable_gqa and cu_q.dtype == cu_k.dtype == torch.int32 and torch.equal(cu_q, cu_k)
    assert max_q == max_k == int(cu_q.diff().max())
    assert q.dtype == k.dtype == v.dtype
    left, right = window_size
    rows = []
    for a, b in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        shared = q.shape[1] // k.shape[1]
        own_k, own_v = (x[a:b].repeat_interleave(shared, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[a:b], own_k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        ago = torch.arange(b - a)[:, None] - torch.arange(b - a)
        seen = (ago >= -right) & ((ago <= left) if left >= 0 else torch.tensor(True))
        rows.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), own_v))
    return torch.cat(rows)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU's kernel, here in float64."""
    monkeypatch.setattr(packing, "_kernel", lambda: (varlen, {"enable_gqa": True}))
    monkeypatch.setattr(packing, "has_kernel", lambda device: True)
    monkeypatch.setattr(packing, "HALF", (torch.float64,))
    yield


@every_model
def test_the_kernel_is_told_what_it_needs(kernel: None, kind: str) -> None:
    policy = policy_of(PACKED[kind]())
    before = policy(policy.collate(ROWS)).logp
    policy.pack("auto")
    assert policy.packs
    torch.testing.assert_close(policy(policy.collate(ROWS)).logp, before, rtol=0, atol=1e-12)


def test_auto_is_padded_where_the_kernel_would_not_be_called(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = policy_of(LlamaConfig(**{**SMALL, "hidden_size": 48}))  # heads of 12, and it takes multiples of 8
    odd.pack("auto")
    assert not odd.packs
    odd.model.train()
    odd.pack("packed")
    assert odd.packs and odd.model.training
    fits = cycle([True, False])  # the first layer's attention alone
    monkeypatch.setattr(packing, "_fits_kernel", lambda *_: next(fits))
    odd.pack("auto")
    assert not odd.packs


def test_the_kernel_is_not_called_for_dropout(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, plain = list[int](), packing._by_kernel

    def spy(*given: Any) -> Tensor:
        calls.append(1)
        return plain(*given)

    monkeypatch.setattr(packing, "_by_kernel", spy)
    policy = packed(policy_of(LlamaConfig(**SMALL, attention_dropout=0.5)))
    for training, expected in ((True, 0), (False, 2)):
        policy.train(training)
        calls.clear()
        policy(policy.collate(ROWS))
        assert len(calls) == expected


def test_memory_that_runs_out_is_no_reason_against_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(packing, "_mixes", out_of_memory)
    with pytest.raises(MemoryError):
        packed(policy_of(PACKED["llama"]()))


def test_layers_and_attention_of_other_kinds_are_not_packed() -> None:
    policy = policy_of(PACKED["llama"]())
    policy.model.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(UserError, match="layers that are not attention, or of another kind"):
        packed(policy)
    pack, x = packing.Pack.of((2, 1), torch.device("cpu")), torch.zeros(1, 1, 3, 8)
    for name in ("softcap", "s_aux", "sinks", "position_bias", "alibi"):
        with pytest.raises(packing.CannotPackError, match=name):
            packing.attention_of_pack(None, nn.Module(), x, x, x, pack, **{name: 1.0})
    with pytest.raises(packing.CannotPackError, match="is not causal"):
        packing.attention_of_pack(None, nn.Module(), x, x, x, pack, is_causal=False)


@pytest.mark.parametrize(("capability", "recent"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_the_kernel_is_for_gpus_since_ampere(
    capability: tuple[int, int], recent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert packing._is_recent.__wrapped__(GPU) is recent


def test_the_pytorch_here_has_such_a_kernel() -> None:
    if not hasattr(torch.nn.attention, "varlen"):
        pytest.importorskip("torch.nn.attention.varlen")
    assert packing._kernel() is not None


@pytest.mark.slow
def test_a_pack_on_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors refuse to mix devices; the kernel is PyTorch's own, forward and backward."""
    pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(packing, "has_kernel", lambda device: device.type == "cuda")
    with fake_cuda(monkeypatch) as gpu:
        policy = policy_of(PACKED["llama"](), torch.bfloat16)
        policy.to(GPU)
        policy.pack("auto")
        assert policy.packs
        gpu.waits.clear()
        logp = policy(policy.collate(ROWS)).logp
        assert logp.device == GPU and logp.shape == (4, 7)
        torch.autograd.backward(logp.sum())
        assert {p.grad.device for p in policy.parameters() if p.grad is not None} == {GPU}
        assert not gpu.waits


def test_a_copy_of_the_trunk_takes_packs_too() -> None:
    policy = policy_of(PACKED["llama"]())
    policy.pack("packed")
    policy.attach([Critic()])
    shapes: list[tuple[int, ...]] = []
    trunk: Any = policy.modules_of_inputs["value"].trunk
    trunk.register_forward_pre_hook(
        lambda _, args, options: shapes.append(options["input_ids"].shape), with_kwargs=True
    )
    sequences = policy.collate(ROWS)
    policy(sequences)
    assert shapes == [(1, sum(sequences.lengths))] and sequences.packed() is sequences


def test_padded_rows_need_no_mask_and_share_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask, or keys copied for query heads, would keep a GPU from its fast kernels."""
    told, looks = [], masking_utils.find_packed_sequence_indices
    plain = functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        told.append((options["attn_mask"], options["is_causal"], options["enable_gqa"], key.shape[1]))
        return plain(query, key, value, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    for kind in ("llama", "qwen2", "qwen3", "granite", "olmo2"):
        policy = policy_of(PACKED[kind]())
        policy(policy.collate(ROWS))
        assert told == [(None, True, True, 2)] * 2, kind
        told.clear()
    assert masking_utils.find_packed_sequence_indices is looks, "transformers is left as it was"


def tiny(tokenizer: Any) -> Policy:
    sizes = {**SMALL, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return Policy(model_of(LlamaConfig(**sizes)), tokenizer, "tiny")


def trained(tokenizer: Any, name: str, options: dict[str, Any], **changes: Any) -> tuple[Tensor, dict[str, Any]]:
    """Weights and the last metrics after two steps, with modules of inputs."""
    policy, objective = tiny(tokenizer), built(name, **options)
    torch.manual_seed(0)
    rows = rows_of(policy, objective)
    sources = [SameRows(rows, units_of(component.objective)) for component in objective.components]
    settings = Training(steps=2, updates_per_batch=2, learning_rate=1e-4, warmup_ratio=0.0, **changes)
    trainer = Trainer(policy, objective, sources, settings)
    record = trainer.run()
    assert policy.packs == (settings.packing == "packed")
    return torch.cat([p.detach().flatten() for p in policy.parameters()]), record.steps[-1]


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in of_each_kind({name: built(name) for name in list_objectives()})),
    ("ppo", {"critic": "shared"}),
    ("iw-sft", {"variant": "ema"}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_objectives_of_every_kind_train_the_same_weights(tokenizer: Any, name: str, options: dict[str, Any]) -> None:
    (padded_, metrics), (packed_, same) = (
        trained(tokenizer, name, options, packing=packing_) for packing_ in ("padded", "packed")
    )
    torch.testing.assert_close(packed_, padded_, rtol=0, atol=1e-9)
    assert same == pytest.approx(metrics, rel=1e-6, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"lora": Lora(rank=2)},
        {"lora": Lora(rank=2), "gradient_checkpointing": True, "token_budget": 30},
        {"token_budget": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["ppo", "asft"])
def test_adapters_and_recomputation_are_the_same(tokenizer: Any, name: str, changes: dict[str, Any]) -> None:
    (padded_, _), (packed_, _) = (
        trained(tokenizer, name, {}, packing=packing_, **changes) for packing_ in ("padded", "packed")
    )
    torch.testing.assert_close(packed_, padded_, rtol=0, atol=1e-9)


def test_the_token_budget_counts_no_padding() -> None:
    units, lengths = [(0,), (1,), (2,), (3,)], [10, 2, 2, 6]
    assert list(token_batches(units, lengths, 20)) == [[1, 2, 3], [0]]
    assert list(token_batches(units, lengths, 20, packed=True)) == [[1, 2, 3, 0]]
    assert list(token_batches(units, lengths, 19, packed=True)) == [[1, 2, 3], [0]]
    assert list(token_batches([(0, 1), (2, 3)], lengths, 12, packed=True)) == [[2, 3], [0, 1]]


def test_scoring_is_packed() -> None:
    policy, seen = policy_of(PACKED["llama"]()), []
    policy.model.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True
    )
    found = []
    for packing_ in ("padded", "packed"):
        policy.pack(packing_)
        seen.clear()
        found.append(MicroBatches(28).log_probs(policy, ROWS)["logp"])
        assert seen == ([(3, 8), (1, 13)] if packing_ == "padded" else [(1, 28)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_models_that_cannot_pack_take_the_same_rows_padded() -> None:
    """A reference of another kind, and an input's own trunk of another kind."""

    class OwnTrunk(Input):
        stage, key = Stage.FORWARD, "own"

        def module(self, policy: Policy) -> nn.Module:
            found: nn.Module = model_of(PADDED["bloom"][0]()).base_model
            return found

        def trunk(self, module: nn.Module) -> nn.Module:
            return module

        def of_hidden(self, module: nn.Module, hidden: Tensor) -> Tensor:
            return hidden[:, 0]

    policy, other = policy_of(PACKED["llama"]()), policy_of(PADDED["bloom"][0]())
    policy.attach([OwnTrunk()])
    found = []
    for packing_ in ("padded", "packed"):
        policy.pack(packing_)
        term = lambda own, reference, _: (own.softmax(-1) * reference).sum(-1)  # noqa: E731
        found.append(policy(policy.collate(ROWS), term=term, reference=other))
    torch.testing.assert_close(found[1].values(), found[0].values(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1].term, found[0].term, rtol=0, atol=1e-12)


def test_an_analysis_of_a_packed_policy_is_the_same(tokenizer: Any) -> None:
    found = []
    for packing_ in ("padded", "packed"):
        policy, objective = tiny(tokenizer), get_objective("grpo")
        policy.pack(packing_)
        rows = rows_of(policy, objective)
        buffer = OfflineBuffer.from_trajectories(rows)
        analysis = analyze_variance(policy, [objective], buffer, rows=len(rows), draws=0)
        found.append(analysis["objectives"]["grpo"]["data_noise"]["trace_cov"]["value"])
    assert found[0] > 0 and found[1] == pytest.approx(found[0], rel=1e-9)


def test_a_packed_policy_samples_and_is_saved_as_any_other(tokenizer: Any, tmp_path: Path) -> None:
    settings, samples = Sampling(samples=2, max_new_tokens=6), []
    policy = tiny(tokenizer)
    for packing_ in ("padded", "packed"):
        policy.pack(packing_)
        policy(policy.collate(ROWS))
        found = TransformersSampler(policy).sample([[5, 6], [7, 8, 9]], settings, seed=0)
        samples.append([[sample.ids for sample in some] for some in found])
    assert samples[0] == samples[1]
    policy.model.save_pretrained(tmp_path)
    assert "rlzoo" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    copied = policy.frozen_copy()
    assert copied.packs
    assert torch.equal(copied(copied.collate(ROWS)).logp, policy(policy.collate(ROWS)).logp)
    policy.add_lora(rank=2)
    assert policy.reference().packs
