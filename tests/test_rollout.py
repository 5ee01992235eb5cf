"""Sampling and scoring: seeds, ends, text, and the distribution that completions come from."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers.cache_utils import DynamicCache

from rlzoo.buffers.problems import Problem, encode_problems
from rlzoo.config import Sampling
from rlzoo.errors import UserError
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.policy import Policy, Sequences
from rlzoo.reward import Reward, get_reward
from rlzoo.rollout import (
    Sample,
    Sampler,
    TransformersSampler,
    collect_rollouts,
    cut_short,
    decoding,
    mismatch,
    sampler_of,
    static_decoding,
    unscored,
)
from rlzoo.types import Trajectory

MakePolicy = Callable[..., Policy]
PROMPTS = [[20, 21, 22], [23], [24, 25, 26, 27, 28], [29, 30]]
SHORT = Sampling(samples=3, max_new_tokens=6)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def policy(request: pytest.FixtureRequest, make_policy: MakePolicy) -> Policy:
    return make_policy(request.param, dtype=torch.float32)


def sampled_ids(policy: Policy, settings: Sampling, seed: int, greedy: bool = False) -> list[list[list[int]]]:
    found = TransformersSampler(policy).sample(PROMPTS, settings, seed, greedy=greedy)
    return [[sample.ids for sample in samples] for samples in found]


def next_logp(policy: Policy, prompt: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = policy.model(input_ids=torch.tensor([list(prompt)])).logits[0, -1]
    return logits.log_softmax(0)


def test_samples_are_many_seeded_and_leave_the_random_state_alone(policy: Policy) -> None:
    policy.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sampled_ids(policy, SHORT, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert policy.training
    assert [len(samples) for samples in first] == [3] * 4
    assert first == sampled_ids(policy, SHORT, seed=1)
    assert first != sampled_ids(policy, SHORT, seed=2)
    assert len({tuple(ids) for samples in first for ids in samples}) > 6
    policy.eval()
    assert first == sampled_ids(policy, SHORT, seed=1) and not policy.training


def test_greedy_is_the_likeliest_token_whatever_the_batch(policy: Policy) -> None:
    settings = Sampling(samples=5, max_new_tokens=6, batch_size=64)
    found = sampled_ids(policy, settings, seed=0, greedy=True)
    assert [len(samples) for samples in found] == [1] * 4
    assert found == sampled_ids(policy, settings.model_copy(update={"batch_size": 1}), seed=9, greedy=True)
    for prompt, (ids,) in zip(PROMPTS, found, strict=True):
        for t, token in enumerate(ids):
            assert token == int(next_logp(policy, [*prompt, *ids[:t]]).argmax())


def test_a_completion_ends_at_its_end_of_sequence_or_is_marked(make_policy: MakePolicy) -> None:
    policy = make_policy("gpt2", dtype=torch.float32)
    eos, other = policy.tokenizer.eos_token_id, 40
    policy.model.generation_config.eos_token_id = [eos, other]
    settings = Sampling(samples=40, max_new_tokens=8)
    samples = [s for row in TransformersSampler(policy).sample(PROMPTS, settings, 0) for s in row]
    ends = Counter(s.ids[-1] for s in samples if not s.truncated)
    assert set(ends) == {eos, other}
    for sample in samples:
        assert not {eos, other} & set(sample.ids[:-1])
        assert sample.truncated == (sample.ids[-1] not in (eos, other))
        assert not sample.truncated or len(sample.ids) == 8
    policy.model.generation_config.eos_token_id = [*range(40, 80)]
    draws = np.random.default_rng(0).random((40, 8))
    for static_shapes in (False, True):
        decoded = decoding.Decoder(policy, static_shapes).decode(PROMPTS, 10, settings, draws)
        assert len({len(ids) for ids in decoded}) > 4
        assert not any({eos, *range(40, 80)} & set(ids[:-1]) for ids in decoded)


def test_padding_with_the_end_of_sequence_loses_no_end(make_policy: MakePolicy) -> None:
    policy = make_policy("gpt2", dtype=torch.float32)
    settings = Sampling(samples=40, max_new_tokens=8)
    expected = sampled_ids(policy, settings, seed=0)
    kept = policy.tokenizer.pad_token
    try:
        policy.tokenizer.pad_token = policy.tokenizer.eos_token
        assert sampled_ids(policy, settings, seed=0) == expected
    finally:
        policy.tokenizer.pad_token = kept


def test_text_has_no_special_tokens(policy: Policy) -> None:
    sampler = TransformersSampler(policy)
    tokenizer = policy.tokenizer
    words = tokenizer.encode("#### 17")
    prompt = [20]
    with torch.no_grad():
        found = [s for row in sampler.sample([prompt], Sampling(samples=400, max_new_tokens=5), 0) for s in row]
    assert any(tokenizer.eos_token_id in s.ids for s in found)
    assert all("<" not in s.text for s in found)
    assert [s.text for s in found] == [tokenizer.decode(s.ids, skip_special_tokens=True) for s in found]
    assert tokenizer.decode([*words, tokenizer.eos_token_id], skip_special_tokens=True) == "#### 17"


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 0.9), (1.6, 0.7)])
def test_first_tokens_follow_the_models_distribution(policy: Policy, temperature: float, top_p: float) -> None:
    check_first_tokens(policy, 4000, temperature, top_p)


def check_first_tokens(policy: Policy, n: int, temperature: float, top_p: float) -> None:
    prompt = PROMPTS[0]
    settings = Sampling(samples=n, temperature=temperature, top_p=top_p, max_new_tokens=1, batch_size=n)
    # another prompt in the batch: padding on the left must not change the distribution
    samples = TransformersSampler(policy).sample([prompt, PROMPTS[2]], settings, seed=3)[0]
    p = (next_logp(policy, prompt) / temperature).softmax(0).double()
    if top_p < 1:  # of the likeliest tokens as many as reach top_p, in proportion
        ordered, order = p.sort(descending=True)
        p[order[1:][ordered.cumsum(0)[:-1] >= top_p]] = 0
        p /= p.sum()
    expected = n * p.numpy()
    counted = Counter(s.ids[0] for s in samples)
    assert all(expected[token] > 0 for token in counted)
    common = [token for token in range(len(expected)) if expected[token] >= 5]
    rest = n - sum(counted[t] for t in common), n - sum(expected[t] for t in common)
    observed = [*(counted[t] for t in common), rest[0]]
    assert len(common) >= 3
    kept = slice(None, None if rest[1] > 1e-6 else -1)  # top_p may leave no rare tokens
    assert chisquare(observed[kept], [*(expected[t] for t in common), rest[1]][kept]).pvalue > 1e-3


@pytest.mark.parametrize("top_p", [1.0, 0.99999])
def test_rare_tokens_of_a_large_vocabulary_can_all_be_drawn(top_p: float) -> None:
    """Each is less likely than the rounding of a float32 sum near 1, with which one in six is drawn and no other."""
    rare, count = 1e-8, 2000
    logits = torch.full((1, count + 1), rare).log()
    logits[0, 0] = math.log1p(-rare * count)
    within = count * rare - (1 - top_p)  # what the nucleus leaves of them
    draws = torch.linspace(1 - within, 1, count, dtype=torch.float64)
    drawn = decoding._pick(logits.expand(count, -1), draws, Sampling(top_p=top_p))
    assert len(set(drawn.tolist())) > 0.8 * within / rare


@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_a_checkpoints_own_generation_settings_are_put_aside(
    kind: str, make_policy: MakePolicy, request: pytest.FixtureRequest
) -> None:
    policy = make_policy("gpt2", dtype=torch.float32) if kind == "gpt2" else request.getfixturevalue("mamba")
    plain = sampled_ids(policy, SHORT, seed=1), sampled_ids(policy, SHORT, seed=1, greedy=True)
    kept = policy.model.generation_config
    try:
        odd = type(kept)(
            do_sample=True, top_k=1, min_p=0.5, temperature=0.1, repetition_penalty=9.0, num_beams=3, min_new_tokens=6,
            no_repeat_ngram_size=1, eos_token_id=kept.eos_token_id,
        )  # fmt: skip
        policy.model.generation_config = odd
        assert (sampled_ids(policy, SHORT, seed=1), sampled_ids(policy, SHORT, seed=1, greedy=True)) == plain
        assert policy.model.generation_config is odd
    finally:
        policy.model.generation_config = kept


def parrot(prompts: list[Any], completions: list[Any], answer: list[str], **_: Any) -> list[float | None]:
    """The length of the text; None for an empty one."""
    assert len(prompts) == len(completions) == len(answer)
    return [float(len(c)) if c else None for c in completions]


def problem(number: int, text: str) -> Problem:
    return Problem(f"p{number}", text, {"answer": str(number)})


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.5, 0.9)])
def test_behaviour_log_probs_are_those_at_the_temperature_of_the_sampling(
    policy: Policy, temperature: float, top_p: float
) -> None:
    """Without the nucleus: another policy has another one, and a token outside of it would have no ratio."""
    problems = encode_problems(policy.tokenizer, [problem(1, "17+25=?\n"), problem(2, "3-1=?\n")])
    settings = Sampling(samples=4, temperature=temperature, top_p=top_p, max_new_tokens=6)
    rows = collect_rollouts(
        policy, TransformersSampler(policy), problems, Reward("parrot", parrot), settings, seed=0, version=3
    )
    assert len(rows) == 8
    for row in rows:
        assert row.behaviour_logp is not None
        sequences = Sequences.collate([row.prompt_ids], [row.completion_ids], policy.device)
        found = policy(sequences, temperature=temperature).logp[0].tolist()
        assert row.behaviour_logp == pytest.approx(found, abs=1e-5)
        assert (row.temperature, row.top_p) == (temperature, top_p)
        for t, token in enumerate(row.completion_ids):
            p = (next_logp(policy, [*row.prompt_ids, *row.completion_ids[:t]]) / temperature).softmax(0)
            assert row.behaviour_logp[t] == pytest.approx(float(p[token].log()), abs=1e-3)
    assert {row.prompt_id for row in rows} == {"p1", "p2"}
    assert {(row.source, row.policy_version) for row in rows} == {("policy", 3)}
    assert all(row.columns == {"answer": row.prompt_id[1:]} for row in rows)
    assert all(row.reward == (len(row.completion) or None) for row in rows)


class FakeSampler(Sampler):
    """Answers every prompt with the numbers of its samples, of which the first have log-probs of their own."""

    scored = 0

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        seed: int,
        greedy: bool = False,
        progress: Callable[[int], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        own = [[-1.0] if n < self.scored else None for n in range(settings.samples)]
        return [[Sample([30 + n], str(n), truncated=True, logp=logp) for n, logp in enumerate(own)] for _ in prompts]


def test_an_engine_s_log_probs_stand_in_for_the_policy_s_where_it_gives_all(make_policy: MakePolicy) -> None:
    policy, sampler = make_policy("gpt2", dtype=torch.float32), FakeSampler()
    problems, reward = encode_problems(policy.tokenizer, [problem(1, "17+25=?\n")]), Reward("parrot", parrot)
    known = [[float(next_logp(policy, problems[0].ids)[30 + n])] for n in range(2)]

    def collected(scored: int, recompute: bool) -> list[tuple[list[float] | None, list[float] | None]]:
        sampler.scored = scored
        rows = collect_rollouts(policy, sampler, problems, reward, Sampling(samples=2), 0, recompute=recompute)
        return [(row.behaviour_logp, row.sampler_logp) for row in rows]

    assert collected(2, recompute=False) == [([-1.0], None)] * 2
    assert [theirs for _, theirs in collected(2, recompute=True)] == [[-1.0]] * 2
    for scored, recompute in ((2, True), (1, True), (1, False), (0, False)):
        for (ours, _), expected in zip(collected(scored, recompute), known, strict=True):
            assert ours == pytest.approx(expected, abs=1e-5)

    # an engine's log-probs are relative to the nucleus, and what is kept is relative to all tokens
    p = (next_logp(policy, problems[0].ids) / 0.7).softmax(0).sort(descending=True).values
    mass = float(p[p.cumsum(0) - p < 0.5].sum())
    settings, sampler.scored = Sampling(samples=2, temperature=0.7, top_p=0.5), 2
    rows = collect_rollouts(policy, sampler, problems, reward, settings, 0, recompute=True)
    assert [row.sampler_logp for row in rows] == [pytest.approx([-1.0 + math.log(mass)], abs=1e-5)] * 2
    ours = [float((next_logp(policy, problems[0].ids) / 0.7).log_softmax(0)[30 + n]) for n in range(2)]
    assert [row.behaviour_logp for row in rows] == [pytest.approx([one], abs=1e-5) for one in ours]


def test_the_components_of_a_reward_reach_the_rows(make_policy: MakePolicy) -> None:
    policy = make_policy("gpt2", dtype=torch.float32)
    reward = get_reward([{"name": "exact-match"}, {"name": "format", "weight": 0.5, "pattern": "[01]"}])
    problems = encode_problems(policy.tokenizer, [problem(1, "17+25=?\n")])
    zero, one = collect_rollouts(policy, FakeSampler(), problems, reward, Sampling(samples=2), seed=0)
    assert (zero.reward, one.reward) == (0.5, 1.5)
    assert [list(row.reward_components.values()) for row in (zero, one)] == [[0, 1], [1, 1]]


def test_a_mismatch_by_hand() -> None:
    """Gaps of log 2, 0 and -log 4: ratios 2, 1, 1/4; k3 = ratio - 1 - gap."""
    two = math.log(2)
    known: dict[str, Any] = {"source": "policy", "reward": 1.0}
    rows = [
        Trajectory("", "", [1], [2, 3], "a", behaviour_logp=[-1.0, -3.0], sampler_logp=[-1.0 - two, -3.0], **known),
        Trajectory("", "", [1], [2], "a", behaviour_logp=[-2.0], sampler_logp=[-2.0 + 2 * two], **known),
        Trajectory("", "", [1], [2], "a", behaviour_logp=[-2.0], **known),
    ]
    assert mismatch(rows) == pytest.approx(
        {"tokens": 3, "mean_absolute": two, "largest": 2 * two, "mean_ratio": 3.25 / 3, "kl": (0.25 + two) / 3}
    )
    assert mismatch(rows[2:]) is None


def test_what_is_told_of_samples_by_hand() -> None:
    rows = [Trajectory("", "", [1], [2], "a", source="policy", truncated=i == 1) for i in range(3)]
    assert cut_short(rows, 7) == ["1 of 3 samples were truncated at max_new_tokens (7)"]
    assert cut_short(rows[2:], 7) == [] and unscored([(0.0, "a")]) is None
    told = unscored([(0.0, "a"), (None, f"{'so ' * 99}what\nis 1+1?"), (None, "b")])
    assert told is not None and told.startswith("2 of 3 samples have no reward") and told.endswith("what is 1+1?'")
    assert len(told) < 300, "the end of a long prompt is its question"


def test_conversations_get_conversational_completions(make_policy: MakePolicy) -> None:
    policy = make_policy("gpt2", dtype=torch.float32)
    template = policy.tokenizer.chat_template
    seen: dict[str, Any] = {}

    def watch(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        seen.update(prompts=prompts, completions=completions, **columns)
        return [1.0] * len(prompts)

    chat = [{"role": "user", "content": "17"}]
    try:
        policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        problems = encode_problems(
            policy.tokenizer, [Problem("chat", chat, {"answer": "17"}), Problem("text", "25\n", {"other": 1})]
        )
        rows = collect_rollouts(policy, FakeSampler(), problems, Reward("watch", watch), Sampling(samples=2), seed=0)
    finally:
        policy.tokenizer.chat_template = template
    assert seen["prompts"] == [chat, chat, "25\n", "25\n"]
    answers = [[{"role": "assistant", "content": "0"}], [{"role": "assistant", "content": "1"}]]
    assert seen["completions"] == [*answers, "0", "1"]
    assert seen["answer"] == ["17", "17", None, None] and seen["other"] == [None, None, 1, 1]
    assert seen["completion_ids"] == [[30], [31], [30], [31]]
    assert [row.messages for row in rows] == [chat, chat, None, None]
    assert [row.prompt for row in rows] == ["17\n", "17\n", "25\n", "25\n"]
    assert all(row.truncated for row in rows)


@pytest.mark.parametrize("kind", ["grouped", "sliding", "scaled"])
def test_attention_heads_that_share_keys(kind: str, make_policy: MakePolicy) -> None:
    """Grouped query heads, a sliding window, a scale of its own: greedy tokens are those of a plain forward pass."""
    import transformers as hf

    tokenizer = make_policy("gpt2", dtype=torch.float32).tokenizer
    torch.manual_seed(0)
    common = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.3, "max_position_embeddings": 64,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    models: dict[str, Callable[[], Any]] = {
        "grouped": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**common)),
        "sliding": lambda: hf.MistralForCausalLM(hf.MistralConfig(**common, sliding_window=4)),
        "scaled": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**common, attention_multiplier=2.0)),
    }
    policy = Policy(models[kind]().eval(), tokenizer, kind)
    found = sampled_ids(policy, Sampling(max_new_tokens=9), seed=0, greedy=True)
    for prompt, (ids,) in zip(PROMPTS, found, strict=True):
        for t, token in enumerate(ids):
            assert token == int(next_logp(policy, [*prompt, *ids[:t]]).argmax())
    assert policy.model.config._attn_implementation == "rlzoo"


def test_samples_do_not_depend_on_the_batch(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a random stream of its own, also where one prompt's samples are more than a batch.

    Those that have ended leave, so that hardly any forward pass is for them.
    """
    monkeypatch.setattr(policy.model.generation_config, "eos_token_id", [*range(3, 60)])  # so that many end early
    settings, sizes = Sampling(samples=7, max_new_tokens=9, batch_size=64), list[int]()
    handle = policy.model.base_model.register_forward_pre_hook(
        lambda _, __, given: sizes.append(len(given["input_ids"])), with_kwargs=True
    )
    expected = sampled_ids(policy, settings, seed=4)
    handle.remove()
    unfinished = [sum(len(ids) > step for samples in expected for ids in samples) for step in range(len(sizes))]
    assert sizes[0] == len(PROMPTS) and 0 < sizes[-1] < 14
    assert all(size - rest < decoding.LEAVE * size for size, rest in zip(sizes[1:], unfinished[1:], strict=True))
    for size in (1, 3, 7, 15):
        done: list[int] = []
        some = settings.model_copy(update={"batch_size": size})
        found = TransformersSampler(policy).sample(PROMPTS, some, 4, progress=done.append)
        assert [[sample.ids for sample in samples] for samples in found] == expected
        assert sum(done) == len(PROMPTS) and len(done) > 1


