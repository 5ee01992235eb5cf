"""The policy against plain transformers: log-probs, statistics, the chunked head, the critic, batching."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    RecurrentGemmaConfig,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from rlzoo.errors import UserError
from rlzoo.inputs import Critic, Statistic
from rlzoo.policy import Policy, Sequences, load_policy
from rlzoo.policy import head as head_module
from rlzoo.policy.attention import attention
from rlzoo.policy.head import Head
from rlzoo.policy.loading import REMOTE_CODE, save_policy, trusts_remote_code
from rlzoo.policy.microbatches import log_probs, token_batches

VOCABULARY, HIDDEN = 97, 32
PROMPTS = [[5, 9, 3], [7], [2, 2, 8, 11, 4, 6], [1, 13], [20, 21]]
COMPLETIONS = [[4, 8], [3, 9, 10, 12, 1], [6], [], [30, 31, 32]]
ROWS = list(zip(PROMPTS, COMPLETIONS, strict=True))
CPU = torch.device("cpu")
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(
        **SMALL, head_dim=8, query_pre_attn_scalar=8, sliding_window=3, final_logit_softcapping=2.0
    ),
    "cohere": lambda: CohereConfig(**SMALL, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**SMALL, logits_scaling=4.0),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(
        **SMALL, logits_soft_cap=2.0, block_types=["recurrent", "attention"]
    ),
}
every_model = pytest.mark.parametrize("kind", CONFIGS)


def build(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Policy:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]()).to(dtype).eval()
    return Policy(model, SimpleNamespace(eos_token_id=1, pad_token_id=0), kind)


STATISTICS = [Statistic(name) for name in ("entropy", "top_entropy", "square_mass")]


def collate(rows: list[tuple[list[int], list[int]]]) -> Sequences:
    return Sequences.collate([p for p, _ in rows], [c for _, c in rows], CPU)


def plain_logits(policy: Policy, prompt: list[int], completion: list[int]) -> Tensor:
    """Logits before each completion token, from the whole model on one unpadded row."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logits: Tensor = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : len(prompt) + len(completion) - 1]
    return logits


def plain_logp(policy: Policy, prompt: list[int], completion: list[int], temperature: float = 1.0) -> Tensor:
    logits = plain_logits(policy, prompt, completion) / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion, dtype=torch.long)[:, None])[:, 0]


@every_model
def test_a_single_row_has_the_models_own_log_probs(kind: str) -> None:
    policy = build(kind)
    for prompt, completion in ROWS:
        logp = policy(collate([(prompt, completion)])).logp
        assert logp.shape == (1, len(completion))
        torch.testing.assert_close(logp[0].detach(), plain_logp(policy, prompt, completion), rtol=0, atol=1e-12)


@every_model
def test_log_probs_depend_neither_on_padding_nor_on_the_other_rows(kind: str) -> None:
    policy = build(kind)
    atol = 1e-12 if kind == "gpt2" else 2e-6  # the others' norms compute in float32 even in a float64 model
    for order in ([0, 1, 2, 3, 4], [4, 1], [3, 2, 0]):
        logp = policy(collate([ROWS[i] for i in order])).logp.detach()
        for place, row in enumerate(order):
            size = len(COMPLETIONS[row])
            torch.testing.assert_close(logp[place, :size], plain_logp(policy, *ROWS[row]), rtol=0, atol=atol)
            assert not logp[place, size:].any()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_log_probs_keep_the_order_and_the_training_mode(kind: str) -> None:
    """Scores are those without dropout, which GPT-2 has, whatever mode the policy is in."""
    expected = build(kind)
    policy = build(kind).train()
    sizes: list[int] = []
    policy.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].ids.numel()))
    heats, done = [0.5, 1.0, 2.0, 1.0, 0.7], list[int]()
    for budget in (1, 9, 1000):
        sizes.clear()
        scores = log_probs(policy, ROWS, token_budget=budget, progress=done.append)
        tempered = log_probs(policy, ROWS, budget, heats)
        for found, hot, heat, row in zip(scores, tempered, heats, ROWS, strict=True):
            assert found == pytest.approx(plain_logp(expected, *row).tolist(), abs=2e-6)
            assert hot == pytest.approx(plain_logp(expected, *row, heat).tolist(), abs=2e-6)
        assert max(sizes) <= max(budget, max(len(prompt) + len(completion) for prompt, completion in ROWS))
    assert sum(done) == 3 * len(ROWS)
    assert policy.training and policy.model.training
    assert log_probs(policy, []) == []


