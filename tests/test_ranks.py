"""Several processes train as one does: the same gradients, the same weights, groups and pairs never split."""

from __future__ import annotations

import collections
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
import ranks_worker
import sampling_worker
import torch
from accelerate.state import AcceleratorState
from comparisons import settle_threads
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlzoo.cli import main
from rlzoo.jobs import ranks
from rlzoo.jobs.cached_results import CachedResults
from rlzoo.jobs.runs import run_in
from rlzoo.policy import MicroBatches, load_policy
from rlzoo.types import Trajectory

WORKER = Path(__file__).with_name("ranks_worker.py")
OBJECTIVES = (
    "iw-sft-ema", "dpo", "ppo", "kto", "ppo+sft",
    "asft", "otb", "dft-control",  # a reference that gives logits, a statistic of a snapshot, the whole batch at once
    "iw-sft-ema-lora", "kto-lora", "dft-packed", "grpo-budget",
)  # fmt: skip
DDP: Mapping[str, str] = {}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def copies(run: Callable[[int], Any], processes: int) -> list[Any]:
    """What so many copies of this process find, each told what a launcher tells it; None of those that failed."""
    if sys.platform != "linux":
        pytest.skip("copies this process")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(number: int, told: Any) -> None:
        settle_threads()
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        torch.cuda.is_available = lambda: False
        AcceleratorState._reset_state(reset_partial_state=True)  # what the process that this is a copy of was
        told.send(run(number))

    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(False) for _ in range(processes)]
    started = [context.Process(target=one, args=(i, told), daemon=True) for i, (_, told) in enumerate(pipes)]
    for process in started:
        process.start()
    running, until = {process.sentinel: process for process in started}, time.monotonic() + 900
    while running and (ended := connection.wait([*running], max(0.0, until - time.monotonic()))):
        for sentinel in ended:
            running.pop(int(sentinel)).join()  # type: ignore[arg-type]
        if any(process.exitcode for process in started):
            break  # the others would wait for it
    for process in started:
        process.kill()
    return [heard.recv() if heard.poll() else None for heard, _ in pipes]


