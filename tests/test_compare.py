"""A comparison from end to end, on a small cut of the embedded worlds."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from comparisons import SMALL_OPTIONS, inline_pool, small
from rich.console import Console

from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.problems import load_problems
from rlzoo.cli import main
from rlzoo.comparison import one_cell, resolve, runner, shared_buffer
from rlzoo.comparison.plan import Cell
from rlzoo.comparison.report import tables, write_report
from rlzoo.comparison.report.schema import parse_results
from rlzoo.comparison.reuse import origins, reusable
from rlzoo.comparison.studies import save_study
from rlzoo.config import Experiment, ProblemSource, load_experiment
from rlzoo.errors import UserError
from rlzoo.evaluation import evaluate
from rlzoo.jobs.pool import InThisProcess, OutOfMemoryError, WorkerDiedError, WorkError
from rlzoo.jobs.runs import run_in
from rlzoo.policy import load_policy
from rlzoo.rollout import rollouts
from rlzoo.types import Selection

pytestmark = pytest.mark.usefixtures("sketched")

Compare = Callable[..., dict[str, Any]]
MINE = """
import rlzoo, torch

class Mine(rlzoo.Objective):
    name = "mine"

    def coefficients(self, batch):
        return rlzoo.Coefficients(torch.ones_like(batch.logp))
