"""`make bench`: what counts as a regression against the committed figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlzoo.experiments.benchmarks import bench

FIGURES = {"speed of sft": 2.0, "speed of dpo": 2.0, "memory of sft": 0.5, "memory of dpo": 0.5}


def test_slower_steps_and_more_memory_are_regressions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"speed of sft": 1.6, "speed of dpo": 2.6, "memory of sft": 0.7, "memory of dpo": 0.4, "speed of new": 1.0}
    monkeypatch.setattr(bench, "measured", lambda repeats: found)
    monkeypatch.setattr(bench, "FIGURES", tmp_path / "figures.json")
    bench.FIGURES.write_text(json.dumps({"figures": FIGURES}))
    assert bench.main([]) == 1
    lines = {line[:20].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["speed of sft"][-2:] == ["0.80", "regression"] and lines["memory of sft"][-2:] == [
        "1.40",
        "regression",
    ]
    assert lines["speed of dpo"][-1] == "1.30" and lines["memory of dpo"][-1] == "0.80", "better is no regression"
    assert lines["speed of new"][-2:] == ["-", "-"]
    assert bench.main(["--save"]) == 0 and json.loads(bench.FIGURES.read_text())["figures"] == found
    assert bench.main([]) == 0


def test_the_committed_figures_are_those_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    if not bench.FIGURES.exists():
        pytest.skip("no figures are committed: python experiments/benchmarks/bench.py --save")
    one = {"tokens_per_cpu_second": 1.0, "peak_memory_bytes": 1.0}
    steps = {name: {"rlzoo": one, "trl_padded": one} for name in bench.OBJECTIVES}
    monkeypatch.setattr(bench, "_run", lambda script, *_: steps if script == "train_step.py" else
                        {"rlzoo": one, "generate": one})  # fmt: skip
    committed = json.loads(bench.FIGURES.read_text(encoding="utf-8"))["figures"]
    assert set(committed) == set(bench.measured(1)) and all(value > 0 for value in committed.values())


def test_the_docs_have_the_committed_figures() -> None:
    figures = json.loads(bench.FIGURES.read_text(encoding="utf-8"))["figures"]
    page = " ".join((Path(__file__).parent.parent / "docs/speed.md").read_text(encoding="utf-8").split())
    told = re.search(r"`make bench` measures such ratios.*?`generate`\.", page)
    assert told is not None
    written = re.findall(r"(?<=[ (])\d\.\d\d\b", told[0])
    names = [f"{what} of {name}" for what in ("speed", "memory") for name in bench.OBJECTIVES]
    assert written == [f"{figures[name]:.2f}" for name in (*names, "speed of sampling")]
