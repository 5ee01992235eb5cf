"""A process of a sharded model that runs out of memory: all processes restart with smaller micro-batches."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from comparisons import settle_threads
from safetensors.torch import load_file
from test_ranks import FSDP
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from rlzoo.cli import main
from rlzoo.config import Sampling
from rlzoo.errors import UserError
from rlzoo.jobs import restarts
from rlzoo.policy import Policy, load_policy, log_probs
from rlzoo.policy.defaults import token_budget_of
from rlzoo.rollout import TransformersSampler

HUNGRY = """
import os
from dataclasses import dataclass
from typing import ClassVar
import torch
from rlzoo import Coefficients, Objective, register

@register
@dataclass(frozen=True)
class Hungry(Objective):
    name: ClassVar[str] = "hungry"

    def coefficients(self, batch):
        if os.environ.get("RANK") == "1" and len(batch.mask) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")  # between forward and backward pass
        return Coefficients(torch.ones_like(batch.logp))
"""


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The store of a launcher of two processes, of which this is the second one."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "RANK": "1", "WORLD_SIZE": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return store


class Replaced(BaseException):
    """In place of the end of this process."""


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> queue.Queue[dict[str, int]]:
    """What new processes are told."""
    found = queue.Queue[dict[str, int]]()

    def execute(limits: bytes) -> None:
        found.put(json.loads(limits))
        if threading.current_thread() is threading.main_thread():
            raise Replaced

    monkeypatch.setattr(restarts, "SECONDS", 0.01)
    monkeypatch.setattr(restarts, "_execute", execute)
    return found


@pytest.mark.usefixtures("launcher")
def test_the_first_message_restarts_every_process(executed: queue.Queue[dict[str, int]]) -> None:
    """Whether a process fails itself, waits for the one that does, or loses the connection to it."""
    with pytest.raises(Replaced), restarts.restarting():
        assert restarts.can_restart()
        restarts.restart_with("tokens", 24)
    assert executed.get() == {"tokens": 24, "restarts": 1} and not restarts.can_restart()
    with restarts.restarting():
        assert executed.get(timeout=60) == {"tokens": 24, "restarts": 1}, "while it waits for another one"
    with pytest.raises(Replaced), restarts.restarting():
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(Replaced), restarts.restarting():
        restarts.restart_with("tokens", 7)
    while not executed.empty():
        assert executed.get() == {"tokens": 24, "restarts": 1}


@pytest.mark.usefixtures("launcher")
def test_after_a_restart_messages_are_new_and_limits_add_up(
    executed: queue.Queue[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Replaced), restarts.restarting():
        restarts.restart_with("tokens", 24)
    monkeypatch.setenv(restarts.VARIABLE, json.dumps(executed.get()))
    with pytest.raises(RuntimeError, match="of its own"), restarts.restarting():
        raise RuntimeError("of its own")
    with pytest.raises(Replaced), restarts.restarting():
        restarts.restart_with("sequences", 3)
    assert executed.get() == {"tokens": 24, "sequences": 3, "restarts": 2}


def test_without_a_store_nothing_restarts() -> None:
    with restarts.restarting():
        assert not restarts.can_restart()
        restarts.restart_with("tokens", 24)


def test_limits_hold_for_scoring_and_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy("embedded", device="cpu")
    monkeypatch.setenv(restarts.VARIABLE, json.dumps({"tokens": 24, "sequences": 3, "restarts": 2}))
    assert [token_budget_of(policy, asked) for asked in (48, 16, "auto")] == [24, 16, 24]
    sampler, sizes = TransformersSampler(policy), []
    assert sampler.decoder is not None
    decode = sampler.decoder.decode

    def noted(prompts: Any, copies: int, *rest: Any) -> Any:
        sizes.append(len(prompts) * copies)
        return decode(prompts, copies, *rest)

    monkeypatch.setattr(sampler.decoder, "decode", noted)
    sampler.sample([[5, 6]] * 5, Sampling(batch_size=4, max_new_tokens=2), seed=0)
    assert max(sizes) == 3


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("what", ["tokens", "sequences"])
def test_scoring_and_sampling_with_shards_restart(
    what: str, executed: queue.Queue[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy("embedded", device="cpu")
    policy.model.base_model.norm.weight.full_tensor = None  # looks like a shard
    monkeypatch.setattr(Policy, "hidden", out_of_memory)
    monkeypatch.setattr("rlzoo.rollout.decoding.Decoder._next_logits", out_of_memory)

    def work() -> None:
        if what == "tokens":
            log_probs(policy, [([5, 6], [7, 8])] * 8, token_budget=20)
        else:
            how = Sampling(samples=2, batch_size=6, max_new_tokens=2)
            TransformersSampler(policy).sample([[5, 6]] * 8, how, seed=0)

    with pytest.raises(Replaced), restarts.restarting():
        work()
    assert executed.get() == {what: {"tokens": 10, "sequences": 3}[what], "restarts": 1}
    with pytest.raises(UserError, match=r"out of memory .* in one process of a sharded model, .*: lower "):
        work()


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.slow
def test_sharded_training_out_of_memory_goes_on_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that a launcher started stay, and end with the weights of one process that had enough memory."""
    if sys.platform != "linux":
        pytest.skip("copies this process")
    (tmp_path / "hungry.py").write_text(HUNGRY)
    rows = [{"prompt": f"What is {i} + {i}?", "completion": f" {2 * i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    command = ["train", "hungry.py:Hungry", "--buffer", "rows.jsonl", "--steps", "2", "--batch-size", "8"]
    command += ["--set", "training.token_budget=40", "--out"]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def one(rank: int) -> None:
        settle_threads()
        AcceleratorState._reset_state(reset_partial_state=True)  # earlier tests of this process were alone in it
        os.environ |= {**FSDP, "TORCHELASTIC_USE_AGENT_STORE": "True", "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "OMP_NUM_THREADS": "1"}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        torch.cuda.is_available = lambda: False
        sys.orig_argv = [sys.executable, "-m", "rlzoo", *command, "two"]
        os._exit(main([*command, "two"]) or 99)  # it is another process that ends well

    started = [multiprocessing.get_context("fork").Process(target=one, args=(rank,), daemon=True) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(900)
    assert [process.exitcode for process in started] == [0, 0]
    assert main([*command, "one"]) == 0
    one_weights, two_weights = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, value in one_weights.items():
        torch.testing.assert_close(two_weights[key], value, rtol=1e-4, atol=1e-5)
    told = json.loads((tmp_path / "two" / "training.json").read_text())
    (event,) = told["events"]
    assert event.startswith("step 1: out of memory with 40 tokens per micro-batch, now ")
    assert told["resolved"]["token_budget"] == int(event.rpartition(" ")[2])