def test_positions_and_targets_of_a_collated_batch() -> None:
    sequences = collate([([5, 9, 3], [4, 8]), ([7], [3, 9, 10])])
    assert sequences.ids.tolist() == [[5, 9, 3, 4, 8], [7, 3, 9, 10, 0]]
    assert sequences.predicts.int().tolist() == [[0, 0, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert sequences.mask.int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert sequences.targets.tolist() == [4, 8, 3, 9, 10]
    assert sequences.spread(torch.arange(1.0, 6.0)).tolist() == [[1, 2, 0], [3, 4, 5]]
    assert sum(sequences.lengths) == 9


def kl(policy_logits: Tensor, reference_logits: Tensor | None, target: Tensor) -> Tensor:
    assert reference_logits is not None and not reference_logits.requires_grad
    assert len(target) == len(policy_logits)
    reference = reference_logits.log_softmax(1)
    return (reference.exp() * (reference - policy_logits.log_softmax(1))).sum(1)


def scored_with_gradients(policy: Policy, reference: Policy) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    policy.zero_grad(set_to_none=True)
    scores = policy(collate(ROWS), statistics=STATISTICS, term=kl, reference=reference)
    weight = torch.linspace(-1, 2, scores.logp.numel(), dtype=scores.logp.dtype).view_as(scores.logp)
    (scores.logp * weight).sum().add(scores.term.sum()).backward()
    values = {"logp": scores.logp, "term": scores.term, **scores.inputs}
    gradients = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return {n: v.detach() for n, v in values.items()}, gradients


def test_a_soft_cap_of_attention_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' call of a kernel drops Gemma 2's, and says nothing."""
    monkeypatch.setitem(
        CONFIGS,
        "capped",
        lambda: Gemma2Config(
            **SMALL, head_dim=8, query_pre_attn_scalar=1, sliding_window=3, attn_logit_softcapping=0.5
        ),
    )
    own, eager = build("capped"), build("capped")
    eager.model.set_attn_implementation("eager")
    weight = torch.linspace(-1, 2, 20, dtype=torch.float64).view(5, 4)
    for policy in (own, eager):
        (policy(collate(ROWS)).logp[:, :4] * weight).sum().backward()
    torch.testing.assert_close(own(collate(ROWS)).logp, eager(collate(ROWS)).logp, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(own.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-4)  # eager's softmax is in float32
    ids = torch.tensor([[5, 9, 3, 4, 8, 6]])
    greedy = [p.model.generate(ids, do_sample=False, max_new_tokens=6, eos_token_id=None) for p in (own, eager)]
    assert torch.equal(*greedy), "with keys and values of before"

    (q, k, v), seen = torch.randn(3, 1, 2, 4, 8), torch.ones(4, 4, dtype=torch.bool).tril()
    added = torch.zeros(4, 4).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(*(attention(None, q, k, v, mask, softcap=0.5)[0] for mask in (seen, added)))
    assert not attention(None, q, k, v, seen, softcap=0.5, dropout=1.0)[0].any()


def test_a_model_that_asks_for_the_name_of_its_attention_keeps_it() -> None:
    """Its code would take another branch."""
    config = pytest.importorskip("transformers.models.deepseek_v32").DeepseekV32Config(num_hidden_layers=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    assert Policy(model, SimpleNamespace(eos_token_id=1)).model.config._attn_implementation == "sdpa"
    assert build("llama").model.config._attn_implementation == "rlzoo"


def test_query_heads_that_share_keys_may_have_masks_of_their_own() -> None:
    """One new position after two."""
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    added = torch.randn(2, 4, 1, 3)
    module: Any = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    for mask in (added, added[:, :1]):
        found = attention(module, query, key, value, mask)[0]
        weights = (query @ key.repeat_interleave(2, 1).mT / 8**0.5 + mask).softmax(-1)
        torch.testing.assert_close(found, (weights @ value.repeat_interleave(2, 1)).transpose(1, 2))


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "granite"])
def test_a_chunked_head_changes_neither_values_nor_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = build(kind), build(kind, seed=1).frozen_copy()
    values, gradients = scored_with_gradients(policy, reference)
    for rows in (1, 3, 10):
        monkeypatch.setattr(head_module, "CHUNK_ENTRIES", rows * VOCABULARY)
        chunked_values, chunked_gradients = scored_with_gradients(policy, reference)
        torch.testing.assert_close(chunked_values, values, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(chunked_gradients, gradients, rtol=1e-6, atol=1e-8)
    assert all(p.grad is None for p in reference.parameters())


class _RowsOfLogits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How many rows the tensors of vocabulary width have that are made while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor) and x.ndim > 1 and x.shape[-1] == VOCABULARY:
                self.found.add(x.numel() // VOCABULARY)
        return out


def test_no_more_logits_exist_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build("gpt2")
    monkeypatch.setattr(head_module, "CHUNK_ENTRIES", 3 * VOCABULARY)
    with _RowsOfLogits() as seen:
        policy(collate(ROWS), statistics=STATISTICS).logp.sum().backward()
    assert 3 in seen.found
    assert max(seen.found - {HIDDEN}) <= 3  # the transposed weight has HIDDEN rows


@pytest.mark.slow
def test_logits_of_a_chunk_are_gone_when_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made again in the backward pass: until then the graph holds none."""
    policy, sequences = build("gpt2"), collate(ROWS)

    def alive() -> int:
        gc.collect()
        tensors = [x for x in gc.get_objects() if isinstance(x, Tensor)]
        return sum(x.ndim == 2 and x.shape[1] == VOCABULARY for x in tensors)

    before = alive()
    monkeypatch.setattr(head_module, "CHUNK_ENTRIES", 3 * VOCABULARY)
    logp = policy(sequences).logp
    assert alive() == before
    logp.sum().backward()
    assert alive() == before


def test_a_second_backward_pass_is_refused_and_not_wrong() -> None:
    logp = build("gpt2")(collate(ROWS)).logp
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


def test_statistics_against_their_definitions() -> None:
    policy = build("gpt2")
    scores = policy(collate(ROWS), statistics=STATISTICS)
    assert not any(value.requires_grad for value in scores.inputs.values())
    for place, row in enumerate(ROWS):
        for t, logits in enumerate(plain_logits(policy, *row)):
            p = logits.softmax(0)
            top = p.sort(descending=True).values[:20]
            top = top / top.sum()
            expected = {
                "entropy": -(p * p.log()).sum(),
                "top_entropy": -(top * top.log()).sum(),
                "square_mass": (p * p).sum(),
            }
            for name, value in expected.items():
                assert float(scores.inputs[name][place, t]) == pytest.approx(float(value), abs=1e-10)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 0.6), (1.6, 0.8), (0.5, 0.95)])
