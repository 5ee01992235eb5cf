"""Token ids without an embedding, and more tokens than positions: one line before any work, at every entry point."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fake_vllm import install
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from rlzoo import OfflineBuffer, analyze_variance, evaluate, get_objective, train
from rlzoo.buffers import from_trl
from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.problems import Problem, encode_problems
from rlzoo.cli import main
from rlzoo.comparison import one_stage, shared_buffer
from rlzoo.config import EvaluationSettings, Experiment, Sampling, Training, load_experiment
from rlzoo.errors import UserError
from rlzoo.inputs.references import mismatched
from rlzoo.policy import Policy
from rlzoo.policy.loading import load_policy, save_policy
from rlzoo.reward import Reward
from rlzoo.rollout import Sampler, TransformersSampler, VLLMSampler, collect_rollouts
from rlzoo.rollout.rollouts import within_limits
from rlzoo.types import Trajectory
from rlzoo.variance import run as variance
from rlzoo.worlds.tokenizer import build_tokenizer

MakePolicy = Callable[..., Policy]
POSITIONS = 64


@pytest.fixture
def policy(make_policy: MakePolicy) -> Policy:
    return make_policy("gpt2", dtype=torch.float32)


def row(prompt: list[int], completion: list[int]) -> Trajectory:
    return Trajectory("p", "c", prompt, completion, "q")


def outside(policy: Policy, *rows: Trajectory) -> list[Callable[[], Any]]:
    """The ways in for a buffer."""
    buffer, sft = OfflineBuffer.from_trajectories(rows), get_objective("sft")
    dpo = get_objective("asft")  # scores a reference first
    return [
        lambda: train(policy, sft, buffer, Training(steps=1)),
        lambda: train(policy, dpo, buffer, Training(steps=1)),
        lambda: analyze_variance(policy, [sft], buffer),
    ]


@pytest.mark.parametrize("where", ["prompt", "completion"])
@pytest.mark.parametrize("number", [0, 5, 7])
def test_a_token_without_an_embedding_names_its_row(policy: Policy, where: str, number: int) -> None:
    bad = len(policy.tokenizer)
    rows = [row([5, 6], [7, 1]) for _ in range(8)]
    rows[number] = row([5, bad], [7, 1]) if where == "prompt" else row([5, 6], [bad, 1])
    for way in outside(policy, *rows):
        with pytest.raises(UserError, match=rf"^row {number + 1} of the buffer .prompt 'q'.: token {bad} is not"):
            way()


def test_a_row_of_a_part_of_a_buffer_is_named_by_its_place(policy: Policy) -> None:
    """Arrow's slices keep the values around them."""
    buffer = OfflineBuffer.from_trajectories([row([5, 99_999], [1]), row([5], [7, 1]), row([5, 6], [88_888, 1])])
    part = OfflineBuffer(buffer.rows.select(range(1, 3)))
    assert part.outside(1000) == (1, 88_888) and buffer.outside(1000) == (0, 99_999)
    assert OfflineBuffer(buffer.rows.select([1])).outside(1000) is None
    assert part.concatenate(buffer).outside(90_000) == (2, 99_999)


def test_more_tokens_than_positions_name_the_row(policy: Policy) -> None:
    fits, too_long = row([5] * 60, [7, 7, 7, 1]), row([5] * 60, [7, 7, 7, 7, 1])
    record = train(policy, get_objective("sft"), OfflineBuffer.from_trajectories([fits]), Training(steps=1))
    assert len(record.steps) == 1
    policy.row_check()(fits.prompt_ids, fits.completion_ids)
    policy.check_range(0, policy.vocabulary - 1)
    for way in outside(policy, fits, too_long):
        with pytest.raises(UserError, match=r"^row 2 of the buffer .* has 65 tokens, and the model has 64 positions"):
            way()


def test_what_an_input_makes_longer_than_the_positions(policy: Policy) -> None:
    """Each row fits: a mismatched pair that does not is left out, and a longer prompt is an error that names it."""
    rows = [
        Trajectory("p", "c", [5] * n, [7] * k, f"q{n}", "policy", 1.0, behaviour_logp=[-1.0] * k, columns={"answer": 1})
        for n, k in ((60, 4), (3, 61), (8, 5), (9, 6))
    ]
    # sorted by prompt: q3 q60 q8 q9, each of which gets the next one's completion
    fit = [(len(each.prompt_ids), len(each.completion_ids)) for each in mismatched(rows, POSITIONS)]
    assert len(mismatched(rows)) == 4 and fit == [(3, 4), (8, 6)]
    buffer = OfflineBuffer.from_trajectories(rows)
    record = train(policy, get_objective("kto"), buffer, Training(steps=2, batch_size=4))
    assert [math.isfinite(step["kl"]) for step in record.steps] == [True, True]
    with pytest.raises(UserError, match=r"^an input of the objective scores \d+ tokens for .* prompt 'q3', .* 64"):
        train(policy, get_objective("sdft"), buffer, Training(steps=1, batch_size=4))