"""
TIMES = ("wall_seconds", "peak_memory_bytes")


def quietly(experiment: Experiment, out: Path, workers: int = 1, reuse: Path | None = None) -> dict[str, Any]:
    return runner.compare(experiment, out, workers, console=Console(file=io.StringIO()), reuse=reuse)


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    """What two runs of one experiment must agree in: all but when, how long and in how much memory."""
    found: dict[str, Any] = untimed(results)
    found.pop("created", None)
    return found


def untimed(part: Any) -> Any:
    """Plain data without times and peaks of memory."""
    if isinstance(part, dict):
        return {name: untimed(value) for name, value in part.items() if name not in (*TIMES, "seconds")}
    return [untimed(one) for one in part] if isinstance(part, list) else part


def outcomes(out: Path) -> pa.Table:
    return pq.read_table(out / "outcomes.parquet")


@pytest.mark.slow
@pytest.mark.usefixtures("inline")
def test_results_hold_what_the_contract_says(tmp_path: Path) -> None:
    out, started = tmp_path / "out", time.perf_counter()
    returned = quietly(small({"sft": {}, "dpo": {}}, seeds=[0, 3]), out)
    assert 0 < returned["wall_seconds"] < time.perf_counter() - started
    results = json.loads((out / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert results["experiment"] == "facts" and isinstance(results["created"], str)
    assert {"rlzoo", "torch", "transformers", "python"} <= set(results["versions"])
    assert [(c["algorithm"], c["seed"]) for c in results["cells"]] == [("sft", 0), ("sft", 3), ("dpo", 0), ("dpo", 3)]
    assert results["failed"] == []
    for metrics in (results["base"], *(cell["metrics"] for cell in results["cells"])):
        assert set(metrics) == {"facts"}
        assert {"avg_at_k", "greedy", "pass_at_k"} <= set(metrics["facts"]) and metrics["facts"]["k"] == 2
        assert all(0 <= metrics["facts"][name] <= 1 for name in ("avg_at_k", "greedy", "pass_at_k"))
    for cell in results["cells"]:
        assert isinstance(cell["learning_rate"], float)
        assert set(cell["costs"]) == {"gradient_tokens", "sampled_tokens", "flops", *TIMES}
        assert cell["costs"]["gradient_tokens"] > 0 and cell["costs"]["flops"] > 0
        assert (cell["costs"]["sampled_tokens"] > 0) == (cell["algorithm"] == "dpo")
        assert [point["step"] for point in (results["base_curve"], *cell["curve"])] == [0, 2]
    assert {(r["algorithm"], r["benchmark"], r["metric"]) for r in results["summary"]} == {
        (a, "facts", m) for a in ("sft", "dpo") for m in ("avg_at_k", "greedy", "pass_at_k")
    }
    for row in results["summary"]:
        assert set(row) == {"algorithm", "benchmark", "metric", "mean", "ci_low", "ci_high", "seeds"}
        assert row["ci_low"] <= row["mean"] <= row["ci_high"]
        assert row["seeds"] == 2
    assert [row["algorithm"] for row in results["base_summary"]] == ["base"] * 3
    assert {p.name for p in out.iterdir()} == {
        "README.md", "buffer", "experiment.yaml", "figures", "outcomes.parquet", "report.html", "report.md",
        "results.json", "run.json",
    }  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_outcomes_have_one_row_a_sample_and_give_the_scores_back(tmp_path: Path) -> None:
    results = quietly(small({"sft": {}}, seeds=[0, 1]), tmp_path / "out")
    table = outcomes(tmp_path / "out")
    assert table.column_names == [
        "algorithm", "seed", "learning_rate", "benchmark", "problem_id", "prompt", "decoding", "sample", "reward",
        "correct", "length", "truncated", "text", "logged", "components", "answer", "gold_logp", "gold_tokens",
        "retention", "base_text_logp", "base_text_tokens", "reference",
    ]  # fmt: skip
    rows = table.to_pylist()
    assert all(r["gold_logp"] < 0 < r["gold_tokens"] for r in rows) and any(r["answer"] for r in rows)
    solutions = {one.id: one.solutions[0] for one in load_problems(small({"sft": {}}).benchmarks["facts"])}
    assert {r["problem_id"]: r["reference"] for r in rows} == solutions
    assert len(rows) == 3 * 4 * (3 + 1)  # base and two seeds, four problems, three samples and one greedy
    keys = {(r["algorithm"], r["seed"], r["problem_id"], r["decoding"], r["sample"]) for r in rows}
    assert len(keys) == len(rows)
    assert all(r["correct"] == (r["reward"] >= 0.5) and r["length"] > 0 and r["prompt"] for r in rows)
    assert {r["seed"] for r in rows if r["algorithm"] == "base"} == {-1}

    for name, seeds in (("base", [-1]), ("sft", [0, 1])):
        summary = results["summary"] + results["base_summary"]
        shown = {r["metric"]: r["mean"] for r in summary if r["algorithm"] == name}
        mine = [r for r in rows if r["algorithm"] == name]
        sampled = [r for r in mine if r["decoding"] == "sample"]
        assert shown["avg_at_k"] == pytest.approx(np.mean([r["correct"] for r in sampled]))
        assert shown["greedy"] == pytest.approx(np.mean([r["correct"] for r in mine if r["decoding"] == "greedy"]))
        by_problem: dict[Any, int] = {}
        for r in sampled:
            by_problem[r["seed"], r["problem_id"]] = by_problem.get((r["seed"], r["problem_id"]), 0) + r["correct"]
        # two of three samples drawn: none is correct in C(3-c, 2) of 3 draws
        chances = [1 - {0: 3, 1: 1, 2: 0, 3: 0}[correct] / 3 for correct in by_problem.values()]
        assert len(chances) == 4 * len(seeds)
        assert shown["pass_at_k"] == pytest.approx(np.mean(chances))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_written_experiment_gives_the_same_numbers(tmp_path: Path) -> None:
    rows = {"sft": {}, "grpo": {"options": {"clip": 0.1}}}
    first = quietly(small(rows, seeds=[1]), tmp_path / "first")
    again = quietly(load_experiment(str(tmp_path / "first" / "experiment.yaml")), tmp_path / "again")
    assert numbers(first) == numbers(again)
    assert outcomes(tmp_path / "first").equals(outcomes(tmp_path / "again"))


@pytest.mark.slow
def test_processes_change_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = small({"sft": {}, "ppo": {"mode": "online"}}, seeds=[0, 1])
    spawned = quietly(experiment, tmp_path / "spawned", workers=2)
    monkeypatch.setattr(runner, "pool", inline_pool)
    inline = quietly(experiment, tmp_path / "inline")
    assert numbers(spawned) == numbers(inline)
    assert outcomes(tmp_path / "spawned").equals(outcomes(tmp_path / "inline"))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_seed_does_not_depend_on_the_rest_of_the_grid(tmp_path: Path) -> None:
    alone = quietly(small({"rft": {}}, seeds=[1]), tmp_path / "alone")
    among = quietly(small({"sft": {}, "rft": {}}, seeds=[0, 1]), tmp_path / "among")
    (same,) = [c for c in numbers(among)["cells"] if (c["algorithm"], c["seed"]) == ("rft", 1)]
    assert numbers(alone)["cells"] == [same]
    assert alone["base"] == among["base"]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_online_samples_the_policy_in_training(tmp_path: Path) -> None:
    rows = {name: {"mode": "online", "learning_rates": [1e-2]} for name in ("grpo", "ppo")}
    results = quietly(small(rows), tmp_path / "out")
    assert results["failed"] == []
    assert results["buffer"]["sampled_tokens"] == 0  # nobody asked for samples of the base
    for cell in results["cells"]:
        assert len(cell["training"]) == 2
        assert cell["costs"]["sampled_tokens"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_row_may_learn_from_the_bases_own_correct_samples(tmp_path: Path) -> None:
    rows = {"sft-own": {"objective": "sft", "learns_from": "correct"}, "rft": {"options": {"samples_per_prompt": 4}}}
    results = quietly(small(rows, seeds=[1]), tmp_path / "out")
    own, rft = results["cells"]
    assert own["costs"]["sampled_tokens"] == results["buffer"]["sampled_tokens"] > 0
    assert numbers({"cells": [{**own, "algorithm": "rft"}]})["cells"][0]["metrics"] == rft["metrics"]


@pytest.mark.parametrize(
    ("objective", "view", "message"),
    [
        ("dpo", "correct", "the view 'correct' has single rows, and 'dpo' learns from pairs: name a view of pairs"),
        ("sft", "groups", "the view 'groups' has groups, and 'sft' learns from single rows"),
        (
            "kto",
            "demonstrations",
            "of the view 'demonstrations' may have no reward, and 'kto' learns from rewards",
        ),
        ("sft", "corect", "unknown view 'corect': did you mean 'correct'?"),
        ("sft", "nowhere.py:View", "view file .* does not exist"),
        ("sft-q", "unpaired", "unknown option of the view 'unpaired' 'weighted'"),
    ],
)
def test_a_view_that_a_row_cannot_learn_from(objective: str, view: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^algorithms.{objective}: .*{message}"):
        resolve.check(small({objective: {"learns_from": view}}))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_learning_rate_is_chosen_on_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of the others are deleted when that is known, and a run that resumes does without them."""
    scores = {(0, 1e-4): 0.1, (1, 1e-4): 0.3, (0, 1e-2): 0.6, (1, 1e-2): 0.0}
    run_cell, train, evaluate_cell = one_cell.run_cell, one_cell._run_cell, one_cell.evaluate_cell
    state, trained, tested = tmp_path / "out" / ".state", list[str](), list[str]()

    def with_score(experiment: Experiment, cell: Any, *rest: Any) -> dict[str, Any]:
        result = run_cell(experiment, cell, *rest)
        assert tested or (state / "models" / cell.id).is_dir()
        assert not (state / "cells" / cell.id).exists(), "its checkpoints take no room any more"
        return {**result, "validation": scores[cell.seed, cell.learning_rate]}

    def counted(experiment: Experiment, cell: Any, *rest: Any) -> dict[str, Any]:
        trained.append(cell.id)
        return train(experiment, cell, *rest)

    def stopped(experiment: Experiment, cell: Any, *rest: Any) -> dict[str, Any]:
        assert {path.name for path in (state / "models").iterdir()} == {"sft-lr0.01-seed0", "sft-lr0.01-seed1"}
        tested.append(cell.id)
        if len(tested) == 2:
            raise KeyboardInterrupt
        return evaluate_cell(experiment, cell, *rest)

    monkeypatch.setattr(one_cell, "run_cell", with_score)
    monkeypatch.setattr(one_cell, "_run_cell", counted)
    monkeypatch.setattr(one_cell, "evaluate_cell", stopped)
    experiment = small({"sft": {"learning_rates": [1e-4, 1e-2]}}, seeds=[0, 1], training__checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        quietly(experiment, tmp_path / "out")
    results = quietly(experiment, tmp_path / "out")
    assert len(trained) == 4 and len(tested) == 4
    assert results["learning_rates"] == {"sft": {"0.0001": pytest.approx(0.2), "0.01": pytest.approx(0.3)}}
    assert [(c["seed"], c["learning_rate"]) for c in results["cells"]] == [(0, 1e-2), (1, 1e-2)]
    assert {rate: [cell["seed"] for cell in tried] for rate, tried in results["tuning"]["sft"].items()} == {
        "0.0001": [0, 1], "0.01": [0, 1],
    }  # fmt: skip
    tuned = [cell for tried in results["tuning"]["sft"].values() for cell in tried]
    assert [cell["validation"] for cell in tuned] == [0.1, 0.3, 0.6, 0.0]
    assert [cell["costs"] for cell in tuned[2:]] == [cell["costs"] for cell in results["cells"]]
    total = tables.total_cost_table(parse_results(results)).rows[0]
    assert total[1].text == tables.amount(sum(cell["costs"]["gradient_tokens"] for cell in tuned))
    assert total[-1].text == "4"
    assert all("facts" in cell["metrics"] for cell in results["cells"])
    assert set(outcomes(tmp_path / "out")["learning_rate"].to_pylist()) == {None, 1e-2}
    assert not (tmp_path / "out" / ".state").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("inline")
def test_a_comparison_with_more_rows_or_seeds_takes_the_cells_that_another_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with the numbers of one that trains them all, and its report says where they are from."""
    train, trained = one_cell._run_cell, list[str]()

    def counted(experiment: Experiment, cell: Any, *rest: Any) -> dict[str, Any]:
        trained.append(cell.id)
        return train(experiment, cell, *rest)

    monkeypatch.setattr(one_cell, "_run_cell", counted)
    tuned, first = {"learning_rates": [1e-4, 1e-2]}, tmp_path / "first"
    quietly(small({"dft": tuned, "sft": {"learning_rates": [1e-3]}}, seeds=[0, 1], name="first"), first)
    study = save_study(first, tmp_path / "studies")

    more = {"sft": {"learning_rates": [1e-3]}, "dpo": {}, "dft": tuned}
    experiment = small(more, seeds=[1, 0])
    trained.clear()
    results = quietly(experiment, tmp_path / "more", reuse=study)
    assert trained == ["dpo-lr5e-05-seed1", "dpo-lr5e-05-seed0"]
    (told,) = results["events"]
    assert told == f"4 of 6 cells are those of the comparison first of {results['created'][:10]}"
    assert told in (tmp_path / "more" / "report.md").read_text()
    whole = quietly(experiment, tmp_path / "whole")
    assert outcomes(tmp_path / "more").equals(outcomes(tmp_path / "whole"))
    for one in (results, whole):
        one["events"] = []
        for cell in one["cells"]:
            assert (cell.pop("reused", None) is not None) == (one is results and cell["algorithm"] != "dpo")
            cell["training"] = []  # rounded in a study
    assert numbers(results) == numbers(whole)

    trained.clear()  # with another seed the choice among rates is open again
    out = ["--out", str(tmp_path / "seeds"), "--reuse", str(tmp_path / "more")]
    assert (
        main(["compare", str(tmp_path / "more" / "experiment.yaml"), "--seeds", "0,1,2", "--workers", "1", *out]) == 0
    )
    results = json.loads((tmp_path / "seeds" / "results.json").read_text())
    assert [name for name in trained if "dft" not in name] == ["sft-lr0.001-seed2", "dpo-lr5e-05-seed2"]
    assert len([name for name in trained if "dft" in name]) == 6
    assert (
        results["events"]
        == [  # where they were trained, however often they have been reused since
            f"2 of 9 cells are those of the comparison first of {results['created'][:10]}",
            f"2 of 9 cells are those of the comparison facts of {results['created'][:10]}",
        ]
    )


@pytest.mark.usefixtures("undrawn")
def test_cells_of_other_settings_are_not_reused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    rows = {"sft": {}, "mine": {"objective": f"{tmp_path / 'mine.py'}:Mine"}}
    quietly(small(rows), tmp_path / "out")
    there = reusable(small({**rows, "dft": {}}, seeds=[0, 4]), str(tmp_path / "out"))
    assert list(there) == ["sft-lr5e-05-seed0", "mine-lr5e-05-seed0"]
    changed = {"sft": {"training": {"batch_size": 4}}, "mine": rows["mine"]}
    assert list(reusable(small(changed), str(tmp_path / "out"))) == ["mine-lr5e-05-seed0"]
    staged = {**rows, "both": {"stages": ["sft", "mine"]}}
    assert "both-lr5e-05-seed0" not in reusable(small(staged), str(tmp_path / "out"))
    for experiment, told in (
        (small(rows, training={"steps": 3, "batch_size": 8}), r"steps: 2 there, 3 here\): they must differ in rows"),
        (small(rows, seeds=[4]), "has no cell of this comparison"),
    ):
        with pytest.raises(UserError, match=told):
            quietly(experiment, tmp_path / "new", reuse=tmp_path / "out")
        assert not (tmp_path / "new").exists()
    out = str(tmp_path / "out")
    assert main(["compare", f"{out}/experiment.yaml", "--seeds", "0,1", "--dry-run", "--reuse", out]) == 0
    assert f"not be trained again: the 2 that are in {out}" in capsys.readouterr().out
    (tmp_path / "mine.py").write_text(f"{MINE}\n# changed\n")
    there = reusable(small(rows), str(tmp_path / "out"))
    assert list(there) == ["sft-lr5e-05-seed0"]
    there["sft-lr5e-05-seed0"]["reused"]["versions"]["torch"] = "1.0"
    (told,) = origins(there.values(), 3)
    assert "1 of 3 cells are those of the comparison facts of " in told and "ran with torch 1.0 (here 2." in told


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_trained_folder_is_a_base_like_any_other(tmp_path: Path) -> None:
    from rlzoo.policy.loading import save_policy

    save_policy(load_policy("embedded"), tmp_path / "copy")
    embedded = quietly(small({"sft": {}}), tmp_path / "embedded")
    folder = quietly(small({"sft": {}}, model=str(tmp_path / "copy")), tmp_path / "folder")
    assert numbers(folder)["cells"] == numbers(embedded)["cells"]
    assert folder["base"] == embedded["base"]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_benchmark_may_have_a_reward_of_its_own(tmp_path: Path) -> None:
    """A weighted one, so that its components reach results and outcomes; the rest is as without it."""
    source = {"source": "world:facts/test", "limit": 3}
    own = [{"name": "length", "target": 1, "limit": 9}, {"name": "format", "pattern": ".", "weight": 3.0}]
    benchmarks = {"plain": source, "own": source | {"reward": own}}
    results = quietly(small({"sft": {}}, benchmarks=benchmarks), tmp_path / "out")
    alone = quietly(small({"sft": {}}, benchmarks={"plain": source}), tmp_path / "alone")
    (cell,), (plain,) = results["cells"], alone["cells"]
    assert cell["metrics"]["plain"] == plain["metrics"]["plain"] and cell["training"] == plain["training"]
    assert results["base"]["plain"] == alone["base"]["plain"]
    for metrics in (cell["metrics"], *(point["metrics"] for point in (results["base_curve"], *cell["curve"]))):
        assert metrics["own"]["avg_at_k"] > 0.9
    rows = pq.read_table(tmp_path / "out" / "outcomes.parquet").to_pylist()
    assert {row["components"] for row in rows if row["benchmark"] == "plain"} == {None}
    mine = [row for row in rows if row["benchmark"] == "own" and row["algorithm"] == "sft"]
    for row in mine:
        found = json.loads(row["components"])
        assert row["reward"] == pytest.approx(found["length"] + 3 * found["format"])
    lengths = [json.loads(row["components"])["length"] for row in mine if row["decoding"] == "sample"]
    assert cell["metrics"]["own"]["component/length"] == pytest.approx(sum(lengths) / len(lengths))
    assert results["metrics"]["component/length"] == {"label": "length", "unit": "mean reward"}
    with pytest.raises(UserError, match="unknown reward 'lenth'"):
        quietly(small({"sft": {}}, benchmarks={"own": source | {"reward": "lenth"}}), tmp_path / "wrong")


def test_gold_completions_without_a_log_likelihood_are_counted_once(tmp_path: Path) -> None:
    row = {"prompt": "1+1=?\n", "answer": "2"}
    end = load_policy("embedded").tokenizer.eos_token
    rows = [row | {"id": str(i), "solution": text} for i, text in enumerate(("#### 2", f"2{end}2", f"{end}2"))]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    benchmarks = {"mine": ProblemSource(source=str(tmp_path / "problems.jsonl"), solution="solution")}
    experiment = Experiment.model_validate(small({"sft": {}}).model_dump() | {"benchmarks": benchmarks})
    found = one_cell.evaluate_base(experiment, tmp_path / "state", lambda share, what: None)
    (event,) = found["events"]
    assert event.startswith("benchmark mine: gold completions without a log-likelihood: 2 in all (problem '1'")
    assert found["metrics"]["mine"]["log_likelihood"] < 0 and found["dropped_rows"] == {}
    tokens = {row["problem_id"]: row.get("gold_tokens") for row in found["outcomes"]}
    assert tokens["0"] and tokens["1"] is None is tokens["2"]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_end_of_a_curve_is_part_of_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same results as with samples of its own, for the base too, and fewer samples."""
    sampled, real = list[int](), evaluate
    chosen = {"sft": {}, "dft": {"learning_rates": [1e-4, 1e-3]}}

    def counted(policy: Any, problems: Any, *more: Any, **options: Any) -> Any:
        sampled.append(len(problems))
        return real(policy, problems, *more, **options)

    monkeypatch.setattr(one_cell, "evaluate", counted)
    found = quietly(small(chosen, evaluation__curve_points=2), tmp_path / "found")
    few = sampled.count(2)
    sampled.clear()
    monkeypatch.setattr(one_cell, "ends_the_curve", lambda settings: False)
    assert numbers(quietly(small(chosen, evaluation__curve_points=2), tmp_path / "own")) == numbers(found)
    assert (few, sampled.count(2)) == (1 + 2 * 2, 1 + 2 + 2 * 2), "the base's, one of two of sft, and those of dft"


# What is stopped


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_comparison_that_was_stopped_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its sampling, in the training of a cell, after it, and between the chosen cells; a buffer that got
    lost meanwhile is made again."""
    rows = {"sft": {"learning_rates": [1e-4, 1e-2]}, "grpo": {"mode": "online"}, "rft": {}}
    experiment = small(rows, training__checkpoint_seconds=0, rollouts__batch_size=8, evaluation__curve_points=2)
    whole = quietly(experiment, tmp_path / "whole")
    out, calls = tmp_path / "out", dict.fromkeys(("_behaviour", "evaluate", "curve_point"), 0)
    stops = {("_behaviour", 2), ("evaluate", 3), ("curve_point", 3), ("evaluate", 8)}

    def stopping(home: Any, name: str) -> None:
        real = getattr(home, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            if (name, calls[name]) in stops:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        monkeypatch.setattr(home, name, call)

    stopping(rollouts, "_behaviour")
    stopping(one_cell, "evaluate")
    stopping(one_cell, "curve_point")
    for _ in stops:
        with pytest.raises(KeyboardInterrupt):
            quietly(experiment, out)
        if calls["evaluate"] < 4:
            shutil.rmtree(out / "buffer", ignore_errors=True)
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.result")}
    found = quietly(experiment, out)
    assert len(made) >= 6 and all(path.stat().st_mtime_ns == made[path] for path in made if path.exists())
    assert numbers(found) == numbers(whole)
    assert (out / "outcomes.parquet").read_bytes() == (tmp_path / "whole" / "outcomes.parquet").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert quietly(experiment, out) == found, "a finished one is told again"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_cells_that_failed_are_tried_again_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, ran = one_cell._run_cell, list[str]()

    def broken(experiment: Experiment, cell: Any, *rest: Any) -> dict[str, Any]:
        ran.append(cell.algorithm)
        if cell.algorithm == "dft" and len(ran) < 3:
            raise OSError("no space")
        return run(experiment, cell, *rest)

    monkeypatch.setattr(one_cell, "_run_cell", broken)
    first = quietly(small({"sft": {}, "dft": {}}), tmp_path / "out")
    assert [failed["algorithm"] for failed in first["failed"]] == ["dft"]
    second = quietly(small({"sft": {}, "dft": {}}), tmp_path / "out")
    assert ran == ["sft", "dft", "dft"] and second["failed"] == []
    assert [cell["algorithm"] for cell in second["cells"]] == ["sft", "dft"]
    assert not (tmp_path / "out" / ".state").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_cell_that_runs_out_of_memory_is_done_again_in_smaller_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ran = one_cell._run_cell, list[int]()

    def starving(experiment: Experiment, *rest: Any) -> dict[str, Any]:
        ran.append(experiment.evaluation.batch_size)
        if ran[-1] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return run(experiment, *rest)

    monkeypatch.setattr(one_cell, "_run_cell", starving)
    found = quietly(small({"sft": {}}), tmp_path / "out")
    assert ran == [256, 128, 64] and found["failed"] == []
    told = {"device": "cpu", "dtype": "float32", "packing": "padded", "compile": False, "engine": "transformers"}
    assert found["cells"][0]["resolved"] == {**told, "token_budget": 1024}, "a quarter of what it would be"


@pytest.mark.parametrize("error", [WorkerDiedError(-9), OutOfMemoryError("CUDA out of memory")])
def test_a_cell_without_memory_is_done_again_in_smaller_parts(error: WorkError) -> None:
    asked: list[tuple[str, int]] = []

    class Dying(InThisProcess):
        """Cells of dft die unless their micro-batches are a quarter of the size; those of sft always do."""

        def submit(self, name: str, function: Any, *arguments: Any) -> Future[Any]:
            parts = arguments[-1]
            asked.append((name, parts))
            future: Future[Any] = Future()
            if name.startswith("sft") or (name.startswith("dft") and parts < 4):
                future.set_exception(error)
            else:
                future.set_result({"metrics": {"facts": {"avg_at_k": 0.5}}, "events": []})
            return future

    workers, lines = Dying(), io.StringIO()
    grid = [Cell(name, 0, 1e-4) for name in ("sft", "dft", "rft")]

    def submit(cell: Cell, parts: int) -> Future[Any]:
        return workers.submit(cell.id, None, parts)

    runs, failed = runner._gather(workers, grid, submit, Console(file=lines, width=500))
    assert [(name.split("-")[0], parts) for name, parts in asked] == [
        ("sft", 1), ("dft", 1), ("rft", 1), ("sft", 2), ("dft", 2), ("sft", 4), ("dft", 4),
    ]  # fmt: skip
    assert [name.split("-")[0] for name in runs] == ["rft", "dft"]
    assert [(cell["algorithm"], cell["error"]) for cell in failed] == [("sft", str(error))]
    assert lines.getvalue().count("to be retried with micro-batches half as large") == 4


@pytest.mark.slow
def test_without_a_folder_the_newest_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = small({"sft": {}})
    fresh = runner.where(experiment)
    with pytest.raises(KeyboardInterrupt), run_in(fresh, "compare", runner._asked(experiment, 1)) as run:
        (run.state / "half").touch()
        raise KeyboardInterrupt
    assert runner.where(experiment) == fresh
    assert runner.where(experiment, threads=2) != fresh
    assert runner.where(small({"dft": {}})).parent == Path("runs")

    def pool(workers: int, threads: int, console: Console) -> Any:
        raise UserError(f"{threads} threads")

    monkeypatch.setattr(runner, "pool", pool)
    with pytest.raises(UserError, match=r"^2 threads"):  # and not that the stopped one had other settings
        runner.compare(experiment, threads=2, console=Console(quiet=True))


# What goes wrong


FAILING = """\
import rlzoo, torch
class Failing(rlzoo.Objective):
    name, steps = "failing", []
    def coefficients(self, batch):
        self.steps.append(1)
        if len(self.steps) > 1:
            raise RuntimeError("the second step")
        return rlzoo.Coefficients(torch.ones_like(batch.logp))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("inline")
def test_a_cell_that_fails_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    spec = f"{tmp_path / 'failing.py'}:Failing"
    out = tmp_path / "out"
    one_micro_batch = ["--set", "training.token_budget=9999"]
    command = ["compare", "facts", "--algorithms", f"{spec},sft", *SMALL_OPTIONS, *one_micro_batch, "--out", str(out)]
    assert main(command) == 1
    results = json.loads((out / "results.json").read_text())
    (failure,) = results["failed"]
    assert (failure["algorithm"], failure["seed"]) == ("failing", 0)
    assert failure["error"].startswith("RuntimeError: the second step (")
    assert [cell["algorithm"] for cell in results["cells"]] == ["sft"]
    assert "the second step" in (out / "report.md").read_text() and (out / "report.html").is_file()
    told = capsys.readouterr()
    assert "1 cell failed" in told.out and "failing-lr" in told.err


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_cell_that_fails_its_evaluation_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate_cell = one_cell.evaluate_cell

    def broken(experiment: Experiment, cell: Any, *rest: Any) -> dict[str, Any]:
        if cell.algorithm == "dft":
            raise OSError("no space")
        return evaluate_cell(experiment, cell, *rest)

    monkeypatch.setattr(one_cell, "evaluate_cell", broken)
    rates = {"learning_rates": [1e-4, 1e-3]}
    results = quietly(small({"sft": rates, "dft": rates}), tmp_path / "out")
    assert [cell["algorithm"] for cell in results["cells"]] == ["sft"]
    assert [(f["algorithm"], f["error"].partition(" (")[0]) for f in results["failed"]] == [
        ("dft", "OSError: no space")
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_no_run_that_succeeds_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise RuntimeError("oh")

    monkeypatch.setattr(one_cell, "run_cell", broken)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "deep"):
        with pytest.raises(UserError, match="no cell succeeded; the first failed with: RuntimeError: oh"):
            quietly(small({"sft": {}}), out)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]  # it was there, and is empty again


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_each_seed_may_have_samples_of_its_own(tmp_path: Path) -> None:
    grid = {"rft": {"options": {"threshold": 0}}}
    both = quietly(small(grid, seeds=[0, 3], rollouts__per_seed=True), tmp_path / "own")
    assert sorted(path.name for path in (tmp_path / "own").glob("buffer*")) == ["buffer-seed0", "buffer-seed3"]
    assert "buffer" not in both and set(both["buffers"]) == {"buffer-seed0", "buffer-seed3"}
    own = {seed: OfflineBuffer.load(tmp_path / "own" / f"buffer-seed{seed}") for seed in (0, 3)}
    shared = quietly(small(grid, seeds=[0, 3]), tmp_path / "one")
    one = OfflineBuffer.load(tmp_path / "one" / "buffer")
    assert own[0].column("completion_ids") == one.column("completion_ids"), "seed 0 draws what all share by default"
    assert own[3].column("completion_ids") != one.column("completion_ids")
    assert own[3].column("prompt_ids") == one.column("prompt_ids"), "of the same prompts"

    def trained(results: dict[str, Any], seed: int) -> Any:
        return next(cell["training"] for cell in results["cells"] if cell["seed"] == seed)

    assert trained(both, 0) == trained(shared, 0)
    assert trained(both, 3) != trained(shared, 3), "the cell of seed 3 learned from its own"