def test_tempered_and_truncated_log_probs_are_those_of_transformers_warpers(temperature: float, top_p: float) -> None:
    policy = build("gpt2")
    logp = policy(collate(ROWS), temperature=temperature, top_p=top_p).logp.detach()
    inside = 0
    for place, row in enumerate(ROWS):
        logits = plain_logits(policy, *row)
        warped = TemperatureLogitsWarper(temperature)(None, logits) if temperature != 1 else logits
        if top_p < 1:
            warped = TopPLogitsWarper(top_p)(None, warped)
        for t, target in enumerate(row[1]):
            if torch.isfinite(warped[t, target]):
                inside += 1
                assert float(logp[place, t]) == pytest.approx(float(warped[t].log_softmax(0)[target]), abs=1e-10)
        # the likeliest token is always inside
        best = logits.argmax(1).tolist()
        for t, token in enumerate(best):
            prefix = row[0] + row[1][:t]
            found = policy(collate([(prefix, [token])]), temperature=temperature, top_p=top_p).logp[0, 0].detach()
            assert float(found) == pytest.approx(float(warped[t].log_softmax(0)[token]), abs=1e-10)
            inside += 1
    assert inside > 10


def test_a_temperature_takes_the_place_of_the_rows_own() -> None:
    policy = build("gpt2")
    prompts, completions = zip(*ROWS, strict=True)
    hot = Sequences.collate(prompts, completions, CPU, [0.5, 1.0, 2.0, 1.0, 1.0])
    plain = policy(collate(ROWS)).logp
    assert torch.equal(policy(hot, temperature=1.0).logp, plain) and not torch.equal(policy(hot).logp, plain)
    assert torch.equal(policy(hot, temperature=2.0).logp, policy(collate(ROWS), temperature=2.0).logp)