def launch(
    arguments: list[str], processes: int, folder: Path, extra: Mapping[str, str] = DDP, fails: bool = False
) -> str:
    """Run a command as so many processes, as `accelerate launch` does, and see that all end well, or one ``fails``.

    Returns the errors of those that failed.
    """

    def command(number: int) -> str:
        os.environ |= extra
        os.chdir(folder)
        run, sys.argv = (runpy.run_module, arguments[1:]) if arguments[0] == "-m" else (runpy.run_path, arguments)
        try:
            run(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, stop.code
        except Exception as error:
            if not fails:
                raise
            return f"{type(error).__name__}: {error}"
        return "well"

    found = copies(command, processes)
    assert (found != ["well"] * processes) == fails, found
    return "\n".join(told for told in found if told not in ("well", None))


@pytest.fixture(scope="module", autouse=True)
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Iterator[None]:
    """A model with tied weights whose training is cheap: what several processes do is what takes time."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        tie_word_embeddings=True, initializer_range=0.3, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RANKS_MODEL", str(folder))
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process finds."""
    folder = tmp_path_factory.mktemp("alone")
    for name in OBJECTIVES:
        ranks_worker.run(folder, name)
    return found_in(folder)


def found_in(folder: Path, objectives: Sequence[str] = OBJECTIVES) -> dict[str, Any]:
    return {
        name: (load_file(folder / name / "model.safetensors"), json.loads((folder / f"{name}.json").read_text()))
        for name in objectives
    }


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """What three processes with whole models find, or two with shards."""

    @cache
    def found(kind: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(kind)
        if kind == "fsdp":
            launch([str(WORKER), str(folder), *OBJECTIVES], 2, folder, FSDP)
        else:
            launch([str(WORKER), str(folder), *OBJECTIVES, "kto-hungry"], 3, folder)
        return found_in(folder, [*OBJECTIVES, "kto-hungry"] if kind == "ddp" else OBJECTIVES)

    return found


def check_same(found: tuple[dict[str, Any], dict[str, Any]], expected: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """The same weights, metrics of steps and costs, up to rounding."""
    (weights, told), (weights_alone, told_alone) = found, expected
    assert weights.keys() == weights_alone.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, weights_alone[key], rtol=1e-6, atol=1e-9, msg=key)
    for row, row_alone in zip(told["steps"], told_alone["steps"], strict=True):
        assert row == pytest.approx(row_alone, rel=1e-6, abs=1e-9)
    for cost in ("gradient_tokens", "flops"):
        assert told["costs"][cost] == pytest.approx(told_alone["costs"][cost], rel=1e-12)


@pytest.mark.slow
def test_a_stopped_run_goes_on_in_other_processes(
    alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optimizer, moving reference, critic and adapters are whole in a checkpoint of two, of two shards, or of one."""
    objectives = ("iw-sft-ema-lora", "ppo")
    monkeypatch.setenv("RANKS_CHECKPOINTS", str(tmp_path / "checkpoints"))
    for stop, extra in (("2", DDP), ("3", FSDP)):
        launch([str(WORKER), str(tmp_path), *objectives], 2, tmp_path, {"RANKS_STOP": stop, **extra})
        for name in objectives:
            assert (tmp_path / "checkpoints" / name / f"step-{int(stop) - 1:08d}.result").is_file()
    for name in objectives:
        ranks_worker.run(tmp_path, name)
    for name, found in found_in(tmp_path, objectives).items():
        assert found[1]["started"] == 2 and [row["step"] for row in found[1]["steps"]] == [1, 2, 3]
        check_same(found, alone[name])


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_shards_to_the_same_bits(
    several: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """A damaged checkpoint gives way to the one before, and the oldest are removed."""
    folder = tmp_path / "checkpoints" / "ppo"
    command, where = [str(WORKER), str(tmp_path), "ppo"], {"RANKS_CHECKPOINTS": str(folder.parent), **FSDP}
    launch(command, 2, tmp_path, {**where, "RANKS_KILL": "3"}, fails=True)
    shards = [folder / "step-00000002" / f"__{number}_0.distcp" for number in (0, 1)]
    assert all(shard.stat().st_size > 0.3 * sum(s.stat().st_size for s in shards) for shard in shards)
    content = bytearray(shards[1].read_bytes())
    content[len(content) // 2] ^= 1
    shards[1].write_bytes(content)
    launch(command, 2, tmp_path, where)
    (weights, told), (expected, told_whole) = found_in(tmp_path, ["ppo"])["ppo"], several("fsdp")["ppo"]
    assert told["started"] == 1 and told["steps"] == told_whole["steps"]
    assert all(torch.equal(value, expected[key]) for key, value in weights.items())
    assert sorted(path.stem for path in folder.glob("step-*.result")) == ["step-00000002", "step-00000003"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["step-00000002", "step-00000003"]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kind"), [(3, "ddp"), (2, "fsdp")])
def test_processes_train_as_one(
    processes: int, kind: str, alone: dict[str, Any], several: Callable[[str], dict[str, Any]]
) -> None:
    found = several(kind)
    for name in OBJECTIVES:
        check_same(found[name], alone[name])
        told, told_alone = found[name][1], alone[name][1]
        assert told["sampled"] == told_alone["sampled"]
        assert name != "asft" or told["steps"][2]["logit_term"] > 0
        assert told["ranks"] == processes and told["sharded"] == (kind == "fsdp")
        first, second, third, sampled = told["versions"]
        assert first < second < third <= sampled
        assert sampled == third or told["sharded"], "sampling changes no weight, though shards come and go"
        for row, row_alone in zip(told["scored"], told_alone["scored"], strict=True):
            assert row == pytest.approx(row_alone, rel=1e-6, abs=1e-9)


@pytest.mark.slow
def test_compiled_layers_of_a_sharded_model_and_its_critic_train_as_plain_ones(
    alone: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, but without kernels of their own, which take long to make."""
    monkeypatch.setattr("rlzoo.policy.compiled.BACKEND", "eager")
    launch([str(WORKER), str(tmp_path), "ppo-compiled"], 2, tmp_path, FSDP)
    found = found_in(tmp_path, ["ppo-compiled"])["ppo-compiled"]
    check_same(found, alone["ppo"])
    assert found[1]["sharded"] and found[1]["compiled"] and not alone["ppo"][1]["compiled"]


@pytest.mark.slow
def test_all_processes_halve_their_work_where_the_memory_of_one_runs_out(
    alone: dict[str, Any], several: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """Those of a sharded model wait for each other in the middle of it, and can only stop."""
    found = several("ddp")["kto-hungry"]
    check_same(found, alone["kto"])
    assert found[1]["budget"] < ranks_worker.ROOM
    assert found[1]["events"][0] == f"step 1: out of memory with 48 tokens per micro-batch, now {48 // 2}"
    command, kept = [str(WORKER), str(tmp_path), "kto-hungry"], {"RANKS_CHECKPOINTS": str(tmp_path / "checkpoints")}
    told = launch(command, 2, tmp_path, FSDP, fails=True)
    assert re.search(
        r"^UserError: out of memory with 48 tokens .* sharded model.*: lower training.token_budget", told, re.M
    )
    told = launch(command, 2, tmp_path, {**FSDP, **kept}, fails=True)
    assert re.search(
        r"^TryAgainError: step 1: out of memory with 48 tokens .*, now 24; .*resume with the same command", told, re.M
    )
    launch(command, 2, tmp_path, {**FSDP, **kept})
    (restarted,) = found_in(tmp_path, ["kto-hungry"]).values()
    check_same(restarted, alone["kto"])
    assert restarted[1]["budget"] == 24


STOPPED = """
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
import torch
from rlzoo import Coefficients, Objective, register

@register
@dataclass(frozen=True)
class Stopped(Objective):
    name: ClassVar[str] = "stopped-NUMBER"

    def coefficients(self, batch):
        signals = Path("signals")
        if os.environ.get("RANK") == "1" and signals.exists():
            for number in signals.read_text().split():
                os.kill(os.getpid(), int(number))
            signals.unlink()
        return Coefficients(torch.ones_like(batch.logp))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("hears_interrupts")
@pytest.mark.parametrize(
    ("number", "status", "extra"), [(signal.SIGTERM, 143, FSDP), (signal.SIGINT, 130, DDP)], ids=["sharded", "whole"]
)
def test_a_signal_to_one_process_ends_all_after_a_checkpoint(
    number: int, status: int, extra: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """It comes twice, as from a terminal or a scheduler and then from the launcher."""
    (tmp_path / "stopped.py").write_text(STOPPED.replace("NUMBER", str(status)))
    (tmp_path / "signals").write_text(f"{number:d} {number:d}")
    rows = [{"prompt": f"What is {i} + {i}?", "completion": f" {2 * i}"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["train", "stopped.py:Stopped", "--buffer", "rows.jsonl", "--steps", "3", "--batch-size", "8"]
    command += ["--out", "out"]
    monkeypatch.chdir(tmp_path)

    def run(rank: int) -> int:
        os.environ |= extra
        return main(command)

    assert copies(run, 2) == [status, status]
    told = capfd.readouterr().err
    assert told.count("rlzoo: ") == 1
    assert "rlzoo: interrupted; finished work is kept: the same command with --out out resumes there" in told
    assert any(tmp_path.rglob("step-00000001.result"))
    assert main(command) == 0
    assert [row["step"] for row in json.loads((tmp_path / "out" / "training.json").read_text())["steps"]] == [1, 2, 3]
    assert "step 1/3" not in capfd.readouterr().out


def one_of_several(number: int, folder: Path) -> dict[str, Any]:
    """What a process that a launcher starts is told, by itself and by the others."""
    found: dict[str, Any] = {}

    def squares(places: list[int]) -> list[int]:
        found["worked"] = places
        return [place**2 for place in places]

    with ranks.joined():
        found["who"] = (ranks.rank(), ranks.world_size(), ranks.is_main())
        found["squares"] = ranks.shared("abcdefg", squares)
        found["agreed"], found["gathered"] = ranks.agreed(10 * number), ranks.gathered(10 * number)
        found["summed"] = ranks.summed(torch.tensor([1.0, number])).tolist()
        with run_in(folder / "out", "train", {}) as run:
            found["run"], found["claims"] = run.resumed, (run.state / "lock").exists()
            if number == 0:  # the others have waited for what the main one found
                time.sleep(0.3)
                CachedResults(run.state).write("late", 1)
            ranks.barrier()
            found["after a barrier"] = CachedResults(folder / "out" / ".state").read("late")
            found["once"] = CachedResults(folder / "out" / ".state").once("it", lambda: number)
        ranks.barrier()
        with run_in(folder / "out", "train", {}) as run:
            found["finished"] = run.finished
    found["left"] = not torch.distributed.is_initialized()
    return found


@pytest.mark.slow
def test_what_the_processes_of_a_run_tell_each_other(tmp_path: Path) -> None:
    for number, own in enumerate(copies(lambda number: one_of_several(number, tmp_path), 3)):
        assert own == {
            "who": (number, 3, number == 0),
            "squares": [0, 1, 4, 9, 16, 25, 36],
            "worked": [*range(number, 7, 3)],
            "agreed": 0,
            "gathered": [0, 10, 20],
            "summed": [3.0, 3.0],
            "run": False,
            "claims": True,
            "after a barrier": 1,
            "once": 0,
            "finished": True,
            "left": True,
        }


def test_alone_a_process_is_all_of_them() -> None:
    value = torch.tensor([1.0])
    assert (ranks.rank(), ranks.world_size(), ranks.is_main()) == (0, 1, True)
    assert ranks.agreed(3) == 3 and ranks.gathered(3) == [3] and ranks.summed(value) is value
    assert ranks.shared("ab", lambda places: places) == [0, 1]
    ranks.barrier()


def test_units_stay_whole_in_every_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [Trajectory("", "", [5] * (1 + i % 3), [6 + i % 5] * (1 + 3 * (i % 4)), str(i // 2)) for i in range(14)]
    micro = MicroBatches(16)
    pairs = [(i, i + 1) for i in range(0, 14, 2)]
    for world in (2, 3, 5):
        seen: list[int] = []
        rounds = set()
        for number in range(world):
            monkeypatch.setattr("rlzoo.policy.microbatches.world_size", lambda world=world: world)
            monkeypatch.setattr("rlzoo.policy.microbatches.rank", lambda number=number: number)
            mine = micro.share(rows, pairs)
            rounds.add(len(mine))
            for index, counts in mine:
                assert {i + 1 - 2 * (i % 2) for i in index} == set(index)
                seen += index if counts else []
        assert sorted(seen) == list(range(14)) and len(rounds) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_command_line_under_a_launcher(tmp_path: Path) -> None:
    """A model that two processes trained is that of one process, and opens in one."""
    model = ["--model", os.environ["RANKS_MODEL"]]
    sample = ["rollout", "facts", *model, "--limit", "6", "--set", "rollouts.samples=4"]
    main([*sample, "--set", "rollouts.max_new_tokens=8", "--out", str(tmp_path / "buffer")])
    train = ["train", "rft", *model, "--steps", "2", "--set", "batch_size=6", "--option", "threshold=0", "--buffer"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "rlzoo", *train, "buffer", "--out", "two"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert main([*train, str(tmp_path / "buffer"), "--out", str(tmp_path / "one")]) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    before = load_file(Path(os.environ["RANKS_MODEL"]) / "model.safetensors")
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-5)
        assert not torch.equal(one[key], before[key])
    load_policy(str(tmp_path / "two"))
    small = [*model, "--algorithms", "rft", "--seeds", "0", "--steps", "2", "--limit", "4", "--samples", "2"]
    small += ["--batch-size", "8", "--set", "warm_up={objective: sft, training: {steps: 2}}"]
    for change in (
        "evaluation.max_new_tokens=8", "rollouts.max_new_tokens=8", "algorithms.rft.options.threshold=0",
        "retention={}", "benchmarks={facts: {source: world:facts/test, limit: 4}}",
    ):  # fmt: skip
        small += ["--set", change]
    for out, extra in (("compared", DDP), ("sharded", FSDP)):
        launch(["-m", "rlzoo", "compare", "facts", *small, "--out", out], 2, tmp_path, extra)
    assert main(["compare", "facts", *small, "--out", str(tmp_path / "compared-by-one")]) == 0
    theirs, *others = (
        json.loads((tmp_path / name / "results.json").read_text())
        for name in ("compared-by-one", "compared", "sharded")
    )
    for ours in others:
        assert ours["buffer"] == theirs["buffer"] and ours["failed"] == []
        for a, b in zip(ours["cells"], theirs["cells"], strict=True):
            assert list(a["metrics"]) == list(b["metrics"])
            for name, scores in a["metrics"].items():  # all but the log-likelihood count samples
                assert scores == pytest.approx(b["metrics"][name], rel=1e-4)


REWARD = """
import os, pathlib
def told(prompts, completions, **columns):
    with pathlib.Path(__file__).with_suffix(f".{os.environ.get('RANK')}").open("a") as file:
        file.writelines(f"{prompt!r}|{text!r}\\n" for prompt, text in zip(prompts, completions))
    return [float(sum(map(ord, text)) % 7) for text in completions]
"""


ENGINES = ("transformers", "vllm", "tensor")


@pytest.fixture(scope="module")
def sampled_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process samples and scores."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "reward.py").write_text(REWARD)
    for engine in ENGINES:
        sampling_worker.run(folder, engine)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_sample_and_evaluate_as_one(kind: str, sampled_alone: Path, tmp_path: Path) -> None:
    """Each samples its share, has it scored, and knows all of it; an engine is one's own, or two share it."""
    (tmp_path / "reward.py").write_text(REWARD)
    worker = [str(WORKER.with_name("sampling_worker.py")), str(tmp_path), *ENGINES]
    launch(worker, 2, tmp_path, FSDP if kind == "fsdp" else DDP)
    places = (sampled_alone / "reward.None", tmp_path / "reward.0", tmp_path / "reward.1")
    scored = [collections.Counter(place.read_text().splitlines()) for place in places]
    assert scored[1] + scored[2] == scored[0] and not scored[1].keys() & scored[2].keys()
    assert min(map(len, scored[1:])) > len(scored[0]) / 3
    for engine in ENGINES:
        alone = json.loads((sampled_alone / f"{engine}-0.json").read_text())
        both = [json.loads((tmp_path / f"{engine}-{number}.json").read_text()) for number in range(2)]
        for found in both:
            assert found["ranks"] == 2 and found["after a step"] == alone["after a step"]
            assert alone["after a step"] != [row["completion_ids"] for row in alone["None"]["rows"]]
            for limit in ("60.0", "None") if engine == "transformers" else ("None",):
                assert close(found[limit], alone[limit]), engine
        if engine == "transformers":
            passes, sequences = ([found["decoded"][what] for found in both] for what in ("passes", "sequences"))
            assert sum(sequences) == alone["decoded"]["sequences"] and min(sequences) > max(sequences) / 2
            assert (passes[0] == passes[1]) == (kind == "fsdp"), "a sharded model's processes run in step"
        if engine != "transformers":
            first, second = (sorted(found["engine"]["prompts"]) for found in both)
            every = sorted(alone["engine"]["prompts"])
            assert first == second == every if engine == "tensor" else sorted(first + second) == every != first
            assert both[0]["engine"]["calls"] == both[1]["engine"]["calls"]
            assert {found["options"]["distributed_executor_backend"] for found in both} == {"external_launcher"}


def close(one: Any, other: Any) -> bool:
    """Whether plain data are equal up to rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return bool(one == (pytest.approx(other, rel=1e-6, abs=1e-9) if isinstance(one, float) else other))
