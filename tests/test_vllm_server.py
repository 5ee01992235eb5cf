"""The client of a vLLM server against a server that is made up here: what is asked, and what goes wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import install

from rlzoo.buffers.problems import Problem, encode_problems
from rlzoo.config import EvaluationSettings, Rollouts, Sampling, load_experiment, validated
from rlzoo.errors import UserError
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.policy import Policy
from rlzoo.reward import Reward
from rlzoo.rollout import Sampler, VLLMSampler, VLLMServerSampler, collect_rollouts, mismatch, sampler_of
from rlzoo.rollout.vllm import ENGINE_BATCHES
from rlzoo.types import Trajectory

MakePolicy = Callable[..., Policy]


class FakeServer(ThreadingHTTPServer):
    """Answers each prompt with its tokens, the sample's number and an end of sequence.

    ``dev`` is whether weights can be handed over.
    """

    request_queue_size = 64  # as many connect at once; in a shorter queue some would be refused

    def __init__(self, eos: int, dev: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.eos, self.dev = eos, dev
        self.asked: list[tuple[str, Any]] = []
        self.left: int | None = None
        """Requests before it goes away."""
        self.weights: list[dict[str, Any]] = []
        self.models: Any = {"data": [{"id": "the-model"}]}
        """None: there is no such page."""
        self.most = 1000
        """The largest max_tokens that it accepts."""
        self.lost = 0
        """Characters of each answer that do not arrive."""
        self.hangs = threading.Event()
        self.hangs.set()
        """Cleared, it does not answer."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self.server.hangs.wait(60)
        self.answer(200 if self.server.models is not None else 404, self.server.models)

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, content))
        if self.server.left is not None and self.path == "/v1/completions":
            self.server.left -= 1
            if self.server.left < 0:
                self.close_connection = True
                self.connection.close()
                return
        if self.path == "/v1/completions":
            if content["max_tokens"] > self.server.most:
                self.answer(400, {"error": "max_tokens is too large"})
                return
            choices = []
            for n in reversed(range(content["n"])):
                ids = [*content["prompt"], 50 + n, self.server.eos][: content["max_tokens"]]
                choices.append({"index": n, "token_ids": ids, "logprobs": {"token_logprobs": [-0.5] * len(ids)}})
            self.answer(200, {"choices": choices})
        elif self.server.dev:
            if self.path == "/collective_rpc":
                folder = Path(content["kwargs"]["weights_path"])
                self.server.weights.append(json.loads((folder / "config.json").read_text()))
            self.answer(200, {})
        else:
            self.answer(404, {})

    def answer(self, code: int, content: Any) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data) + self.server.lost))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def policy(make_policy: MakePolicy) -> Policy:
    return make_policy("llama", dtype=torch.float32)