def test_logits_in_the_thousands_overflow_nowhere() -> None:
    policy = build("llama", dtype=torch.float32)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(1000)
    expected = plain_logp(policy, *ROWS[0])
    assert plain_logits(policy, *ROWS[0]).max() > 1000
    torch.testing.assert_close(policy(collate(ROWS[:1])).logp[0].detach(), expected)


def test_a_bfloat16_model_gets_its_softmax_in_float32() -> None:
    policy = build("llama", dtype=torch.bfloat16)
    policy.attach([Critic(shared=True)])
    sequences = collate(ROWS)
    scores = policy(sequences, statistics=STATISTICS)
    assert scores.logp.dtype == torch.float32
    assert {s.dtype for s in scores.inputs.values()} == {torch.float32} and "value" in scores.inputs
    hidden = policy.model.base_model(input_ids=sequences.ids, use_cache=False).last_hidden_state[sequences.predicts]
    rounded = policy.model.lm_head(hidden).double()
    exact = rounded.log_softmax(1).gather(1, sequences.targets[:, None])[:, 0]
    torch.testing.assert_close(scores.logp[sequences.mask].double(), exact, rtol=0, atol=1e-5)


def test_an_autocast_around_a_policy_holds_inside_it() -> None:
    plain = build("llama", dtype=torch.float32)
    mixed = Policy(plain.model, plain.tokenizer, compute=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = plain(collate(ROWS)).logp
    assert torch.equal(found, mixed(collate(ROWS)).logp) and not torch.equal(found, plain(collate(ROWS)).logp)


def test_a_logit_term_sees_both_policies_and_sends_its_gradient_to_one() -> None:
    policy, reference = build("gpt2"), build("gpt2", seed=1)
    graphs: list[bool] = []
    reference.model.base_model.register_forward_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
    scores = policy(collate(ROWS), term=kl, reference=reference)
    assert graphs == [False] and not scores.inputs
    for place, row in enumerate(ROWS):
        mine, theirs = plain_logits(policy, *row), plain_logits(reference, *row)
        expected = kl(mine, theirs, torch.tensor(row[1]))
        torch.testing.assert_close(scores.term[place, : len(row[1])].detach(), expected, rtol=0, atol=1e-10)
    scores.term.sum().backward()
    assert policy.model.lm_head.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in reference.parameters())
    assert policy(collate(ROWS), term=lambda *_: None).term.any().item() is False


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_critic_starts_at_zero_and_trains_the_trunk_only_if_shared(kind: str, shared: bool) -> None:
    policy = build(kind)
    policy.attach([Critic(shared)])
    scores = policy(collate(ROWS))
    assert not scores.inputs["value"].any()
    module: Any = policy.modules_of_inputs["value"]
    torch.nn.init.normal_(module.head.weight)
    value = policy(collate(ROWS)).inputs["value"]
    hidden = policy.model.base_model(input_ids=torch.tensor([PROMPTS[0] + COMPLETIONS[0]])).last_hidden_state[0, 2:4]
    expected = module.head(hidden)[:, 0]
    torch.testing.assert_close(value[0, :2], expected, rtol=0, atol=1e-5)
    policy.zero_grad(set_to_none=True)
    value.sum().backward()
    trunk = [p.grad for p in policy.model.parameters() if p.grad is not None and p.grad.any()]
    assert bool(trunk) == shared
    assert module.head.weight.grad is not None
    if not shared:
        assert any(p.grad is not None and p.grad.any() for p in module.trunk.parameters())


