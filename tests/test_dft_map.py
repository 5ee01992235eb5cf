"""The map of DFT against SFT: its fields, its statistics, and a run that resumes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from comparisons import inline_pool

import rlzoo
from rlzoo.buffers.problems import load_problems
from rlzoo.cli import pages
from rlzoo.comparison import runner
from rlzoo.comparison.statistics import p_value
from rlzoo.comparison.studies import STUDIES
from rlzoo.config import Experiment, load_experiment
from rlzoo.document.exports import to_csv
from rlzoo.experiments import dft_map
from rlzoo.experiments.dft_map import Field


@pytest.mark.slow
def test_the_corners_come_first_and_fields_differ_only_where_they_say() -> None:
    every = dft_map.fields()
    assert len({field.name for field in every}) == len(every) == 24
    assert {(f.steps, f.terms) for f in every[:8]} == {(s, t) for s in (1200, 3200) for t in (2, 4)}
    one, three = (Field(1600, styles, 4).experiment(Path("bases")) for styles in (1, 3))
    assert one.model == "bases/step-1600" and Field(3200, 1, 2).experiment(Path("bases")).model == "embedded"
    alike = {"name", "train", "benchmarks"}
    assert one.model_dump(exclude=alike) == three.model_dump(exclude=alike)
    assert [list(e.benchmarks.values()) for e in (one, three)] == [[one.benchmarks["steps-1600-styles-1-terms-4"]]] * 2
    problems = [load_problems(e.train) for e in (one, three)]
    assert [p.prompt for p in problems[0]] == [p.prompt for p in problems[1]] and len(problems[0]) == 2000
    assert all(len(p.solutions) == 1 and ";" in p.solutions[0] for p in problems[0])
    assert {p.solutions[0][0] == "=" for p in problems[1][:3]} == {True, False}


def outcomes_of(right: dict[Field, dict[str, list[list[bool]]]]) -> pa.Table:
    """Outcomes with one sample and one greedy answer per seed × problem, the same in both."""
    rows = [
        {
            "algorithm": algorithm,
            "seed": -1 if algorithm == "base" else seed,
            "benchmark": field.name,
            "problem_id": f"p{problem}",
            "decoding": decoding,
            "sample": sample,
            "correct": correct,
        }
        for field, by_algorithm in right.items()
        for algorithm, seeds in by_algorithm.items()
        for seed, answers in enumerate(seeds)
        for problem, correct in enumerate(answers)
        for decoding, samples in (("sampled", 4), ("greedy", 1))
        for sample in range(samples)
    ]
    return pa.Table.from_pylist(rows)


LOW = {"base": [[False] * 4], "sft": [[True, False, False, False]] * 2, "dft": [[True, True, False, False]] * 2}
HIGH = {"base": [[True] * 4], "sft": [[True, True, True, True]] * 2, "dft": [[True, False, False, True]] * 2}


@pytest.mark.slow
def test_differences_and_effects_are_those_of_the_outcomes() -> None:
    fields = {Field(1200, 1, 2): LOW, Field(1200, 3, 2): HIGH}
    rows = dft_map.differences(outcomes_of(fields))
    found = {(row["styles"], row["metric"]): row for row in rows}
    # low: SFT has 1 of 4 problems right and DFT 2 of 4; high: 4 of 4 and 2 of 4
    assert {key: row["difference"] for key, row in found.items()} == {
        (styles, metric): change for styles, change in ((1, 0.25), (3, -0.5)) for metric in ("avg_at_k", "greedy")
    }
    assert [found[3, "greedy"][name] for name in ("base", "sft", "dft")] == [1.0, 1.0, 0.5]
    # Holm's method over four differences: the smaller p, that of three styles, counts 4 times, the larger twice
    one, three = (p_value(np.array([answers] * 2)) for answers in ([0, 1, 0, 0], [0, -1, -1, 0]))
    assert found[3, "greedy"]["p"] == pytest.approx(4 * three) and found[1, "greedy"]["p"] == pytest.approx(2 * one)
    styles = [row for row in dft_map.effects(outcomes_of(fields)) if row["axis"] == "styles"]
    assert [row["difference"] for row in styles] == [-0.75, -0.75] and [row["pairs"] for row in styles] == [1, 1]
    assert not [row for row in dft_map.effects(outcomes_of(fields)) if row["axis"] == "steps"]  # no pair of bases
    table = to_csv(dft_map.effect_table(styles)).splitlines()
    assert table[1].startswith('styles demonstrated: 1 to 3,avg@4,1,"−75.0 [−') and len(table) == 3
    assert to_csv(dft_map.difference_table(rows)).splitlines()[1].startswith("1200 steps,1,2,avg@4,0.0,25.0,50.0,")
    svg = dft_map.drawn(rows)
    assert "+25.0" in svg and "−50.0" in svg and "base 100" in svg


@pytest.mark.slow
def test_a_map_is_run_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny(name: str, changes: dict[str, Any]) -> Experiment:
        less = {
            "model": "embedded",
            "train.limit": 4,
            "validation.limit": 2,
            "training.steps": 1,
            "training.batch_size": 2,
            "seeds": [0, 1],
            "algorithms": {"sft": {}, "dft": {}},
        }
        (benchmark,) = changes["benchmarks"]
        few = {benchmark: {**changes["benchmarks"][benchmark], "limit": 3}}
        return load_experiment(name, {**changes, **less, "benchmarks": few})

    monkeypatch.setattr(dft_map, "load_experiment", tiny)
    monkeypatch.setattr(runner, "pool", inline_pool)
    monkeypatch.setattr(runner, "write_report", lambda *_: None)
    command = ["dft_map", "--bases", "none", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "map")]
    for fields in (1, 2):
        monkeypatch.setattr(sys, "argv", [*command, "--fields", str(fields)])
        dft_map.main()
    outcomes = pq.read_table(tmp_path / "map" / "outcomes.parquet")
    files = {path: path.read_bytes() for path in (tmp_path / "map").iterdir() if path.suffix != ".parquet"}
    monkeypatch.setattr(rlzoo, "compare", lambda *_: pytest.fail("a field of the map was run again"))
    extra = outcomes_of({Field(1200, 3, 2): LOW})  # as if killed after a third field's outcomes, before map.json
    pq.write_table(pa.concat_tables([outcomes, extra.cast(outcomes.schema)]), tmp_path / "map" / "outcomes.parquet")
    dft_map.main()
    assert not [path.name for path in files if path.read_bytes() != files[path]]
    assert pq.read_table(tmp_path / "map" / "outcomes.parquet").equals(outcomes)
    found = json.loads((tmp_path / "map" / "map.json").read_text())
    assert [row["metric"] for row in found["differences"]] == ["avg_at_k", "greedy"] * 2
    assert len(list((tmp_path / "runs").iterdir())) == 2 == len(found["validation"])
    assert sorted(path.name for path in (tmp_path / "map").iterdir()) == [
        "differences.csv", "effects.csv", "map.json", "map.svg", "outcomes.parquet",
    ]  # fmt: skip
    page = f"<!-- table: {tmp_path / 'map'} differences; rows: 1200 steps; columns: terms, metric, base -->\n"
    shown, _ = pages.refreshed(page, tmp_path)
    assert shown.splitlines()[1:3] == ["| base | terms | metric | base (%) |", "|:---|---:|---:|---:|"]
    assert len(shown.splitlines()) == 3 + 4, "two fields of the weakest base, in two metrics"


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in STUDIES.glob("*/map.json")), ids=lambda path: path.name
)
def test_a_committed_map_follows_from_its_outcomes(folder: Path) -> None:
    found = json.loads((folder / "map.json").read_text(encoding="utf-8"))
    outcomes = pq.read_table(folder / "outcomes.parquet")
    for name, rows in (("differences", dft_map.differences(outcomes)), ("effects", dft_map.effects(outcomes))):
        assert len(found[name]) == len(rows)
        made = dft_map.difference_table(rows) if name == "differences" else dft_map.effect_table(rows)
        assert (folder / f"{name}.csv").read_text(encoding="utf-8") == to_csv(made)
        for kept, again in zip(found[name], rows, strict=True):
            assert kept == pytest.approx(again)