def test_only_a_table_of_positions_is_a_limit(make_policy: MakePolicy, policy: Policy) -> None:
    """A rotary model runs on past the length that it was trained with."""
    assert policy.positions == POSITIONS and make_policy("llama").positions is None
    small: dict[str, Any] = {"vocab_size": 50, "max_position_embeddings": 16, "hidden_size": 16}
    opt = OPTForCausalLM(
        OPTConfig(**small, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16)
    )
    gptj = GPTJForCausalLM(GPTJConfig(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    small["vocab_size"] = 16  # as many words as positions
    llama = LlamaForCausalLM(LlamaConfig(**small, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    for model, limited in ((opt, True), (gptj, True), (llama, False)):
        made = Policy(model.eval(), policy.tokenizer, "m")
        assert made.positions == (16 if limited else None)
        with torch.no_grad():
            model(torch.zeros(1, 16, dtype=torch.long))
            if limited:
                with pytest.raises((IndexError, RuntimeError)):
                    model(torch.zeros(1, 17, dtype=torch.long))
            else:
                model(torch.zeros(1, 17, dtype=torch.long))


def ways(policy: Policy, problems: list[Problem], tokens: int) -> list[Callable[[], Any]]:
    """The ways in for problems."""
    reward = Reward("zero", lambda prompts, completions, **_: [0.0] * len(prompts))
    settings = Sampling(samples=1, max_new_tokens=tokens)
    encoded = encode_problems(policy.tokenizer, problems)
    return [
        lambda: collect_rollouts(policy, TransformersSampler(policy), encoded, reward, settings, seed=0),
        lambda: evaluate(policy, problems, reward, EvaluationSettings(samples=1, max_new_tokens=tokens)),
    ]


def test_a_problem_that_leaves_too_few_positions_is_named(policy: Policy) -> None:
    problems = [Problem("short", "1+1", {}), Problem("long", "1" * 64, {})]
    for way in ways(policy, problems, 4):
        with pytest.raises(
            UserError, match=r"^problem 'long': its prompt has 64 tokens, and the model has 64 positions"
        ):
            way()
    long, drop = encode_problems(policy.tokenizer, problems)[1:], BadRows("drop")
    with pytest.raises(UserError, match="problem 'long'"):
        within_limits(policy, TransformersSampler(policy), long, Sampling(), drop)  # then none is left


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_completions_end_where_the_context_does(kind: str, make_policy: MakePolicy) -> None:
    """Whether positions are a table, which ends for the whole batch at once, or rotary, which do not."""
    policy = make_policy(kind)
    policy.model.config.max_position_embeddings = POSITIONS
    assert policy.context == POSITIONS
    prompts, most = [[7] * 40, [8] * 60, [9] * 4], Sampling(samples=3, max_new_tokens=30)
    together = TransformersSampler(policy).sample(prompts, most, seed=0)
    for place, room in enumerate((24, 4, 30)):
        (alone,) = TransformersSampler(policy).sample([prompts[place]], most, seed=0, numbers=[place])
        assert [one.ids for one in together[place]] == [one.ids for one in alone]
        assert all(len(one.ids) == room if one.truncated else len(one.ids) <= room for one in alone)
        assert any(one.truncated for one in alone)
    problems = [Problem("short", "1+1", {}), Problem("long", "1" * 40, {})]
    bad, encoded = BadRows(), encode_problems(policy.tokenizer, problems)
    assert within_limits(policy, TransformersSampler(policy), encoded, most, bad) == encoded
    assert bad.events() == [
        "completions have less room than max_new_tokens, as the model's context is 64 tokens: 1 in all "
        "(problem 'long': 24 tokens after a prompt of 40)"
    ]
    silent = BadRows()
    assert within_limits(policy, Sampler(), encoded, most, silent) == encoded
    assert not silent.events(), "another engine has limits of its own"


def test_a_problem_with_a_token_without_an_embedding_is_named(policy: Policy) -> None:
    policy.tokenizer = build_tokenizer()
    policy.tokenizer.add_tokens(["<answer>"])  # and no resize of the embeddings
    assert policy.vocabulary == len(policy.tokenizer) - 1
    for way in ways(policy, [Problem("a", "1", {}), Problem("b", "1<answer>", {})], 4):
        with pytest.raises(UserError, match=r"^problem 'b': token \d+ \('<answer>'\) is not one of the model's"):
            way()
    rows = from_trl([{"prompt": "1", "completion": "<answer>2"}], policy.tokenizer)
    with pytest.raises(UserError, match=r"^row 1 of the buffer .*\('<answer>'\).*resize_token_embeddings"):
        train(policy, get_objective("sft"), rows, Training(steps=1))


def test_prompts_that_vllm_refuses_are_one_line(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, policy)

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("The decoder prompt (length 12) is longer than the maximum model length of 8")

    sampler = VLLMSampler(policy)
    monkeypatch.setattr(sampler.engine, "generate", refuse)
    with pytest.raises(
        UserError, match=r"^vLLM rejects prompts of up to 12 tokens \(The decoder prompt .*length of 8\)$"
    ):
        sampler.sample([[5], [5] * 12], Sampling(samples=1), seed=0)


def test_a_model_without_an_embedding_of_its_end_is_refused_when_it_is_loaded(policy: Policy, tmp_path: Path) -> None:
    policy.tokenizer = build_tokenizer()
    policy.tokenizer.add_special_tokens({"eos_token": "<end>"})
    save_policy(policy, tmp_path / "model")
    with pytest.raises(UserError, match=r"has no embedding for its end of sequence: token \d+ \('<end>'\) is not one"):
        load_policy(str(tmp_path / "model"))


EXPERIMENT = {
    "train": {"source": "train.jsonl", "solution": "answer"},
    "benchmarks": {"own": {"source": "test.jsonl"}},
    "reward": "exact-match",
    "rollouts": {"samples": 2, "max_new_tokens": 4},
    "evaluation": {"samples": 2, "max_new_tokens": 4, "curve_points": 0},
    "training": {"steps": 1, "batch_size": 2},
    "seeds": [0],
}


@pytest.fixture
def experiment(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """One whose problems, demonstrations and benchmark are too long."""
    monkeypatch.chdir(tmp_path)
    save_policy(policy, tmp_path / "model")
    for name in ("train", "test"):
        Path(f"{name}.jsonl").write_text(json.dumps({"prompt": "1" * 70, "completion": "2", "answer": "2"}) + "\n")
    Path("x.yaml").write_text(yaml.safe_dump({**EXPERIMENT, "model": "model", "algorithms": {"sft": {}}}))
    return load_experiment("x.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "who"),
    [
        ("train sft --buffer train.jsonl --model model --out out", "train.jsonl line 1"),
        ("rollout x.yaml --out out", "problem 'train-0'"),
        ("evaluate x.yaml", "problem 'train-0'"),
    ],
)
def test_commands_say_so_in_one_line(
    experiment: Experiment, command: str, who: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("rlzoo: ") and who in told and "64 positions" in told


@pytest.mark.slow
def test_comparisons_and_variance_say_so_before_anything_is_trained(experiment: Experiment, tmp_path: Path) -> None:
    def report(share: float, what: str) -> None:
        pass

    table = experiment.model_copy(update={"demonstrations": "train.jsonl"})
    sampled = experiment.model_copy(update={"algorithms": {"rft": experiment.algorithms["sft"]}})
    for some, who in ((experiment, "problem"), (table, "train.jsonl line 1"), (sampled, "problem 'train-0'")):
        with pytest.raises(UserError, match=f"^{who}.*64 positions"):
            shared_buffer.fill_buffer(some, tmp_path / "buffer", tmp_path / "state", 0, report)
        with pytest.raises(UserError, match=f"^{who}.*64 positions"):
            variance.fill(some, tmp_path / "buffer", tmp_path / "state", None, report)
    with pytest.raises(UserError, match=r"^train.jsonl line 1 has 72 tokens, .*64 positions"):
        variance.fill(experiment, tmp_path / "buffer", tmp_path / "state", "train.jsonl", report)
    with pytest.raises(UserError, match=r"^problem 'train-0'.*64 positions"):
        one_stage.collector_of(experiment, load_policy("model"), experiment.training, 2, 0)