@pytest.mark.usefixtures("undrawn")
def test_a_bug_in_the_shared_work_is_no_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(shared_buffer, "fill_buffer", broken)
    with pytest.raises(WorkError, match="ZeroDivisionError: a bug"):
        quietly(small({"sft": {}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shared_work_whose_process_dies_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel kills it where memory runs out."""

    class Killed(InThisProcess):
        def submit(self, name: str, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
            if name != "shared buffer":
                return super().submit(name, function, *arguments)
            future: Future[Any] = Future()
            future.set_exception(WorkerDiedError(-9))
            return future

    monkeypatch.setattr(runner, "pool", lambda *_: nullcontext(Killed()))
    with pytest.raises(UserError, match="killed by SIGKILL: if memory ran out"):
        quietly(small({"sft": {}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"algorithms": {"base": {"objective": "sft"}}}, "algorithms.base: this name stands for the untrained model"),
        ({"baseline": "dpo"}, "unknown baseline 'dpo'"),
        ({"rollouts.engine": "vlm"}, "unknown sampler 'vlm'"),
        ({"evaluation.engine": "vlm"}, "unknown sampler 'vlm'"),
        ({"algorithms": {"sft": {"training": {"stepz": 3}}}}, "unknown setting in sft.training 'stepz'"),
        ({"algorithms": {"sft": {"mode": "online"}}}, "algorithms.sft: 'sft' learns from demonstrations, so mode must"),
        ({"train": "rows.jsonl"}, "train: reward 'exact-match' needs the column 'answer'"),
        ({"validation": "rows.jsonl"}, "validation: reward 'exact-match' needs the column 'answer'"),
        ({"benchmarks": {"mine": {}}}, "benchmarks.mine: reward 'exact-match' needs the column 'answer'"),
        (
            {
                "reward": {"name": "length", "target": 1, "limit": 9},
                "validation": None,
                "benchmarks": {"mine": {"reward": "exact-match"}},
            },
            "needs the column 'answer'",
        ),
        ({"evaluation.metrics": ["gredy"]}, "unknown metric 'gredy'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(
    changes: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=?", "solution": "#### 2"}')
    rows = {"source": "rows.jsonl", "solution": "solution"}
    given = {
        key: {name: rows | own for name, own in value.items()}
        if key == "benchmarks"
        else rows
        if value == "rows.jsonl"
        else value
        for key, value in {"algorithms": {"sft": {}}, "baseline": None, "model": "none", **changes}.items()
    }
    with pytest.raises(UserError, match=re.escape(told)):
        resolve.check(load_experiment("facts", given))


def test_a_reward_must_have_a_name_to_be_written_down(tmp_path: Path) -> None:
    experiment = small({"sft": {}}).model_copy(update={"reward": lambda completions: [1.0] * len(completions)})
    with pytest.raises(UserError, match="must be plain data"):
        quietly(experiment, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.usefixtures("inline")
def test_the_report_can_be_written_again(tmp_path: Path) -> None:
    quietly(small({"sft": {}, "dft": {}}, baseline="dft"), tmp_path / "out")
    first = (tmp_path / "out" / "report.md").read_text()
    assert "Differences from dft" in first
    write_report(tmp_path / "out", "sft")
    assert "Differences from sft" in (tmp_path / "out" / "report.md").read_text()
    assert main(["report", str(tmp_path / "out"), "--baseline", "dft"]) == 0
    assert (tmp_path / "out" / "report.md").read_text() == first


@pytest.mark.parametrize(
    ("workers", "seeds", "expected"), [(None, [0, 1, 2], 3), (None, [*range(9)], 5), (8, [0], 2), (1, [0, 1, 2], 1)]
)
def test_there_are_as_many_processes_as_cells_can_use(
    workers: int | None, seeds: list[int], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at least, for the base model and the buffer, and by default no more than the machine has cores or GPUs."""

    def pool(workers: int, threads: int, console: Console) -> Any:
        raise UserError(f"{workers} processes with {threads} threads")

    monkeypatch.setattr(runner, "pool", pool)
    monkeypatch.setattr(runner, "default_workers", lambda: 5)
    with pytest.raises(UserError, match=f"^{expected} processes with 3 threads"):
        runner.compare(small({"sft": {}}, seeds=seeds), tmp_path / "out", workers, 3, Console(quiet=True))


def test_rows_drawn_by_quality_stay_so_when_they_are_the_base_s_own() -> None:
    rows = {
        "sft-q": {"learns_from": "correct"},
        "rft": {"learns_from": "demonstrations"},
        "plain": {"objective": "sft-q"},
        "one": {"objective": "rft", "options": {"samples_per_prompt": 1}},
        "named": {"objective": "rft", "options": {"samples_per_prompt": 1}, "learns_from": "correct"},
    }
    experiment = load_experiment("arithmetic", {"algorithms": rows, "baseline": "rft"})
    assert resolve.views_of(experiment, "sft-q") == [(Selection.CORRECT, {"weighted": True})]
    assert resolve.views_of(experiment, "plain") == [(Selection.DEMONSTRATIONS, {"weighted": True})]
    assert resolve.views_of(experiment, "rft") == [(Selection.DEMONSTRATIONS, {})]
    assert resolve.views_of(experiment, "named") == resolve.views_of(experiment, "one"), "its options stay too"