def test_prompts_sampled_in_portions_are_sampled_as_they_would_be_together(policy: Policy, tmp_path: Path) -> None:
    """Numbers tell the random streams apart: the same ones again would give equal prompts equal samples."""
    settings, prompts = Sampling(samples=3, max_new_tokens=9, batch_size=6), [[20, 21]] * 5
    sampler = TransformersSampler(policy)
    whole = [[s.ids for s in samples] for samples in sampler.sample(prompts, settings, 4)]
    assert len({str(samples) for samples in whole}) == 5
    part = sampler.sample(prompts[:2], settings, 4, numbers=[3, 1])
    assert [[s.ids for s in samples] for samples in part] == [whole[3], whole[1]]
    texts = ["17+25=?\n", "3-1=?\n", "17+25=?\n", "3-1=?\n", "17+25=?\n"]  # those of like length share a portion
    problems = encode_problems(policy.tokenizer, [problem(number, text) for number, text in enumerate(texts)])
    reward = Reward("parrot", parrot)
    rows = [
        collect_rollouts(policy, sampler, problems, reward, settings, seed=4, cached=cached)
        for cached in (None, CachedResults(tmp_path))
    ]
    assert len(list(tmp_path.iterdir())) == 3  # two prompts of three samples are a batch
    assert [row.completion_ids for row in rows[0]] == [row.completion_ids for row in rows[1]]
    assert len({str([row.completion_ids for row in rows[0][i : i + 3]]) for i in range(0, 15, 3)}) == 5
    other = collect_rollouts(policy, sampler, problems, reward, settings, seed=5, cached=CachedResults(tmp_path))
    assert [row.completion_ids for row in other] != [row.completion_ids for row in rows[0]]


