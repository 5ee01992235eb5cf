"""The report of several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from test_report import figures, outcome_rows, save, synthetic_run  # noqa: F401

from rlzoo import cli
from rlzoo.comparison.outcomes import summarise
from rlzoo.comparison.report.schema import read_run
from rlzoo.comparison.report.several import ABSENT, differing, paired

SKILL = {"base": 0.2, "plain": 0.35, "weighted": 0.55}
CHANGED = {"base": 0.2, "plain": 0.45, "other": 0.3}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs in runs/a and runs/b: another learning rate and other algorithms, the same benchmarks."""
    monkeypatch.chdir(tmp_path)
    for name, skill, rate in (("a", SKILL, 1e-4), ("b", CHANGED, 3e-4)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        results = synthetic_run(folder, skill)
        results["config"] = {"name": name, "model": "tiny", "training": {"steps": 40, "learning_rate": rate}}
        results["config"] |= {"chat": None, "algorithms": {row: {"learning_rates": [rate]} for row in [*skill][1:]}}
        save(folder, results)
    return tmp_path


def section(markdown: str, heading: str) -> str:
    return markdown.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_two_runs_are_shown_side_by_side(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "runs/a", "runs/b"]) == 0
    assert capsys.readouterr().out.strip() == "wrote runs/report-a-b/report.html"
    markdown = (folders / "runs" / "report-a-b" / "report.md").read_text()
    opening = markdown.partition("\n## ")[0]
    assert "**a: On sums, weighted has the best avg@4" in opening and "**b: On sums, plain has" in opening
    assert opening.count("![") == 1, "the answers and one figure"
    settings = section(markdown, "Differences in configuration")
    rows = [line for line in settings.splitlines() if line.startswith("| ")]
    assert rows[0] == "| setting | a | b |"
    assert rows[1] == "| training.learning\\_rate | 0.0001 | **0.0003** |", "only settings that differ"
    assert rows[2].startswith("| algorithms.plain.learning\\_rates") and len(rows) == 5
    assert rows[4] == "| algorithms.other | – | **{learning\\_rates: \\[0.0003\\]}** |"
    results = section(markdown, "Results")
    places = [results.index(f"| {algorithm} | {run} |") for algorithm, run in (("plain", "a"), ("plain", "b"))]
    assert places == sorted(places) and "| other | a |" not in results
    differences = section(markdown, "Paired differences")
    assert "| plain | avg@4 |" in differences and "other" not in differences
    assert "| base |" not in differences, "equal throughout"
    assert "rlzoo report runs/a runs/b" in section(markdown, "How to reproduce this")


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_differences_are_those_of_the_same_seeds_and_problems(folders: Path) -> None:
    runs = {name: read_run(folders / "runs" / name) for name in "ab"}
    (row,) = [row for row in paired(runs, "a", "b", "sums") if row["metric"] == "greedy"]
    means = [run.results.row("plain", "sums", "greedy") for run in runs.values()]
    assert means[0] and means[1] and row["difference"] == pytest.approx(means[1].mean - means[0].mean)
    assert row["algorithm"] == "plain" and row["seeds"] == 3 and row["problems"] == 30
    rows = outcome_rows(CHANGED, seeds=2)
    for own in rows:
        if own["problem_id"] == "sums-003":
            own["prompt"] = "another question"
    results = synthetic_run(folders / "runs" / "b", CHANGED)
    results["summary"] = summarise(pa.Table.from_pylist(rows), 2)
    save(folders / "runs" / "b", results, pa.Table.from_pylist(rows))
    runs["b"] = read_run(folders / "runs" / "b")
    found: list[dict[str, Any]] = paired(runs, "a", "b", "sums")
    assert {(own["seeds"], own["problems"]) for own in found if own["algorithm"] == "plain"} == {(2, 29)}
    assert cli.main(["report", "runs/a", "runs/b", "--out", "page"]) == 0
    assert "30 in a, 30 in b; 29 are common to all" in (folders / "page" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_a_study_is_reported_outside_of_the_package(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "facts"]) == 0 and (folders / "runs" / "report-facts" / "report.html").is_file()
    assert cli.main(["report", "runs/a", "--out", "elsewhere"]) == 0
    assert "steps: 40" in (folders / "elsewhere" / "experiment.yaml").read_text(), "what the report says to run again"
    assert (folders / "elsewhere" / "report.md").is_file() and not (folders / "runs" / "a" / "report.md").exists()
    capsys.readouterr()
    for wrong, reason in (
        (["runs/a", "runs/none"], "does not exist"),
        (["runs/a", "runs/a"], "the same run twice"),
        (["runs/a", "runs/b", "--baseline", "plain"], "for the report of one comparison"),
    ):
        assert cli.main(["report", *wrong]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1


def test_settings_that_differ_are_found_at_any_depth() -> None:
    one = {"name": "x", "a": {"b": 1, "c": {"d": 2}}, "e": None, "f": [1]}
    two = {"name": "y", "a": {"b": 1, "c": {"d": 3}}, "f": [1, 2], "g": "h"}
    expected = [("a.c.d", [2, 3]), ("f", [[1], [1, 2]]), ("g", [ABSENT, "h"])]
    assert list(differing([one, two])) == expected
    assert list(differing([one, one])) == []