@pytest.fixture
def server(policy: Policy, request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    with serving(policy, getattr(request, "param", True)) as made:
        yield made


@contextmanager
def serving(policy: Policy, dev: bool = True) -> Iterator[FakeServer]:
    made = FakeServer(policy.tokenizer.eos_token_id, dev)
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.hangs.set()
    made.shutdown()
    made.server_close()


def test_samples_come_in_order_with_the_policys_weights(policy: Policy, server: FakeServer) -> None:
    sampler = sampler_of(policy, Rollouts(engine="vllm", url=server.url + "/"))
    assert isinstance(sampler, VLLMServerSampler) and sampler.servers[0].model == "the-model"
    prompts = [[20 + i, 21] for i in range(9)]
    found = sampler.sample(prompts, Sampling(samples=2), seed=3)
    assert [[s.ids[:-1] for s in row] for row in found] == [[[*prompt, 50], [*prompt, 51]] for prompt in prompts]
    assert all(s.logp == [-0.5] * 4 and not s.truncated for row in found for s in row)
    cut = sampler.sample(prompts, Sampling(max_new_tokens=3), seed=3)
    assert all(len(s.ids) == 3 and s.truncated for row in cut for s in row)
    assert len(server.weights) == 1 and server.weights[0]["model_type"] == "llama"

    sampler.sample(prompts, Sampling(), seed=4)
    assert len(server.weights) == 1, "unchanged weights are not handed over again"
    with torch.no_grad():
        next(policy.model.parameters()).add_(1.0)
    sampler.sample(prompts, Sampling(), seed=4)
    assert len(server.weights) == 2


HOT = Sampling(samples=2, temperature=1.3, top_p=0.9, max_new_tokens=5)


@pytest.mark.parametrize("engine", ["server", "in this process"])
def test_what_is_asked_of_an_engine(
    engine: str, policy: Policy, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything, so that nothing is the checkpoint's own default; a prompt's random stream is that of its number."""
    policy.model.generation_config.eos_token_id = [policy.tokenizer.eos_token_id, 40]
    engines = install(monkeypatch, policy)
    samplers: dict[str, Sampler] = {"in this process": VLLMSampler(policy)}
    samplers["server"] = VLLMServerSampler(policy, server.url)
    sampler = samplers[engine]
    prompts = [[20 + i, 21] for i in range(5)]

    def asked(places: list[int], numbers: list[int] | None, seed: int = 4, greedy: bool = False) -> list[Any]:
        """What is asked for the prompts in these places."""
        server.asked, engines[-1].asked, done = [], [], list[int]()
        sampler.sample([prompts[i] for i in places], HOT, seed, greedy, done.append, numbers)
        assert sum(done) == len(places)
        if engine == "in this process":
            return [{**vars(one), **one.others} for one in engines[-1].asked]
        own = {content["prompt"][0]: content for path, content in server.asked if path == "/v1/completions"}
        return [own[20 + i] for i in places]

    everything = [0, 1, 2, 3, 4]
    whole = asked(everything, None)
    ends = sorted(policy.eos_ids)
    plain = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 5, "stop_token_ids": ends}
    sampled = {"n": 2, "temperature": 1.3, "top_p": 0.9, "logprobs": 0, **plain}
    assert [{name: one[name] for name in sampled} for one in whole] == [sampled] * 5
    greedy = {"n": 1, "temperature": 0.0, "top_p": 1.0, **plain}
    assert [{name: one[name] for name in greedy} for one in asked(everything, None, greedy=True)] == [greedy] * 5
    assert len({one["seed"] for one in whole}) == 5 and len(ends) == 2
    assert asked([3, 1], [3, 1]) == [whole[3], whole[1]]
    assert not {one["seed"] for one in asked(everything, None, seed=5)} & {one["seed"] for one in whole}


def test_one_process_of_several_hands_the_weights_over(
    policy: Policy, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlzoo.rollout.vllm.is_main", lambda: False)
    VLLMServerSampler(policy, server.url).sample([[20]], Sampling(), seed=0)
    assert {path for path, _ in server.asked} == {"/v1/completions"}


def test_log_probs_of_another_distribution_are_not_believed(policy: Policy, server: FakeServer) -> None:
    sampler = VLLMServerSampler(policy, server.url)
    for settings, greedy in ((Sampling(temperature=0.7), False), (Sampling(top_p=0.9), False), (Sampling(), True)):
        found = sampler.sample([[20, 21]], settings, seed=0, greedy=greedy)
        assert all(s.logp is None for s in found[0]) and len(found[0]) == (1 if greedy else 4)


@pytest.mark.parametrize("server", [False], indirect=True)
def test_a_server_that_takes_no_weights(policy: Policy, server: FakeServer) -> None:
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        VLLMServerSampler(policy, server.url).sample([[20]], Sampling(), seed=0)


def test_a_server_that_refuses_or_is_not_there(policy: Policy, server: FakeServer) -> None:
    server.most = 10
    with pytest.raises(UserError, match=r"answered 400 to /v1/completions: .*too large"):
        VLLMServerSampler(policy, server.url).sample([[20]], Sampling(max_new_tokens=20), seed=0)
    for url, told in (("http://127.0.0.1:9", "cannot be reached"), ("nonsense", "http://"), ("file:///", "http://")):
        with pytest.raises(UserError, match=told):
            VLLMServerSampler(policy, url)
    answers: list[Any] = [[], {"data": []}, {"error": "no such page"}, "<html>"]
    for server.models in answers:
        with pytest.raises(UserError, match=f"the server at {server.url} is not a vLLM server"):
            VLLMServerSampler(policy, server.url)
    server.models = None
    with pytest.raises(UserError, match="answered 404 to /v1/models: null"):
        VLLMServerSampler(policy, server.url)
    server.lost = 3
    with pytest.raises(UserError, match=r"cannot be reached \(IncompleteRead"):
        server.models = []
        VLLMServerSampler(policy, server.url)


def test_a_server_that_does_not_answer_is_not_waited_for_for_ever(
    policy: Policy, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlzoo.rollout.vllm.TIMEOUT", 0.2)
    server.hangs.clear()
    with pytest.raises(UserError, match=r"cannot be reached \(timed out\)"):
        VLLMServerSampler(policy, server.url)


def test_a_server_that_goes_away_costs_the_batch_that_it_was_in(
    policy: Policy, server: FakeServer, tmp_path: Path
) -> None:
    """The samples of the batches before are kept; the same call goes on with a server that is there again."""
    settings = Rollouts(samples=1, batch_size=1, engine="vllm", url=server.url, max_new_tokens=4)
    problems = [Problem(str(i), f"{i}+{i}=?\n", {}) for i in range(3 * ENGINE_BATCHES)]
    encoded = encode_problems(policy.tokenizer, problems)
    reward = Reward("one", lambda completions, **_: [1.0] * len(completions))

    def collect(url: str) -> list[Trajectory]:
        sampler = VLLMServerSampler(policy, url)
        return collect_rollouts(policy, sampler, encoded, reward, settings, seed=0, cached=CachedResults(tmp_path))

    server.left = 2 * ENGINE_BATCHES + 5
    with pytest.raises(UserError, match=f"vLLM server at {server.url}"):
        collect(server.url)
    assert len(list(tmp_path.glob("*.result"))) == 2
    server.left, server.asked = None, []
    rows = collect(server.url)
    assert sum(path == "/v1/completions" for path, _ in server.asked) == ENGINE_BATCHES
    assert [row.prompt_id for row in rows] == [problem.id for problem in problems]


def test_settings_of_an_engine_that_is_not_asked_for(policy: Policy) -> None:
    with pytest.raises(UserError, match="a server has its own options: give url or engine_options"):
        validated(EvaluationSettings, {"engine": "vllm", "url": "http://x", "engine_options": {"a": 1}}, "evaluation")
    with pytest.raises(UserError, match="engine 'transformers' has no server: url is for engines with one"):
        sampler_of(policy, Sampling(engine="transformers", url="http://x"))
    with pytest.raises(UserError, match=r"engine 'transformers' cannot take these engine_options: .*'max_model_len'"):
        sampler_of(policy, Sampling(engine_options={"max_model_len": 9}))


def test_vllm_is_not_installed(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlzoo.rollout.vllm.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"rlzoo\[vllm\]"):
        VLLMSampler(policy)


def test_an_engine_that_cannot_start_says_why(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, policy)

    def refuse(where: str, **options: Any) -> None:
        raise AssertionError("\nNot enough NUMA nodes.\nSee below")

    monkeypatch.setattr("vllm.LLM", refuse)
    told = r"^vLLM cannot start with engine_options \{'tensor_parallel_size': 2\} \(Not enough NUMA nodes.\)$"
    with pytest.raises(UserError, match=told):
        VLLMSampler(policy, tensor_parallel_size=2)


def test_tensor_parallel_engines_need_as_many_gpus(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = install(monkeypatch, policy)
    VLLMSampler(policy, tensor_parallel_size=2)
    assert engines[0].options["tensor_parallel_size"] == 2 and "distributed_executor_backend" not in engines[0].options
    monkeypatch.setattr("rlzoo.rollout.vllm.world_size", lambda: 4)
    with pytest.raises(UserError, match=r"^engine_options.tensor_parallel_size = 3: give a number that divides the 4 "):
        VLLMSampler(policy, tensor_parallel_size=3)
    monkeypatch.setattr("rlzoo.rollout.vllm.world_size", lambda: 1)
    monkeypatch.setattr(type(policy), "device", torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match=r"^engine_options.tensor_parallel_size = 2, but only 1 GPU is visible: give "):
        VLLMSampler(policy, tensor_parallel_size=2)


def test_servers_share_the_prompts(policy: Policy, server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the samples that one of them gives, in their order, and the weights of the policy in each."""
    prompts, settings = [[20 + i, 21] for i in range(7)], Rollouts(samples=2, engine="vllm", url=server.url)
    alone = sampler_of(policy, settings).sample(prompts, settings, seed=3)
    with serving(policy) as one, serving(policy) as other:
        urls = validated(Rollouts, {**settings.model_dump(), "url": [one.url, other.url]}, "rollouts")
        sampler, done = sampler_of(policy, urls), list[int]()
        for step in range(2):
            with sampler.reporting_to(lambda place, samples: done.append(place)):
                assert sampler.sample(prompts, urls, seed=3) == alone
            assert len(one.weights) == len(other.weights) == step + 1
            with torch.no_grad():
                next(policy.model.parameters()).add_(1.0)
        seen = [[c["prompt"][0] - 20 for path, c in each.asked if path == "/v1/completions"] for each in (one, other)]
        assert [sorted(places) for places in seen] == [[0, 0, 2, 2, 4, 4, 6, 6], [1, 1, 3, 3, 5, 5]]
        assert done == 2 * [*range(7)]
        other.left = 2
        with pytest.raises(UserError, match=f"vLLM server at {other.url} cannot be reached"):
            sampler.sample(prompts, urls, seed=3)
    with pytest.raises(UserError, match=r"url is an empty list: give at least one"):
        validated(Rollouts, {"engine": "vllm", "url": []}, "rollouts")


def test_an_engine_is_not_held_against_itself(policy: Policy, server: FakeServer) -> None:
    problems = encode_problems(policy.tokenizer, [Problem("p", "17+25=?\n", {})])
    sampler, reward = (
        VLLMServerSampler(policy, server.url),
        Reward("one", lambda completions, **_: [1.0] * len(completions)),
    )
    own = collect_rollouts(policy, sampler, problems, reward, Sampling(samples=2), seed=0, recompute=False)
    assert all(set(row.behaviour_logp or []) == {-0.5} for row in own)
    assert mismatch(own) is None
    both = collect_rollouts(policy, sampler, problems, reward, Sampling(samples=2), seed=0)
    assert all(row.sampler_logp != row.behaviour_logp for row in both)
    found = mismatch(both)
    assert found is not None and found["largest"] > 0.1


def test_importance_needs_both_log_probs() -> None:
    with pytest.raises(UserError, match=r"needs rollouts\.behaviour"):
        load_experiment("facts", {"rollouts.behaviour": "sampler", "training.importance_cap": 2.0})
    server = {"rollouts.engine": "vllm", "rollouts.url": "http://x", "training.importance_cap": 2.0}
    assert load_experiment("facts", server).rollouts.url == "http://x"
    for unknown in ({"rollouts.temperature": 0.6}, {"rollouts.top_p": 0.9}):
        with pytest.raises(UserError, match="known only at temperature 1 and top_p 1"):
            load_experiment("facts", {**server, **unknown})


def test_mismatch_by_hand() -> None:
    """Gaps of 0, log 2 and -log 2: |Δ| sums to 2 log 2 over 3 tokens, ratios are 1, 2 and 1/2."""
    log2 = 0.6931471805599453
    row = Trajectory("", "", [1], [2, 3, 4], "0", behaviour_logp=[-1.0, -1.0, -1.0],
                     sampler_logp=[-1.0, -1.0 - log2, -1.0 + log2])  # fmt: skip
    found = mismatch([row, Trajectory("", "", [1], [2], "1", behaviour_logp=[-1.0])])
    assert found is not None and found["tokens"] == 3
    assert found["mean_absolute"] == pytest.approx(2 * log2 / 3)
    assert found["largest"] == pytest.approx(log2)
    assert found["mean_ratio"] == pytest.approx(3.5 / 3)
    assert found["kl"] == pytest.approx(((2 - 1 - log2) + (0.5 - 1 + log2)) / 3)
    assert mismatch([Trajectory("", "", [1], [2], "1")]) is None