def test_an_input_has_one_module_for_as_long_as_it_is_attached() -> None:
    policy = build("llama")
    with policy.attached_for([Critic(shared=True)]), policy.attached_for([Critic(shared=True)]):
        assert set(policy(collate(ROWS)).inputs) == {"value"}
        with pytest.raises(UserError, match=r"two inputs have the key 'value', .*: use one of them per run"):
            policy.attach([Critic()])
    assert not policy(collate(ROWS)).inputs and not [*policy.modules_of_inputs.parameters()]


def test_a_policy_is_in_the_mode_of_its_model() -> None:
    policy = build("gpt2")
    expected = policy(collate(ROWS)).logp
    log_probs(policy, ROWS)  # restores the mode, and so must not switch dropout on
    assert torch.equal(policy(collate(ROWS)).logp, expected)


def test_a_frozen_copy_stands_still() -> None:
    policy = build("gpt2").train()
    policy.attach([Critic(shared=True)])
    frozen = policy.frozen_copy()
    before = frozen(collate(ROWS)).logp
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.attached
    assert frozen.model.lm_head.weight is frozen.model.transformer.wte.weight
    assert torch.equal(frozen(collate(ROWS)).logp, before)
    assert policy.training


def test_every_end_of_sequence_is_known() -> None:
    policy = build("llama")
    policy.model.generation_config.eos_token_id = [5, 7]
    assert policy.eos_ids == {1, 5, 7}
    policy.model.generation_config.eos_token_id = 9
    assert policy.eos_ids == {1, 9}
    policy.model.generation_config.eos_token_id = None
    assert policy.eos_ids == {1}


def test_rows_of_like_length_share_a_micro_batch() -> None:
    batches = list(token_batches([[i] for i in range(6)], [9, 1, 9, 2, 9, 1], token_budget=18))
    assert batches == [[1, 5, 3], [0, 2], [4]]
    # a unit is as long as its longest row, not as all of its rows: the three together would take 30
    assert list(token_batches([(0,), (1, 2)], [10, 6, 6], token_budget=20)) == [[1, 2], [0]]
    # without padding, a unit takes the tokens of all of its rows, and each micro-batch begins at 0
    assert list(token_batches([(0, 1), (2,), (3,)], [5, 5, 5, 6], token_budget=12, packed=True)) == [[0, 1], [2, 3]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), max_size=15),
    st.integers(1, 120),
)
def test_micro_batches_partition_the_rows_and_keep_units_whole(lengths_by_unit: list[list[int]], budget: int) -> None:
    lengths = [length for unit in lengths_by_unit for length in unit]
    rows = iter(range(len(lengths)))
    units = [tuple(next(rows) for _ in unit) for unit in lengths_by_unit]
    batches = list(token_batches(units, lengths, budget))
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        inside = [unit for unit in units if unit[0] in batch]
        assert sorted(row for unit in inside for row in unit) == sorted(batch)
        padded = max(lengths[row] for row in batch) * len(batch)
        assert padded <= budget or len(inside) == 1
    assert batches == list(token_batches(units, lengths, budget))