@pytest.fixture(scope="module")
def mamba(make_policy: MakePolicy) -> Policy:
    """A model whose state is more than keys and values: transformers' ``generate`` samples it."""
    from transformers import MambaConfig, MambaForCausalLM

    tokenizer = make_policy("gpt2").tokenizer
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.5)
        for name, parameter in model.named_parameters():
            if "proj" in name or "conv" in name:
                parameter.mul_(4)  # so that what was read matters
    return Policy(model.eval(), tokenizer, "mamba")


@pytest.mark.slow
def test_a_model_with_other_state_is_sampled_too(mamba: Policy) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = sampled_ids(mamba, SHORT, seed=1)
    assert torch.equal(torch.rand(3), expected), "the random state is left alone"
    assert first == sampled_ids(mamba, SHORT, seed=1) != sampled_ids(mamba, SHORT, seed=2)
    assert [len(samples) for samples in first] == [3] * 4
    for prompt, (ids,) in zip(PROMPTS, sampled_ids(mamba, SHORT, seed=0, greedy=True), strict=True):
        for t, token in enumerate(ids):
            assert token == int(next_logp(mamba, [*prompt, *ids[:t]]).argmax())
    twice = Sampling(samples=4, max_new_tokens=9, batch_size=2)
    one, other = (TransformersSampler(mamba).sample([[20, 21]], twice, 0, numbers=[i])[0] for i in (0, 1))
    assert len({tuple(sample.ids) for sample in (*one, *other)}) == 8, "each batch and prompt has draws of its own"
    check_first_tokens(mamba, 1000, 1.6, 0.7)


