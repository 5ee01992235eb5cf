"""What samples with a copy of the weights samples with those that the policy has now."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeEngine, install, plain_weights
from safetensors.torch import load_file
from torch import Tensor, nn

from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.problems import Problem, encode_problems
from rlzoo.comparison.plan import workers_at
from rlzoo.comparison.runner import compare
from rlzoo.config import EvaluationSettings, Lora, Sampling, Training, load_experiment
from rlzoo.errors import UserError
from rlzoo.evaluation import evaluate
from rlzoo.objective import get_objective
from rlzoo.policy import Policy
from rlzoo.reward import Reward
from rlzoo.rollout import Sampler, TransformersSampler, VLLMSampler, VLLMServerSampler, collect_rollouts, vllm
from rlzoo.training import Trainer
from rlzoo.training.batches import FreshSource
from rlzoo.types import Selection
from rlzoo.worlds import EMBEDDED_BASE

MakePolicy = Callable[..., Policy]
PROBLEMS = [Problem(str(i), f"{i}+{i}=?\n", {}) for i in range(3)]
SHORT = Sampling(samples=4, max_new_tokens=4)
REWARD = Reward("length", lambda completions, **_: [float(len(c) % 3) for c in completions])
STEPS = Training(steps=3, learning_rate=1e-2, warmup_ratio=0.0, checkpoint_seconds=None)


@pytest.fixture
def policy(make_policy: MakePolicy) -> Policy:
    return make_policy("llama", dtype=torch.float32)


class Collect:
    """Fresh samples for a trainer; a checkpoint holds how many batches there were."""

    def __init__(self, policy: Policy, sampler: Sampler) -> None:
        self.policy, self.sampler, self.batches = policy, sampler, 0

    def __call__(self, version: int) -> OfflineBuffer:
        self.batches += 1
        problems = encode_problems(self.policy.tokenizer, PROBLEMS)
        rows = collect_rollouts(self.policy, self.sampler, problems, REWARD, SHORT, seed=self.batches, version=version)
        return OfflineBuffer.from_trajectories(rows)

    def state(self) -> Any:
        return self.batches

    def restore(self, state: Any) -> None:
        self.batches = state


def online(policy: Policy, sampler: Sampler, settings: Training, name: str = "grpo", **options: Any) -> Trainer:
    objective = get_objective(name, kl_coefficient=0.0)
    source = FreshSource(Collect(policy, sampler), Selection.GROUPS)
    return Trainer(policy, objective, source, settings, **options)


class Watched(VLLMSampler):
    """Sees to it that the engine samples with the policy's own weights."""

    engine: FakeEngine

    def sample(self, *args: Any, **options: Any) -> Any:
        found = super().sample(*args, **options)
        assert self.engine.holds(self.policy), "stale weights"
        return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_an_engine_samples_with_the_weights_of_each_step(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The trainer's AdamW is fused, and leaves torch's count of changes as it is."""
    if name == "ppo":  # a step of shards, which the counters of a gathered copy do not see
        monkeypatch.setattr(torch.autograd.graph, "increment_version", lambda tensors: None)
    engines = install(monkeypatch, policy)
    sampler = Watched(policy)
    trainer = online(policy, sampler, STEPS, name)
    assert trainer.optimizer.param_groups[0]["fused"]
    start = {name: value.clone() for name, value in plain_weights(policy).items()}
    trainer.run()
    assert engines[0].handed == STEPS.steps
    assert not engines[0].holds(policy), "the last step has not been handed over yet"
    found = evaluate(policy, PROBLEMS, REWARD, EvaluationSettings(max_new_tokens=4), sampler=sampler)
    assert engines[0].handed == STEPS.steps + 1 and found.metrics["samples"] == 4
    assert any(not torch.equal(start[name], value) for name, value in plain_weights(policy).items())
    sampler.sample([[20]], SHORT, seed=0)
    Watched(policy).sample([[20]], SHORT, seed=0)
    assert engines[0].handed == STEPS.steps + 1 and len(engines) == 1, "nothing changed: nothing is handed over"


@pytest.mark.slow
def test_an_engine_samples_with_an_adapter_in_training(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    engines = install(monkeypatch, policy)
    sampler = Watched(policy)
    sampler.sample([[20]], SHORT, seed=0)
    online(policy, sampler, STEPS.model_copy(update={"lora": Lora(rank=2)})).run()
    assert engines[0].handed == 1 + STEPS.steps
    sampler.sample([[20]], SHORT, seed=0)
    assert engines[0].handed == 2 + STEPS.steps


def test_an_engine_samples_with_the_weights_of_a_checkpoint(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policy = make_policy("llama", dtype=torch.float32)
    engines = install(monkeypatch, policy)
    settings = STEPS.model_copy(update={"checkpoint_seconds": 0.0})

    def stop(trainer: Trainer, step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        online(policy, Watched(policy), settings, callbacks=[stop], checkpoints=tmp_path).run()
    again = make_policy("llama", dtype=torch.float32)
    sampler = Watched(again)
    sampler.sample([[20]], SHORT, seed=0)  # the base's weights are handed over
    handed, base = engines[0].handed, {name: value.clone() for name, value in plain_weights(again).items()}
    trainer = online(again, sampler, settings, checkpoints=tmp_path)
    assert trainer.step == 1
    sampler.sample([[20]], SHORT, seed=0)
    assert engines[0].handed == handed + 1
    assert any(not torch.equal(base[name], value) for name, value in engines[0].policy.model.state_dict().items())


def test_policies_take_turns_at_one_engine(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines are shared by the name of the model; two policies that were changed as often are not the same."""
    one, other = (make_policy("llama", dtype=torch.float32, seed=seed) for seed in (0, 1))
    engines = install(monkeypatch, one)
    samplers = [Watched(one), Watched(other)]
    assert one.weights_version == other.weights_version
    for turn in range(4):
        samplers[turn % 2].sample([[20]], SHORT, seed=0)
    assert len(engines) == 1 and engines[0].handed == 4


def test_an_engine_is_one_of_a_configuration_a_type_and_options(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts as is best for training beside it, unless ``engine_options`` say otherwise."""
    policy = make_policy("llama", dtype=torch.float32)
    engines = install(monkeypatch, policy)
    VLLMSampler(policy)
    VLLMSampler(policy)
    VLLMSampler(policy, max_model_len=9, gpu_memory_utilization=0.5, enforce_eager=False)
    VLLMSampler(make_policy("llama", dtype=torch.bfloat16))
    policy.name = "a/trained/one"  # the engine takes its weights
    VLLMSampler(policy)
    embedded = make_policy("gpt2", dtype=torch.float32)
    embedded.name = "embedded"
    VLLMSampler(embedded)
    embedded.compute = torch.bfloat16  # the engine computes as the policy does, whatever its weights are
    VLLMSampler(embedded)
    assert [engine.where for engine in engines] == ["llama"] * 3 + [str(EMBEDDED_BASE)] * 2
    assert [engine.options["dtype"] for engine in engines] == ["float32", "float32", "bfloat16", "float32", "bfloat16"]
    assert [engine.options["gpu_memory_utilization"] for engine in engines] == [0.3, 0.5, 0.3, 0.3, 0.3]
    assert [engine.options.get("max_model_len") for engine in engines] == [None, 9, None, None, None]
    assert [engine.options["enforce_eager"] for engine in engines] == [True, False, True, True, True]
    for engine in engines:
        assert engine.options["logprobs_mode"] == "processed_logprobs", "of the distribution that is sampled from"
        assert engine.options["trust_remote_code"] is False
        assert "enable_sleep_mode" not in engine.options, "it is for GPUs"


@pytest.mark.slow
def test_an_engine_sleeps_while_the_policy_trains(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives its memory back, weights included, and takes the new ones when it has woken up."""
    engines = install(monkeypatch, policy)
    sampler = Watched(policy, enable_sleep_mode=True)
    (engine,) = engines
    trainer = online(policy, sampler, STEPS)
    first = next(policy.model.parameters())
    first.register_hook(lambda gradient: engine.calls.append("backward"))
    trainer.run()
    awake = ["wake weights", "weights", "wake kv_cache", "generate", "sleep 2"]
    calls = [call for call, before in zip(engine.calls, [None, *engine.calls], strict=False) if call != before]
    assert calls == ["weights", "generate", "sleep 2", "backward", *2 * [*awake, "backward"]]
    engine.calls.clear()
    evaluate(policy, PROBLEMS, REWARD, EvaluationSettings(max_new_tokens=4), sampler=sampler)
    assert engine.calls == [*awake[:-1], "generate", "sleep 2"], "between its two passes it is awake"
    sampler.rest()
    assert engine.calls[-2:] == ["generate", "sleep 2"], "it sleeps"


def test_an_engine_on_several_gpus_keeps_its_weights_asleep(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come through a folder, as its processes are others."""
    engines = install(monkeypatch, policy)
    sampler = Watched(policy, enable_sleep_mode=True, tensor_parallel_size=2)
    for _ in range(2):
        sampler.sample([[20]], SHORT, seed=0)
        sampler.rest()
    changed_in_place(policy)
    sampler.sample([[20]], SHORT, seed=0)
    once = ["wake weights", "wake kv_cache", "generate", "sleep 1"]
    assert engines[0].calls == [
        "weights", "generate", "sleep 1", *once, "wake weights", "weights", "wake kv_cache", "generate",
    ]  # fmt: skip


def test_one_engine_of_a_process_sleeps(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's allocator belongs to the process, and takes one engine."""
    engines = install(monkeypatch, policy)
    monkeypatch.setattr("rlzoo.rollout.vllm._may_sleep", lambda policy: True)
    VLLMSampler(policy)
    VLLMSampler(policy, max_model_len=9).rest()
    assert [engine.options.get("enable_sleep_mode") for engine in engines] == [True, None]
    monkeypatch.undo()
    monkeypatch.setattr(type(policy), "device", torch.device("cuda"))
    assert vllm._may_sleep(policy)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert not vllm._may_sleep(policy)


@pytest.mark.parametrize("whose", ["its own", "another policy's"])
def test_weights_that_did_not_arrive_are_handed_over_again(
    policy: Policy, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """A hand-over that fails half way leaves an engine with weights that nobody knows."""
    engines = install(monkeypatch, policy)
    sampler = Watched(policy)
    sampler.sample([[20]], SHORT, seed=0)
    if whose == "its own":
        step(policy, torch.optim.AdamW(policy.parameters(), lr=0.1, fused=True))
    engines[0].fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        (sampler if whose == "its own" else Watched(make_policy("llama", dtype=torch.float32, seed=1))).sample(
            [[20]], SHORT, seed=0
        )
    engines[0].fails = False
    sampler.sample([[20]], SHORT, seed=0)
    assert engines[0].handed == 2


def step(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def replaced_weight(policy: Policy) -> None:
    old = policy.model.lm_head.weight
    new = nn.Parameter(old.detach() + 1)
    for _ in range(old._version - new._version):
        torch.autograd.graph.increment_version([new])  # torch's count is the same for both
    policy.model.lm_head.weight = new


def loaded(policy: Policy, assign: bool) -> None:
    weights = {name: value + 1 for name, value in policy.model.state_dict().items()}
    policy.model.load_state_dict(weights, assign=assign)


def loaded_whole(policy: Policy) -> None:
    policy.load_state_dict({name: value + 1 for name, value in policy.state_dict().items()})


@torch.no_grad()
def changed_in_place(policy: Policy) -> None:
    policy.model.lm_head.weight.add_(1.0)


def changed_unseen(policy: Policy) -> None:
    policy.model.lm_head.weight.data.add_(1.0)
    policy.weights_changed()


CHANGES: dict[str, Callable[[Policy], None]] = {
    "fused AdamW": lambda p: step(p, torch.optim.AdamW(p.parameters(), fused=True)),
    "fused SGD": lambda p: step(p, torch.optim.SGD(p.parameters(), lr=0.1, fused=True)),
    "foreach Adam": lambda p: step(p, torch.optim.Adam(p.parameters(), foreach=True)),
    "plain SGD": lambda p: step(p, torch.optim.SGD(p.parameters(), lr=0.1, foreach=False)),
    "state dict": lambda p: loaded(p, assign=False),
    "state dict, assigned": lambda p: loaded(p, assign=True),
    "state dict of the policy": loaded_whole,
    "in place": changed_in_place,
    "another parameter": replaced_weight,
    "through .data": changed_unseen,
    "an adapter": lambda p: p.add_lora(rank=2),
    "a new one, after all others": lambda p: setattr(p.model.lm_head, "bias", torch.nn.Parameter(torch.zeros(1))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_counts_once(policy: Policy, change: str) -> None:
    if change == "an adapter":
        pytest.importorskip("peft")
    reference = policy.frozen_copy()
    before, others = policy.weights_version, reference.weights_version
    score = policy.model(torch.tensor([[20, 21]])).logits.sum()
    torch.autograd.backward(score)
    assert policy.weights_version == before, "a forward and a backward pass change nothing"
    CHANGES[change](policy)
    assert policy.weights_version == before + 1
    assert policy.weights_version == before + 1
    assert Policy(policy.model, policy.tokenizer).weights_version == before + 1, "it is the model's, whoever asks"
    assert reference.weights_version == others


def test_a_moving_reference_counts_too(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = install(monkeypatch, policy)
    problems = encode_problems(policy.tokenizer, PROBLEMS)
    rows = collect_rollouts(policy, TransformersSampler(policy), problems, REWARD, SHORT, seed=0)
    buffer = OfflineBuffer.from_trajectories(rows)

    def collect(version: int) -> OfflineBuffer:
        return buffer

    source = FreshSource(collect, Selection.CORRECT, threshold=0.0)
    trainer = Trainer(policy, get_objective("iw-sft", variant="ema"), source, STEPS)
    (reference,) = trainer.models.moving.values()
    sampler = Watched(reference)

    def watch(running: Trainer, step: int) -> None:
        sampler.sample([[20]], SHORT, seed=0)

    trainer.callbacks = [watch]
    trainer.run()
    assert engines[0].handed == STEPS.steps


def test_a_sampler_sees_modules_that_came_after_it(policy: Policy) -> None:
    """An adapter on the output layer takes that layer's place."""
    pytest.importorskip("peft")
    sampler = TransformersSampler(policy)
    policy.add_lora(rank=2, target_modules=["lm_head"])
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 2.0)
    found, fresh = (
        [s.ids for s in some.sample([[20, 21]], SHORT, seed=0)[0]] for some in (sampler, TransformersSampler(policy))
    )
    assert found == fresh


class Server(ThreadingHTTPServer):
    """Takes weights from a folder, and answers every prompt with an end of sequence and what it holds."""

    def __init__(self, eos: int) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.eos, self.handed, self.refuses, self.cache_is_stale = eos, 0, False, False
        self.weights: dict[str, Tensor] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def holds(self, policy: Policy) -> bool:
        """Whether its weights are the policy's."""
        wanted = plain_weights(policy)
        return bool(self.weights) and all(torch.equal(wanted[name], value) for name, value in self.weights.items())


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "the-model"}]})

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/collective_rpc" and self.server.refuses:
            self.answer({}, 500)
        elif self.path == "/collective_rpc":
            folder = Path(content["kwargs"]["weights_path"])
            readable = folder.stat().st_mode & 0o055 == 0o055  # by another user too, whom the server may be
            self.server.handed, self.server.weights = self.server.handed + 1, load_file(folder / "model.safetensors")
            self.server.cache_is_stale = True
            self.answer({}, 200 if readable else 403)
        elif self.path == "/v1/completions" and self.server.cache_is_stale:
            self.answer({"error": "keys and values of the old weights"}, 500)
        elif self.path == "/v1/completions":
            ids = [content["prompt"][0], self.server.eos]
            choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-0.5] * 2}}
            self.answer({"choices": [{**choice, "index": n} for n in range(content["n"])]})
        else:
            self.server.cache_is_stale = self.server.cache_is_stale and self.path != "/reset_prefix_cache"
            self.answer({})

    def answer(self, content: Any, code: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(policy: Policy) -> Iterator[Server]:
    made = Server(policy.tokenizer.eos_token_id)
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.slow
def test_a_server_samples_with_the_weights_of_each_step(policy: Policy, server: Server) -> None:
    sampler = VLLMServerSampler(policy, server.url)

    def watch(running: Trainer, step: int) -> None:
        assert server.handed == step and not server.holds(policy)
        sampler.sample([[20]], SHORT, seed=0)
        assert server.handed == step + 1 and server.holds(policy)

    online(policy, sampler, STEPS, callbacks=[watch]).run()
    sampler.sample([[20]], SHORT, seed=0)
    assert server.handed == STEPS.steps + 1, "nothing changed: nothing is handed over"
    VLLMServerSampler(policy, server.url).sample([[20]], SHORT, seed=0)
    assert server.handed == STEPS.steps + 2, "it may have been started anew at the same place"


def test_all_processes_hand_over_what_one_of_them_changed(
    policy: Policy, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else some would wait for the others forever."""
    sampler = VLLMServerSampler(policy, server.url)
    sampler.sample([[20]], SHORT, seed=0)
    monkeypatch.setattr("rlzoo.rollout.vllm.gathered", lambda value: [value, False])
    sampler.sample([[20]], SHORT, seed=0)
    assert server.handed == 2


def test_policies_take_turns_at_one_server(make_policy: MakePolicy, server: Server) -> None:
    policies = [make_policy("llama", dtype=torch.float32, seed=seed) for seed in (0, 1)]
    samplers = [VLLMServerSampler(policy, server.url) for policy in policies]
    for turn in range(4):
        samplers[turn % 2].sample([[20]], SHORT, seed=0)
        assert server.holds(policies[turn % 2])
    assert server.handed == 4
    samplers[1].sample([[20]], SHORT, seed=0)
    assert server.handed == 4


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"workers": 2}, {"workers": 1, "executor": "ray"}, {"executor": "ray"}])
def test_cells_do_not_share_a_server(how: dict[str, Any]) -> None:
    """Each would sample with the weights that another handed over last."""
    evaluation = {"evaluation.engine": "vllm", "evaluation.url": "http://127.0.0.1:9"}
    rollouts = {"rollouts.engine": "vllm", "rollouts.url": "http://127.0.0.1:9"}
    grpo = {"algorithms": {"grpo": {"mode": "online"}, "sft": {}}}
    for changes in (evaluation, {**rollouts, **grpo}):
        with pytest.raises(UserError, match=r"one policy's weights at a time.*--workers 1"):
            compare(load_experiment("arithmetic", changes), **how)
        assert workers_at(load_experiment("arithmetic", changes), None, "local") == 1
    offline = load_experiment("arithmetic", {**rollouts, "algorithms": {"grpo": {}, "sft": {}}})
    assert workers_at(offline, 4, "ray") == 4, "only the base fills the buffer"


def test_a_server_that_refused_weights_is_asked_again(policy: Policy, server: Server) -> None:
    sampler = VLLMServerSampler(policy, server.url)
    server.refuses = True
    with pytest.raises(UserError, match=r"answered 500 to /collective_rpc: \{\}"):
        sampler.sample([[20]], SHORT, seed=0)
    server.refuses = False
    sampler.sample([[20]], SHORT, seed=0)
    assert server.holds(policy)