def test_flops_by_hand() -> None:
    # A layer: q, o 32·32 each, k, v 32·16 each, three 32·48 of the MLP, two norms of 32: 7744. Two layers and the
    # last norm: 15520. The head: 97·32 = 3104.
    policy = build("llama")
    assert policy.flops(10, 4) == 2 * (15520 * 10 + 3104 * 4)
    policy.attach([Critic(shared=True)])
    assert policy.flops(10, 4) == 2 * (15520 * 10 + 3104 * 4)
    policy = build("llama")
    policy.attach([Critic()])
    assert policy.flops(10, 4) == 2 * (2 * 15520 * 10 + 3104 * 4)
    # GPT-2, tied: per layer 4·32² + 8·32² weights, 9·32 + 4·32 biases and norms; positions 1024·32; last norm 64.
    assert build("gpt2").flops(1, 0) == 2 * (2 * (12 * 32**2 + 13 * 32) + 1024 * 32 + 64)


def test_a_model_that_makes_logits_in_an_unknown_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward: Callable[..., Any] = LlamaForCausalLM.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(UserError, match="'llama' computes its logits"):
        load_policy("embedded")


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    for folder, told in ((tmp_path, "has no config.json"), (tmp_path / "nowhere", "does not exist")):
        with pytest.raises(UserError, match=f"cannot be loaded: that folder {told}"):
            load_policy(str(folder))
    with pytest.raises(UserError, match="model 'no/such-model' cannot be loaded") as caught:
        load_policy("no/such-model")
    assert "\n" not in str(caught.value)


def test_a_folder_that_lacks_something_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy("embedded")
    save_policy(policy, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    most = {name: weight for name, weight in weights.items() if name != "model.norm.weight"}
    save_file(most, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"has no weights for model\.norm\.weight \(1 in all\): is its folder complete\?"
    ):
        load_policy(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")  # a pickle, which could run anything
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(str(tmp_path))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    policy.tokenizer.pad_token = None
    policy.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setenv(REMOTE_CODE, "0")
    assert not trusts_remote_code()
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    tokenizer = load_policy(f"~/{tmp_path.name}").tokenizer  # padding can be done without
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    policy.tokenizer.eos_token = None
    policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokenizer has no end-of-sequence token"):
        load_policy(str(tmp_path))


def test_logits_are_scaled_and_then_capped() -> None:
    head = Head(torch.nn.Linear(1, 1), scale=3.0, soft_cap=2.0)
    # 2 tanh(3·1/2) and 2 tanh(3·(-0.5)/2); the cap first would give 3·2 tanh(1/2) = 2.77
    found = head.finish(torch.tensor([[1.0, -0.5]], dtype=torch.float64))[0].tolist()
    assert found == pytest.approx([1.8102965077, -1.2702979047], abs=1e-9)
    for half in (torch.float16, torch.bfloat16):
        assert head.finish(torch.zeros(1, 1, dtype=half)).dtype == torch.float32


def test_the_head_finds_scales_and_caps() -> None:
    assert Head.of(build("cohere").model).scale == 0.3
    assert Head.of(build("granite").model).scale == 0.25
    assert Head.of(build("gemma2").model).soft_cap == 2.0
    assert Head.of(build("recurrent_gemma").model).soft_cap == 2.0
    other = build("granite").model
    other.config.model_type = "hyperclovax"  # multiplies by what Granite divides by
    assert Head.of(other).scale == 4.0
    plain = build("llama").model
    plain.config.lm_head_multiplier, plain.config.output_multiplier = 0.5, 3.0
    assert Head.of(plain).scale == 1.5
    sees: Any = SimpleNamespace(get_output_embeddings=lambda: None)
    sees.config = Gemma3Config(text_config={"final_logit_softcapping": 3.0})  # of a model that takes images too
    assert Head.of(sees).soft_cap == 3.0


def test_chunks_of_a_gpu_follow_its_memory_in_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda:0")
    sizes = {0: 384, 24 * 2**30: 640, 80 * 2**30: 2176}
    for memory, rows in sizes.items():
        monkeypatch.setattr(head_module, "total_memory", lambda device, memory=memory: memory)
        assert head_module.chunk_rows(151_936, gpu) == rows
        assert rows * 151_936 * 4 <= max(memory / 64, 2**28)
        assert head_module.chunk_rows(151_936, CPU) == 2**26 // 151_936, "a CPU's digits do not change"
    assert head_module.chunk_rows(2**30, gpu) == 1