def test_a_model_may_call_its_cache_by_either_name(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer models of transformers call it ``cache``, and warn of its old name."""
    settings, trunk = Sampling(samples=2, max_new_tokens=6), policy.model.base_model
    known = inspect.signature(plain := trunk.forward).parameters
    old, new = "past_key_values", "cache"
    expected = TransformersSampler(policy).sample([[20, 21]], settings, 0)
    for name in (old, new):

        def forward(*, position_ids: Any, name: str = name, **given: Any) -> Any:
            cache = given.pop(name)
            return plain(position_ids=position_ids, **given, **{new if new in known else old: cache})

        parameters = [inspect.Parameter(one, inspect.Parameter.KEYWORD_ONLY) for one in ("position_ids", name)]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        monkeypatch.setattr(trunk, "forward", forward)
        assert TransformersSampler(policy).sample([[20, 21]], settings, 0) == expected


@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_sampling_keeps_no_graph_and_leaves_the_policy_as_it_was_also_when_it_fails(
    kind: str, make_policy: MakePolicy, request: pytest.FixtureRequest
) -> None:
    policy = make_policy("gpt2", dtype=torch.float32) if kind == "gpt2" else request.getfixturevalue("mamba")
    calls: list[bool] = []

    def fail(module: Any, inputs: Any, output: Any) -> None:
        calls.append(output[0].requires_grad or policy.training)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    generation, attention = policy.model.generation_config, policy.model.config._attn_implementation
    policy.train()
    handle = policy.model.base_model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        TransformersSampler(policy).sample(PROMPTS, Sampling(max_new_tokens=6), seed=0)
    handle.remove()
    assert calls == [False] * 3 and policy.training
    assert policy.model.generation_config is generation and policy.model.config._attn_implementation == attention
    policy.eval()


LONG = Sampling(samples=8, max_new_tokens=40)


@pytest.mark.parametrize("room", [256, 8])
@pytest.mark.parametrize("greedy", [False, True])
def test_static_shapes_give_the_same_tokens(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, greedy: bool, room: int
) -> None:
    """Sequences end at different tokens, leave, and outgrow their room."""
    monkeypatch.setattr(static_decoding, "ROOM", room)
    monkeypatch.setattr(static_decoding, "BLOCK", 4)
    monkeypatch.setattr(static_decoding, "LEAVE", 0.1)
    lengths = set[int]()
    for kind in ("gpt2", "llama"):
        policy = make_policy(kind)
        policy.model.generation_config.eos_token_id = [40, 41, 42, 43]
        expected = TransformersSampler(policy).sample(PROMPTS, LONG, 7, greedy=greedy)
        found = TransformersSampler(policy, static_shapes=True).sample(PROMPTS, LONG, 7, greedy=greedy)
        assert found == expected
        lengths |= {len(sample.ids) for samples in expected for sample in samples}
    assert max(lengths) > 30 and len(lengths) > (1 if greedy else 6)


def static_batch(rows: int, tokens: int, next_logits: Any) -> static_decoding.StaticBatch:
    """Prompts of 20 tokens, after which row i begins with token i + 1; token 9 ends."""
    cache, past = DynamicCache(), torch.zeros(rows, 1, 20, 2)
    cache.update(past, past, 0)
    first, mask = torch.eye(10)[1 : rows + 1], torch.ones(rows, 20, dtype=torch.bool)
    return static_decoding.StaticBatch(
        cache, mask, first, None, tokens, torch.tensor([9]), next_logits, lambda logits, uniform: logits.argmax(1)
    )


def test_room_grows_by_half_and_to_no_more_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms, captured_at = list[int](), list[int]()

    def next_logits(token: Any, mask: torch.Tensor, position: torch.Tensor, cache: Any) -> torch.Tensor:
        assert int(mask.sum()) == int(position) + 1 == 21 + len(rooms)
        rooms.append(mask.shape[3])
        return torch.eye(10)[[1]]

    def captured(step: Any, device: torch.device) -> Callable[[], None]:
        captured_at.append(step.__self__.past)
        step()
        return step  # type: ignore[no-any-return]

    monkeypatch.setattr(static_decoding, "ROOM", 8)
    monkeypatch.setattr(static_decoding, "BLOCK", 4)
    monkeypatch.setattr(static_decoding, "captured", captured)
    batch = static_batch(1, 22, next_logits)
    static_decoding.run(batch, graphs=True)
    # 20 + 20/2, then 32 + 32/2 but at most 20 + 22, each rounded up to a multiple of 4
    assert rooms == [32] * 12 + [44] * 9 and batch.completions() == [[1] * 22]
    assert captured_at == [20], "the 9 tokens in the second buffer are not worth a graph"


def test_finished_sequences_leave_when_they_are_half() -> None:
    sizes: list[int] = []

    def run(*stops: int) -> list[list[int]]:
        def next_logits(token: torch.Tensor, mask: Any, position: torch.Tensor, cache: Any) -> torch.Tensor:
            sizes.append(len(token))
            own = zip(token[:, 0].tolist(), position[:, 0].tolist(), strict=True)
            return torch.eye(10)[[9 if row == 9 or place - 18 >= stops[row - 1] else row for row, place in own]]

        sizes.clear()
        batch = static_batch(4, 50, next_logits)
        static_decoding.run(batch, graphs=False)
        return batch.completions()

    # looked at after 16 tokens, when one of four has ended, and after 32, when two have
    assert run(5, 22, 99, 99) == [[1] * 4 + [9], [2] * 21 + [9], [3] * 50, [4] * 50]
    assert sizes == [4] * 31 + [2] * 18
    assert run(5, 5, 6, 2) == [[1] * 4 + [9], [2] * 4 + [9], [3] * 5 + [9], [4, 9]]
    assert sizes == [4] * 15, "nothing is left to decode"


def test_a_replayed_step_finds_everything_where_it_was(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph reads and writes the addresses that it was made with; a replay here checks them, and runs the step.

    It is made anew when sequences leave and when they need more room.
    """
    policy = make_policy("llama")
    policy.model.generation_config.eos_token_id = list(range(40, 44))
    made: list[int] = []
    replays = 0

    def addresses(batch: static_decoding.StaticBatch) -> list[int]:
        layers = [buffer for layer in batch.cache.layers for buffer in (layer.keys, layer.values, layer.at)]
        own = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        return [tensor.data_ptr() for tensor in (*own, *layers)]

    def captured(step: Any, device: torch.device) -> Callable[[], None]:
        step()
        batch, made_of = step.__self__, addresses(step.__self__)
        made.append(len(batch.token))

        def replay() -> None:
            nonlocal replays
            replays += 1
            assert addresses(batch) == made_of
            step()
            assert addresses(batch) == made_of

        return replay

    monkeypatch.setattr(static_decoding, "captured", captured)
    monkeypatch.setattr(static_decoding, "ROOM", 24)
    monkeypatch.setattr(static_decoding, "BLOCK", 8)
    monkeypatch.setattr(decoding, "pins", lambda device: True)
    settings = Sampling(samples=6, max_new_tokens=58)
    expected = TransformersSampler(policy).sample(PROMPTS, settings, 7)
    assert TransformersSampler(policy, static_shapes=True).sample(PROMPTS, settings, 7) == expected
    assert len(made) >= 3 and made[0] == 24 > made[-1], "one per shape"
    assert replays > 20


def test_a_model_that_allows_no_graph_is_sampled_without(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def refuses(step: Any, device: torch.device) -> None:
        step()
        tried.append(1)

    monkeypatch.setattr(static_decoding, "captured", refuses)
    monkeypatch.setattr(decoding, "pins", lambda device: True)
    policy = make_policy("llama")
    sampler = TransformersSampler(policy, static_shapes=True)
    expected = TransformersSampler(policy).sample(PROMPTS, LONG, 7)
    for _ in range(2):
        assert sampler.sample(PROMPTS, LONG, 7) == expected
    assert tried == [1]


def test_what_keeps_a_step_from_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is taken; then code that asks for a number is told of, and memory that runs out is an error."""
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: SimpleNamespace(wait_stream=lambda other: None))
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    steps: list[int] = []

    def step() -> None:
        steps.append(1)
        if len(steps) % 2 == 0:
            raise wrong

    wrong = RuntimeError("operation not permitted when stream is capturing\nmore")
    with pytest.warns(UserWarning, match=r"sampling without CUDA graphs, .*: operation not permitted .* capturing$"):
        assert static_decoding.captured(step, torch.device("cuda")) is None
    wrong = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        static_decoding.captured(step, torch.device("cuda"))
    assert len(steps) == 4


def test_a_model_that_static_shapes_do_not_suit(make_policy: MakePolicy, tokenizer: Any) -> None:
    """One without position ids, one that forgets keys, and one that reads something out of its mask."""
    from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

    size = {"vocab_size": len(tokenizer), "hidden_size": 16, "n_layer": 1, "n_head": 2}
    bloom = Policy(BloomForCausalLM(BloomConfig(**size)).eval(), tokenizer)
    size = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 4}
    mistral = Policy(MistralForCausalLM(MistralConfig(**size, **heads)).eval(), tokenizer)
    llama = make_policy("llama")
    forward = llama.model.base_model.forward

    def by_mask(attention_mask: torch.Tensor, **options: Any) -> Any:
        found = forward(attention_mask=attention_mask, **options)
        found.last_hidden_state = found.last_hidden_state * attention_mask.flatten(1).sum(1)[:, None, None]
        return found

    by_mask.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    llama.model.base_model.forward = by_mask
    assert TransformersSampler(llama, static_shapes=True).sample(PROMPTS, SHORT, 0)  # the sum is the same
    llama.model.base_model.forward = lambda *, position_ids, attention_mask, **options: by_mask(
        attention_mask=attention_mask, position_ids=position_ids + attention_mask.shape[-1], **options
    )
    for policy in (bloom, mistral, llama):
        with pytest.raises(UserError, match="static_shapes: they change this model's logits"):
            TransformersSampler(policy, static_shapes=True).sample(PROMPTS, SHORT, 0)


def test_engine_options_reach_the_sampler(make_policy: MakePolicy) -> None:
    settings = Sampling(engine="transformers", engine_options={"static_shapes": True})
    found = sampler_of(make_policy(), settings)
    assert isinstance(found, TransformersSampler) and found.decoder is not None and found.decoder.static_shapes
