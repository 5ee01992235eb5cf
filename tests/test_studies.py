"""Studies that ship with rlzoo: their summaries follow from their outcomes, and commands read them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from comparisons import inline_pool, small
from test_report import synthetic_run

from rlzoo import cli
from rlzoo.comparison import runner, studies
from rlzoo.comparison.outcomes import compare_to, summarise
from rlzoo.comparison.report import write_report
from rlzoo.comparison.report.contents import contents
from rlzoo.comparison.report.schema import read_run
from rlzoo.document import Block, Entry, Figure, Heading, Table
from rlzoo.document.exports import export, to_csv, to_latex

STUDIES = studies.list_studies()


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_a_study_is_a_run_that_can_be_reported_again(study: str, tmp_path: Path) -> None:
    folder = studies.study_folder(study)
    run = read_run(folder)
    assert len(run.results.cells) == len(list((folder / "cells").iterdir()))
    assert not re.search(r'"/(tmp|home|root|work)', (folder / "results.json").read_text())
    assert run.results.failed == [] and run.results.versions["torch"]
    fresh = {(r["algorithm"], r["benchmark"], r["metric"]): r for r in summarise(run.outcomes, run.results.k)}
    for row in (*run.results.summary, *run.results.base_summary):
        again = fresh[row.algorithm, row.benchmark, row.metric]
        assert [again[k] for k in ("mean", "ci_low", "ci_high")] == pytest.approx([row.mean, row.ci_low, row.ci_high])
    order = run.outcomes["algorithm"].unique().to_pylist()
    assert list(dict.fromkeys(name for name, _, _ in run.matrices)) == order, "of threads, not of rows"
    files = export(contents(run, None), tmp_path, "csv")
    assert len({file.name for file in files}) == len(files) >= 4
    first = list(csv.reader(files[0].open(encoding="utf-8")))
    assert [row[0] for row in first[1:]] == ["base", *run.results.algorithms]


@pytest.mark.slow
@pytest.mark.usefixtures("sketched")
def test_a_run_becomes_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "pool", inline_pool)
    monkeypatch.setattr(runner, "write_report", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    results = runner.compare(small({"sft": {}, "dft": {}}, seeds=[0, 1]), tmp_path / "run")
    assert cli.main(["results", "save", "run", "--to", "studies"]) == 0
    study = tmp_path / "studies" / "facts"
    assert sorted(path.name for path in study.iterdir()) == ["cells", "outcomes.parquet", "results.json"]
    before, after = (read_run(folder) for folder in (tmp_path / "run", study))
    same = [
        found.results.model_copy(
            update={"cells": [cell.model_copy(update={"training": []}) for cell in found.results.cells]}
        )
        for found in (before, after)
    ]
    assert same[0] == same[1] and after.outcomes.equals(before.outcomes)
    cell = json.loads((study / "cells" / "sft-lr5e-05-seed1.json").read_text())
    kept, whole = cell["training"], next(c for c in results["cells"] if c["seed"] == 1 and c["algorithm"] == "sft")
    assert cell["costs"] == whole["costs"] and kept[1]["loss"] == pytest.approx(whole["training"][1]["loss"], rel=1e-4)
    write_report(study)
    assert (study / "report.html").is_file()
    (row,) = [
        row for row in studies.compare_studies("dft", "sft", [str(study), str(study)]) if row["metric"] == "greedy"
    ]
    expected = [
        r
        for r in compare_to(before.outcomes, "sft", before.results.k)
        if (r["algorithm"], r["metric"]) == ("dft", "greedy")
    ]
    assert {key: row[key] for key in ("difference", "ci_low", "seeds")} == {
        key: expected[0][key] for key in ("difference", "ci_low", "seeds")
    }
    capsys.readouterr()
    assert cli.main(["results", "show", str(study), "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (shown,) = [
        row for row in told["differences"] if (row["algorithm"], row["benchmark"], row["metric"]) == (
            "dft", expected[0]["benchmark"], "greedy",
        )
    ]  # fmt: skip
    assert {key: shown[key] for key in ("difference", "ci_low", "p")} == {
        key: expected[0][key] for key in ("difference", "ci_low", "p")
    }
    assert told["baseline"] == "sft" and {row["algorithm"] for row in told["summary"]} == {"sft", "dft"}
    assert cli.main(["results", "export", str(study), "--format", "latex"]) == 0
    written = capsys.readouterr().out.split()
    assert written[0] == "facts-tables/results-facts.tex" and r"\toprule" in (tmp_path / written[0]).read_text()
    assert cli.main(["results", "save", "run", "--to", "studies"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_an_analysis_becomes_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    included = studies.study_folder("both-worlds") / "variance.json"
    assert studies.list_analyses() == ["both-worlds"] and not re.search(r'"/(tmp|home|root|work)', included.read_text())
    monkeypatch.chdir(tmp_path)
    (run := tmp_path / "run").mkdir()
    measured = json.loads(included.read_text())
    measured["objectives"]["dft"]["data_noise"]["noise_scale"]["value"] = 594.1234567
    (run / "variance.json").write_text(json.dumps(measured))
    assert cli.main(["results", "save", "run", "--to", "studies"]) == 0
    study = tmp_path / "studies" / "both-worlds"
    assert [path.name for path in study.iterdir()] == ["variance.json"]
    kept = json.loads((study / "variance.json").read_text())
    assert kept["objectives"]["dft"]["data_noise"]["noise_scale"]["value"] == 594.123
    assert cli.main(["results", "save", "run", "--to", "studies"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["results", "export", "both-worlds", "--format", "csv"]) == 0
    (table,) = [line for line in capsys.readouterr().out.split() if line.endswith("/over-the-data.csv")]
    rows = csv.reader(Path(table).read_text(encoding="utf-8").splitlines())
    assert ["dft", "0.437 [0.36, 0.53]"] in [row[:2] for row in rows]


def test_cells_that_studies_share_count_once_and_equal_results_do_not(tmp_path: Path) -> None:
    """All differences of two perfect algorithms are 0, on every benchmark and by every metric."""
    synthetic_run(tmp_path, {"base": 0.5, "dft": 1.0, "sft": 1.0})
    once, twice = (studies.compare_studies("dft", "sft", [str(tmp_path)] * times) for times in (1, 2))
    matrices = read_run(tmp_path).matrices
    assert {(row["benchmark"], row["metric"]) for row in once} == {key[1:] for key in matrices if key[0] == "dft"}
    assert once == twice and {row["difference"] for row in once} == {0.0}


@pytest.mark.slow
def test_the_command_looks_up_what_ships(capsys: pytest.CaptureFixture[str]) -> None:
    for command, told in (
        (["results"], ["arithmetic", "zoo", "28"]),
        (["results", "show", "facts"], ["unseen-facts", "71.2"]),
        (["results", "compare", "dft", "sft"], ["arithmetic:", "+2.5"]),
    ):
        assert cli.main(command) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert all(word in out for word in told), command
    for wrong, reason in (
        (["show"], "takes one name, not 0"),
        (["compare", "sft"], "takes two algorithms, not 1"),
        (["compare", "sft", "sftt"], "unknown algorithm 'sftt'"),
        (["compare", "otr", "grpo-online"], "no study has both 'otr' and 'grpo-online'"),
        (["show", "none"], "unknown study 'none'"),
    ):
        assert cli.main(["results", *wrong]) == 2
        lines = capsys.readouterr().err.splitlines()
        (error,) = [line for line in lines if not re.match(r" +\d+:\d\d:\d\d ", line)]  # progress on a slow machine
        assert reason in error


@pytest.mark.slow
def test_every_figure_becomes_a_pdf_with_its_fonts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["results", "export", "new-format", "--format", "pdf"]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {file.parent.name for file in written} == {"new-format-figures"}
    blocks = [block for block in contents(studies.read_study("new-format"), None) if isinstance(block, Figure)]
    assert [file.stem for file in written] == [block.name for block in blocks] and len(written) >= 5
    for file in written:
        content = file.read_bytes()
        assert content.startswith(b"%PDF") and b"/FontFile2" in content, "TrueType, embedded"
        assert b"/CreationDate" not in content
    assert written[0].read_bytes() == blocks[0].drawing.pdf(), "the same bytes each time"


def test_tables_under_one_heading_have_names_of_their_own(tmp_path: Path) -> None:
    table = Table(["a"], [[Entry("1")]])
    blocks: list[Block] = [Heading("T", level=1), Heading("Costs"), table, table, Heading("a / b", level=3), table]
    files = export(blocks, tmp_path, "csv")
    assert [file.name for file in files] == ["costs.csv", "costs-2.csv", "costs-a-b.csv"]
    assert export(blocks, tmp_path, "pdf") == []


def test_tables_in_other_forms() -> None:
    table = Table(["a_b", "50 %"], [[Entry('x & y, "z"'), Entry("−1", best=True)], [Entry("<2~"), Entry("3")]])
    assert list(csv.reader(to_csv(table).splitlines())) == [["a_b", "50 %"], ['x & y, "z"', "−1"], ["<2~", "3"]]
    lines: list[Any] = to_latex(table).splitlines()
    assert lines[0] == r"\begin{tabular}{lr}" and lines[2] == r"a\_b & 50 \% \\"
    assert lines[4:6] == [r"x \& y, " + '"z"' + r" & \textbf{$-$1} \\", r"$<$2\textasciitilde{} & 3 \\"]
