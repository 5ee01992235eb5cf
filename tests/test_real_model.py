"""Steps, an analysis and a comparison on a real checkpoint and real problems: SmolLM2-135M-Instruct and GSM8K.

The model is the folder that tests/fetch_smollm2.py makes, the rows are GSM8K's train.jsonl and test.jsonl. Where either
is absent the tests are skipped and say what to set.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlzoo import OfflineBuffer, Policy, analyze_variance, get_objective, get_reward, load_policy, train
from rlzoo.buffers import Buffer
from rlzoo.buffers.problems import Problem, demonstrations, encode_problems, load_problems
from rlzoo.cli import main
from rlzoo.config import Experiment, Rollouts, load_experiment
from rlzoo.policy import Sequences
from rlzoo.rollout import TransformersSampler, collect_rollouts
from rlzoo.training.run import with_reference
from rlzoo.types import Selection

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
NAME = "smollm2-gsm8k"
OBJECTIVES = ("sft", "dft", "iw-sft", "rft", "dpo", "ppo", "grpo")
TRAINED = ("dft", "dpo", "ppo")
"""Beside SFT and GRPO, which the comparison trains: demonstrations, pairs with a reference, samples with a critic."""
STEPS = 2
PROMPTS = 4


def folder_of(variable: str, default: Path, file: str, mend: str) -> Path:
    folder = Path(os.environ.get(variable) or default)
    if not (folder / file).is_file():
        pytest.skip(f"no {file} in {folder}: {mend}, or set {variable} to a folder that has it")
    return folder


@pytest.fixture(scope="module")
def model_folder() -> Path:
    default = ROOT / ".cache" / "smollm2"
    return folder_of("RLZOO_SMOLLM2", default, "model.safetensors", "run python tests/fetch_smollm2.py .cache/smollm2")


@pytest.fixture(scope="module")
def gsm8k() -> Path:
    default = ROOT.parent / "shared" / "data" / "gsm8k"
    return folder_of("RLZOO_GSM8K", default, "train.jsonl", "put GSM8K's train.jsonl and test.jsonl there")


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """A model of this size is worth more than the one thread of the other tests, where none of them run beside it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def experiment(gsm8k: Path) -> Experiment:
    sources = {"train.source": gsm8k / "train.jsonl", "benchmarks.gsm8k.source": gsm8k / "test.jsonl"}
    return load_experiment(NAME, {key: str(path) for key, path in sources.items()})


@pytest.fixture(scope="module")
def base(model_folder: Path) -> Policy:
    return load_policy(str(model_folder))


@pytest.fixture(scope="module")
def problems(experiment: Experiment) -> list[Problem]:
    """The problems with the least to read and write: a step costs seconds a thousand tokens on two cores."""
    every = load_problems(experiment.train)
    return sorted(every, key=lambda p: len(str(p.columns["question"])) + len(p.solutions[0]))[:PROMPTS]


@pytest.fixture(scope="module")
def buffer(base: Policy, problems: list[Problem]) -> Buffer:
    """GSM8K's solutions, and the model's own completions scored by whether they write an equation.

    The model solves about one problem in a hundred, so that right answers would leave nothing to choose from in a
    few samples. The shape of the answer differs among them, and to the objectives a reward is a reward. Prompts
    whose samples are all alike are left out: they rightly give no gradient, and the tests ask for one.
    """
    settings = Rollouts(samples=4, max_new_tokens=40)
    reward = get_reward({"name": "format", "pattern": r"\d\s*="})
    sampler = TransformersSampler(base)
    samples = collect_rollouts(base, sampler, encode_problems(base.tokenizer, problems), reward, settings, seed=0)
    rewards: dict[str, set[float | None]] = {}
    for row in samples:
        rewards.setdefault(row.prompt_id, set()).add(row.reward)
    mixed = [row for row in samples if len(rewards[row.prompt_id]) > 1]
    assert mixed, "all samples of each prompt have the same shape: sample more prompts"
    rows = demonstrations(base.tokenizer, problems) + mixed
    return with_reference(OfflineBuffer.from_trajectories(rows), base)


def test_the_experiment_compares_every_objective() -> None:
    assert tuple(load_experiment(NAME).algorithms) == OBJECTIVES


