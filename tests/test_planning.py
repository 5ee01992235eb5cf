"""`rlzoo plan`: its costs are those that training records, and its smallest differences are those that are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from comparisons import inline_pool, small

from rlzoo import cli
from rlzoo.comparison import runner
from rlzoo.comparison.forecast import forecast
from rlzoo.comparison.planning import detectable, planned
from rlzoo.comparison.speed import measured_speed
from rlzoo.comparison.statistics import detectable_difference, p_value, smallest_difference
from rlzoo.config import Experiment
from rlzoo.errors import UserError
from rlzoo.policy.loading import load_shape
from rlzoo.worlds import EMBEDDED_BASE

ROWS: dict[str, Any] = {
    "sft": {},
    "iw-sft": {"learning_rates": [1e-4, 3e-4]},
    "kto": {},
    "ppo": {"training": {"updates_per_batch": 2}},
    "grpo-online": {"objective": "grpo", "mode": "online", "options": {"kl_coefficient": 0.1}},
}


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return small(ROWS, rollouts__prompts=6, training__batch_size=24, training__steps=2)


@pytest.fixture(scope="module")
def run(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "pool", inline_pool)
        patch.setattr(runner, "write_report", lambda *_: None)
        return out, runner.compare(experiment, out)


@pytest.mark.slow
def test_costs_are_those_that_training_records(experiment: Experiment, run: tuple[Path, dict[str, Any]]) -> None:
    _, results = run
    buffer, shape = results["buffer"], load_shape("embedded")
    length = buffer["sampled_tokens"] / buffer["samples"]
    found = forecast(experiment, shape, length)
    assert found.shared_sampled_tokens == pytest.approx(buffer["sampled_tokens"])
    by_name = {row.algorithm: row for row in found.rows}
    assert {name: row.cells for name, row in by_name.items()} == {**dict.fromkeys(ROWS, 1), "iw-sft": 2}
    scored = buffer["samples"] * found.lengths.flops(shape, length)  # a pass of all samples
    reference = found.shared_flops - scored
    sampled = 2 * scored + reference  # every cell is charged for the shared work that it needs
    shared = {"iw-sft": reference, "kto": sampled, "ppo": 2 * scored}
    for cell in results["cells"]:
        row, costs = by_name[cell["algorithm"]], cell["costs"]
        sampling = row.sampled_tokens / length * found.lengths.flops(shape, length)
        assert row.gradient_tokens == pytest.approx(costs["gradient_tokens"], rel=0.1), cell["algorithm"]
        told = row.flops + shared.get(cell["algorithm"], 0.0) + sampling
        assert told == pytest.approx(costs["flops"], rel=0.1), cell["algorithm"]
    online = next(cell["costs"] for cell in results["cells"] if cell["algorithm"] == "grpo-online")
    assert by_name["grpo-online"].sampled_tokens == pytest.approx(online["sampled_tokens"], rel=0.15)
    evaluated = pq.read_table(run[0] / "outcomes.parquet").filter(pa.compute.field("algorithm") == "sft")
    assert by_name["sft"].evaluated_tokens == pytest.approx(len(evaluated) * length), "with the curve's only point"
    rated = results["tuning"]["iw-sft"]  # two cells, each on three problems of validation, of which one is reported
    along = 2 * 2  # a curve point on two problems, two samples each
    expected = (len(evaluated) / 2 + 3 * 3 + along) * length
    assert len(rated) == 2 and by_name["iw-sft"].evaluated_tokens == pytest.approx(expected)


@pytest.mark.slow
def test_a_model_of_any_size_is_planned_without_its_weights(
    tmp_path: Path, experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in EMBEDDED_BASE.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    size = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(config | size | {"num_key_value_heads": 8, "head_dim": 128}))
    found = planned(experiment.model_copy(update={"model": str(tmp_path)}), gpu="h100")
    assert 6.5e9 < found["parameters"] < 7.5e9
    assert found["rows"][0]["bytes"] > 16 * found["parameters"] > found["gpu_bytes"]
    sampled, trained = (found["speed"][name] for name in ("tokens_per_second", "flops_per_second"))
    assert found["seconds"] == pytest.approx(found["sampled_tokens"] / sampled + found["flops"] / trained)
    assert cli.main(["plan", "facts", "--model", str(tmp_path), "--gpu", "H100", "--limit", "4"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "assumed, not measured" in told and "do not fit into the 80 GB of H100" in told


def test_a_plan_drops_the_rows_that_the_comparison_drops(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+2=?\n", "solution": f"#### {i + 2}", "answer": str(i + 2)} for i in range(1, 5)]
    rows.append({"prompt": "1+1=?\n", "solution": "#### <eos> 2", "answer": "2"})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"source": str(tmp_path / "own.jsonl"), "solution": "solution"}
    reject, drop, whole = (small({"sft": {}}, train={**own, **how}) for how in ({}, {"bad_rows": "drop"}, {"limit": 4}))
    with pytest.raises(UserError, match=r"own\.jsonl line 5.*<eos>"):
        planned(reject, gpu="h100")
    assert planned(drop, gpu="h100")["lengths"] == planned(whole, gpu="h100")["lengths"]
    assert measured_speed(drop).flops > 0


@pytest.mark.slow
def test_the_smallest_difference_is_found_four_times_in_five() -> None:
    draw = np.random.default_rng(0)

    def differences(mean: float, seeds: int, problems: int) -> Any:
        effects = 0.03 * draw.standard_normal((seeds, 1)) + 0.2 * draw.standard_normal((1, problems))
        return mean + effects + 0.4 * draw.standard_normal((seeds, problems))

    pilot = differences(0.0, 300, 300)
    for seeds, problems in ((3, 100), (12, 40), (30, 12)):
        size = smallest_difference(pilot, seeds, problems)
        found = [p_value(differences(size, seeds, problems)) < 0.05 for _ in range(1000)]
        assert 0.76 < np.mean(found) < 0.87, (seeds, problems)
        corrected = smallest_difference(pilot, seeds, problems, level=0.05 / 18)
        found = [p_value(differences(corrected, seeds, problems)) < 0.05 / 18 for _ in range(1000)]
        assert 0.74 < np.mean(found) < 0.87 and corrected > 1.3 * size, (seeds, problems)
        assert smallest_difference(pilot, seeds, problems, power=0.95) > 1.1 * size
    for wrong in ((pilot[:1], 3, 10), (pilot, 1, 10), (pilot, 3, 1)):
        with pytest.raises(ValueError, match="two seeds and two problems"):
            smallest_difference(*wrong)


def test_the_smallest_difference_of_a_design_of_its_own() -> None:
    draw = np.random.default_rng(0)
    pilot = draw.standard_normal((300, 1)) / 30 + draw.standard_normal(300) / 5 + draw.standard_normal((300, 300))
    assert detectable_difference(pilot) == pytest.approx(smallest_difference(pilot, 300, 300), rel=1e-3)
    # One seed, 40 problems: the threshold t₀.₉₇₅ and the power's t₀.₈, nearly, times the standard error.
    one = draw.standard_normal((1, 40))
    error = one.std(ddof=1) / 40**0.5
    assert detectable_difference(one) == pytest.approx((2.0227 + 0.851) * error, rel=0.01)
    assert detectable_difference(np.ones((3, 4))) == 0 and detectable_difference(np.ones((1, 1))) == np.inf


def _outcomes(seeds: int) -> pa.Table:
    draw = np.random.default_rng(1)
    rows = [
        {"algorithm": name, "seed": seed, "benchmark": "facts", "problem_id": str(problem), "decoding": "sample"}
        | {"sample": sample, "correct": bool(draw.random() < 0.5), "length": 5}
        for name in ("sft", "kto", "dpo")
        for seed in range(seeds)
        for problem in range(20)
        for sample in range(2)
    ]
    return pa.Table.from_pylist(rows)


@pytest.mark.slow
def test_a_pilot_tells_what_more_seeds_would_detect(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = detectable(experiment, _outcomes(4))
    assert [row["seeds"] for row in rows] == [2, 2, 4] and {row["differences"] for row in rows} == {12}
    assert rows[0]["corrected"] > rows[2]["corrected"] > rows[2]["alone"] > 0
    pq.write_table(_outcomes(1), tmp_path / "outcomes.parquet")
    for wrong, told in (
        (["--pilot", str(tmp_path)], "has no differences with at least two seeds on facts"),
        (["--pilot", str(tmp_path / "none")], "has no outcomes.parquet"),
        (["--gpu", "h1000"], "unknown GPU 'h1000'"),
    ):
        assert cli.main(["plan", "facts", "--gpu", "h100", "--limit", "4", *wrong]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_time_here_is_measured(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(experiment, workers=1)
    speed = found["speed"]
    assert speed["gpu"] is None and speed["flops_per_second"] > 1e6 and speed["tokens_per_second"] > 1
    assert found["lengths"]["assumed"] is None and 1 <= found["lengths"]["sample"] <= 8
    assert found["workers"] == 1 and 0.01 < found["seconds"] < 3600
    assert cli.main(["plan", "facts", "--algorithms", "sft", "--limit", "4", "--json", "--workers", "3"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["workers"] == 3 and [row["algorithm"] for row in again["rows"]] == ["sft"]
