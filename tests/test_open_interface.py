"""What nobody thought of is a file of its own: plug-ins outside the package, which need no change to it.

Each objective passes the contract, trains, resumes bit for bit after kill -9, and has its gradients' noise measured.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from comparisons import inline_pool, small

from rlzoo.buffers import OfflineBuffer
from rlzoo.comparison import runner, work
from rlzoo.config import Training
from rlzoo.errors import UserError
from rlzoo.evaluation import evaluation
from rlzoo.objective import get_objective
from rlzoo.policy import Policy, load_policy, score_rows
from rlzoo.policy.loading import save_policy
from rlzoo.testing import check_objective
from rlzoo.training import Trainer, TrainingRecord, train
from rlzoo.types import TokenBatch, Trajectory
from rlzoo.variance import analyze_variance

PLUGINS = Path(__file__).parent / "plugins"
OBJECTIVES = {
    "distillation": "OnPolicyDistillation",
    "token_rewards": "TokenRewards",
    "own_head": "WithHead",
    "whole_only": "WholeOnly",
}
SETTINGS = Training(steps=4, batch_size=4, learning_rate=1e-3, checkpoint_seconds=0.0)
KILLED_AT = 2
over_objectives = pytest.mark.parametrize("plugin", OBJECTIVES)


def spec(plugin: str) -> str:
    return f"{PLUGINS / plugin}.py:{OBJECTIVES[plugin]}"


def options(plugin: str, teacher: Path) -> dict[str, Any]:
    return {"teacher": str(teacher)} if plugin == "distillation" else {}


def buffer_of(policy: Policy) -> OfflineBuffer:
    """Demonstrations and samples, some of which are truncated, with a number for each token in a column."""
    rows = []
    for i in range(8):
        text = f"{i + 1}+{i + 2}=?\n", f"{i + 1}+{i + 2}={2 * i + 3} #### {2 * i + 3}"
        prompt, completion = (policy.tokenizer(part, add_special_tokens=False)["input_ids"] for part in text)
        (logp,) = score_rows(policy, [(prompt, completion)])
        columns: dict[str, object] = {"token_reward": [0.1 * (t % 3) for t in range(len(completion))]}
        row = Trajectory(*text, prompt, completion, str(i), source="policy", reward=1.0, columns=columns)
        rows += [replace(row, behaviour_logp=logp, truncated=i % 3 == 0), replace(row, source="demonstration")]
    return OfflineBuffer.from_trajectories(rows)


def run(plugin: str, folder: Path, checkpoints: Path | None, kill: bool = False) -> tuple[Policy, TrainingRecord]:
    """Train the embedded model with a plug-in; if asked to, die in the middle."""
    policy = load_policy("embedded")

    def die(trainer: Trainer, step: int) -> None:
        if kill and step == KILLED_AT + 1:
            signal.raise_signal(signal.SIGKILL)

    objective = get_objective(spec(plugin), **options(plugin, folder / "teacher"))
    record = train(policy, objective, buffer_of(policy), SETTINGS, callbacks=[die], checkpoints=checkpoints)
    return policy, record


def teacher_in(folder: Path) -> None:
    teacher = load_policy("embedded")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    save_policy(teacher, folder / "teacher")


@over_objectives
def test_a_plugin_resumes_bit_for_bit_after_kill_9(plugin: str, tmp_path: Path) -> None:
    teacher_in(tmp_path)
    died = subprocess.run([sys.executable, __file__, plugin, str(tmp_path)], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert list((tmp_path / "checkpoints").glob(f"step-*{KILLED_AT}.piece")), "it was stopped after a checkpoint"
    whole, record = run(plugin, tmp_path, None)
    resumed, rest = run(plugin, tmp_path, tmp_path / "checkpoints")
    assert rest.plain_steps() == record.plain_steps() and len(record.steps) == SETTINGS.steps
    assert record.steps[0]["gradient_norm"] > 0
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@over_objectives
def test_a_plugin_works_in_the_analyzer(plugin: str, tmp_path: Path) -> None:
    teacher_in(tmp_path)
    policy = load_policy("embedded")
    objective = get_objective(spec(plugin), **options(plugin, tmp_path / "teacher"))
    found = analyze_variance(policy, {"it": objective, "sft": get_objective("sft")}, buffer_of(policy), draws=0)
    noise = found["objectives"]["it"]["data_noise"]
    assert noise["trace_cov"]["value"] > 0 and not found["skipped"]
    assert not policy.attached, "the analyzer leaves the policy as it was"


def loss_of_token_rewards(batch: TokenBatch) -> torch.Tensor:
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for logp, reward, mask in zip(batch.logp, batch["token_reward"], batch.mask, strict=True):
        rewards = reward[mask]
        for t, one in enumerate(logp[mask]):
            total = total - rewards[t:].sum() * one
            tokens += 1
    return total / tokens


@pytest.mark.parametrize("plugin", ["token_rewards", "own_head", "whole_only"])
def test_a_plugin_passes_the_contract(plugin: str) -> None:
    losses: Mapping[str, Any] = {"token_rewards": loss_of_token_rewards}
    check_objective(spec(plugin), losses.get(plugin))


def test_a_head_of_ones_own_learns(tmp_path: Path) -> None:
    policy, _ = run("own_head", tmp_path, None)
    assert policy.get_parameter("modules_of_inputs.confidence.weight").grad is not None
    assert not policy.frozen_copy().attached


def compared(out: Path, kill: bool = False) -> dict[str, Any]:
    """Two objectives on two benchmarks, with a metric of a plug-in; if asked to, die in the last evaluation."""
    metrics = [f"{PLUGINS / 'distinct.py'}:distinct"]
    settings = {"samples": 3, "k": [2, 3], "max_new_tokens": 8, "curve_points": 0, "metrics": metrics}
    benchmarks = {"a": {"source": "world:facts/test", "limit": 4}, "b": {"source": "world:facts/unseen", "limit": 3}}
    calls, real = list[int](), evaluation.evaluate

    def evaluate(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if kill and len(calls) == 6:
            signal.raise_signal(signal.SIGKILL)
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "pool", inline_pool)
        patch.setattr(work, "evaluate", evaluate)
        return runner.compare(small({"sft": {}, "dft": {}}, evaluation=settings, benchmarks=benchmarks), out, 1)


def test_a_plugins_metric_is_reported_after_kill_9(tmp_path: Path) -> None:
    command = [sys.executable, __file__, "distinct", str(tmp_path / "out")]
    died = subprocess.run(command, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    found, whole = compared(tmp_path / "out"), compared(tmp_path / "whole")
    assert [cell["metrics"] for cell in found["cells"]] == [cell["metrics"] for cell in whole["cells"]]
    assert found["mean_over_benchmarks"] == whole["mean_over_benchmarks"] and found["base"] == whole["base"]
    texts: dict[tuple[str, str, str], set[str]] = {}
    for row in pq.read_table(tmp_path / "out" / "outcomes.parquet").to_pylist():
        if row["decoding"] == "sample":
            texts.setdefault((row["algorithm"], row["benchmark"], row["problem_id"]), set()).add(row["text"])
    shares = {
        name: {
            benchmark: mean(len(some) / 3 for (a, b, _), some in texts.items() if (a, b) == (name, benchmark))
            for benchmark in ("a", "b")
        }
        for name in ("base", "sft", "dft")
    }
    assert {name: of["distinct"] for name, of in found["base"].items()} == pytest.approx(shares["base"])
    report = (tmp_path / "out" / "report.md").read_text()
    further = report[report.index("## Further metrics") :]
    assert further.count("distinct answers (%)") == 3
    for cell in found["cells"]:
        own = shares[cell["algorithm"]]
        assert {name: of["distinct"] for name, of in cell["metrics"].items()} == pytest.approx(own)
        assert found["mean_over_benchmarks"][cell["algorithm"]]["distinct"] == pytest.approx(mean(own.values()))
        for value in (*own.values(), mean(own.values())):
            assert f" {100 * value:.1f} |" in further
    assert found["metrics"]["pass_at_3"] == {"label": "pass@3", "unit": "%"} and "pass@3" in further


def test_asking_for_what_was_not_listed_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\n\n"
        "from rlzoo import Coefficients, Objective\n\n\n"
        "@dataclass(frozen=True)\nclass Greedy(Objective):\n    name: ClassVar[str] = 'greedy'\n\n"
        "    def coefficients(self, batch):\n        return Coefficients(batch.logp - batch.reference_logp)\n"
    )
    policy = load_policy("embedded")
    objective = get_objective(f"{tmp_path / 'greedy.py'}:Greedy")
    with pytest.raises(UserError, match=r"the batch has no 'reference_logp'.* its requires lists"):
        train(policy, objective, buffer_of(policy), SETTINGS)
    with pytest.raises(UserError, match="the batch has no 'reference_logp'"):
        analyze_variance(policy, [objective], buffer_of(policy), draws=0)
    with pytest.raises(AssertionError, match="has no 'reference_logp'"):
        check_objective(objective)


def test_no_plugin_is_longer_than_forty_lines() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in PLUGINS.glob("*.py")}
    assert len(lengths) >= 4 and max(lengths.values()) <= 40, lengths


if __name__ == "__main__":
    if sys.argv[1] == "distinct":
        compared(Path(sys.argv[2]), kill=True)
    run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[2]) / "checkpoints", kill=True)