def test_the_model_talks(base: Policy) -> None:
    """A wrong tokenizer, template or weight conversion ends in word salad, and never in an end of sequence."""
    assert base.tokenizer.eos_token == "<|im_end|>"
    question = Problem("capital", [{"role": "user", "content": "What is the capital of France?"}], {})
    prompt = encode_problems(base.tokenizer, [question])[0]
    assert prompt.text.endswith("What is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    [[answer]] = TransformersSampler(base).sample([prompt.ids], Rollouts(max_new_tokens=24), seed=0, greedy=True)
    assert "Paris" in answer.text
    assert not answer.truncated


def test_solutions_are_right_by_the_experiments_reward(experiment: Experiment) -> None:
    reward = get_reward(experiment.reward)
    [source] = experiment.benchmarks.values()
    some = load_problems(source.model_copy(update={"limit": 200}))
    solutions = [p.solutions[0] for p in some]
    gold: list[Any] = [p.columns["answer"] for p in some]
    prompts = [p.prompt for p in some]
    assert reward(prompts, solutions, answer=gold) == [1.0] * len(some)
    others = [solution.rpartition("####")[0] + "#### -7" for solution in solutions]
    assert reward(prompts, others, answer=gold) == [0.0] * len(some)


@pytest.mark.parametrize("name", TRAINED)
def test_two_steps(name: str, base: Policy, buffer: Buffer, experiment: Experiment) -> None:
    policy = Policy(copy.deepcopy(base.model), base.tokenizer, base.name)
    [rate] = experiment.learning_rates_of(name)
    changes = {"steps": STEPS, "batch_size": 2, "token_budget": 1024, "learning_rate": rate}
    settings = experiment.training_of(name).model_copy(update=changes)
    record = train(policy, get_objective(name), buffer, settings, seed=0)
    assert [row["step"] for row in record.steps] == [1, STEPS]
    for row in record.steps:
        assert math.isfinite(row["loss"])
        assert math.isfinite(row["gradient_norm"]) and row["gradient_norm"] > 0
    assert record.costs.gradient_tokens > 0
    for (which, before), after in zip(base.model.named_parameters(), policy.model.parameters(), strict=True):
        assert after.isfinite().all(), which
        assert not torch.equal(before, after), f"{which} has not been trained"


def test_the_gradients_of_its_rows_are_measured(base: Policy, buffer: Buffer) -> None:
    """The analyzer's norms, and its mean gradient, against one ordinary backward pass a row."""
    found = analyze_variance(base, ["sft", "dpo", "grpo"], buffer, rows=3, draws=256, token_budget=512)
    assert found["skipped"] == {} and len(found["layers"]) == 32  # the tied embedding, 30 blocks, the last norm
    rows = [buffer[i] for (i,) in buffer.view(Selection.DEMONSTRATIONS).units]
    count = found["objectives"]["sft"]["rows"]
    squares = []
    for row in rows:
        sequences = Sequences.collate([row.prompt_ids], [row.completion_ids], base.device)
        base.zero_grad(set_to_none=True)
        torch.autograd.backward(base(sequences).logp.sum())
        squares.append(sum(float(p.grad.double().square().sum()) for p in base.parameters() if p.grad is not None))
    base.zero_grad(set_to_none=True)
    exact = found["objectives"]["sft"]["proxies"]["prompts"]["exact"]
    assert len(exact) == count == 3
    tokens = sum(len(row.completion_ids) for row in rows)
    for square in exact:  # three of the four rows, scaled by rows over their tokens
        scale = [s * (count / (tokens - len(left.completion_ids))) ** 2 for left in rows for s in squares]
        assert min(abs(square / s - 1) for s in scale) < 1e-4


@pytest.mark.usefixtures("copied")
def test_compare_from_the_command_line(
    tmp_path: Path, model_folder: Path, problems: list[Problem], capsys: pytest.CaptureFixture[str]
) -> None:
    """As a user runs it on local files, cut down to what takes a minute."""
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(dict(p.columns)) + "\n" for p in problems), encoding="utf-8")
    out = tmp_path / "out"
    options = {
        "--model": model_folder, "--data": table, "--test-data": table, "--out": out, "--algorithms": "sft,grpo",
        "--steps": STEPS, "--batch-size": 2, "--limit": 2, "--samples": 2, "--seeds": 0, "--workers": 1, "--threads": 2,
    }  # fmt: skip
    shorter = ["rollouts.samples=2", "rollouts.max_new_tokens=16", "evaluation.max_new_tokens=16",
               "evaluation.curve_points=0", "evaluation.curve_problems=1", "evaluation.curve_samples=1"]  # fmt: skip
    arguments = [str(word) for pair in options.items() for word in pair]
    status = main(["compare", NAME, *arguments, *(word for change in shorter for word in ("--set", change))])
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert status == 0, results["failed"]
    assert [cell["algorithm"] for cell in results["cells"]] == ["sft", "grpo"]
    assert set(results["base"]) == {"gsm8k"}
    assert (out / "report.html").is_file()
    assert "grpo" in capsys.readouterr().out
