"""The report of a comparison, on a synthetic run of three algorithms, two benchmarks and three seeds."""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rich.console
from browser import CHROMIUM, Browser

from rlzoo.comparison.outcomes import METRICS, OVERALL, compare_to, summarise
from rlzoo.comparison.report import plots, report_table, tables, write_report
from rlzoo.comparison.report.answer import answer, headline, unfinished
from rlzoo.comparison.report.contents import contents
from rlzoo.comparison.report.differences import detectable
from rlzoo.comparison.report.learned import learned_and_kept
from rlzoo.comparison.report.plots import curves_of
from rlzoo.comparison.report.reported import reported
from rlzoo.comparison.report.schema import parse_results, read_run
from rlzoo.comparison.report.tables import amount, points, seconds, significance
from rlzoo.document import Answer, Answers, Block, Code, Entry, Heading, Paragraph, Table
from rlzoo.document.blocks import sort_value
from rlzoo.document.drawing import PAPER, Drawing
from rlzoo.document.page import render_html
from rlzoo.errors import UserError

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
EVIL = "<script>document.title='owned'</script>"
SKILL = {"base": 0.2, "plain": 0.35, "weighted": 0.55, "paired": 0.3}
BENCHMARKS = ("sums", "longer sums")
SAMPLES, PROBLEMS, K = 4, 30, 2
COSTS = {
    "gradient_tokens": 1_234_567,
    "sampled_tokens": 0,
    "flops": 3.21e12,
    "wall_seconds": 71.4,
    "peak_memory_bytes": 812_000_000,
}


def outcome_rows(skill: dict[str, float], seeds: int) -> list[dict[str, Any]]:
    rows = []
    for algorithm, chance in skill.items():
        for seed in [-1] if algorithm == "base" else range(seeds):
            rng = np.random.default_rng([seed + 1, len(algorithm)])
            for benchmark in BENCHMARKS:
                for problem in range(PROBLEMS):
                    ease = chance * (0.6 if benchmark == "longer sums" else 1) * 2 * (problem + 0.5) / PROBLEMS
                    rows += [
                        {
                            "algorithm": algorithm,
                            "seed": seed,
                            "learning_rate": None if seed < 0 else 1e-4,
                            "benchmark": benchmark,
                            "problem_id": f"{benchmark}-{problem:03}",
                            "prompt": f"What is {EVIL} of {problem}?",
                            "decoding": "sample" if sample < SAMPLES else "greedy",
                            "sample": sample % SAMPLES,
                            "reward": float(correct),
                            "correct": bool(correct),
                            "length": 12,
                            "truncated": False,
                            "text": f"3 + 4 = 7, 7 * {sample}\n# {7 * sample} & `{EVIL}`\n```\nend",
                        }
                        for sample, correct in enumerate(rng.random(SAMPLES + 1) < ease)
                    ]
    return rows


def metrics_of(summary: list[dict[str, Any]], algorithm: str) -> dict[str, dict[str, Any]]:
    rows = [row for row in summary if row["algorithm"] == algorithm]
    return {
        benchmark: {row["metric"]: row["mean"] for row in rows if row["benchmark"] == benchmark}
        | {"k": K, "samples": SAMPLES}
        for benchmark in BENCHMARKS
    }


def curve_point(step: int, skill: float, rng: np.random.Generator) -> dict[str, Any]:
    value = 0.2 + (skill - 0.2) * step / 40 + 0.02 * rng.random()
    return {"step": step, "metrics": {benchmark: {"avg_at_k": value, "greedy": None} for benchmark in BENCHMARKS}}


def synthetic_run(directory: Path, skill: dict[str, float] | None = None, seeds: int = 3) -> dict[str, Any]:
    """Write a complete run directory; its results are returned for a test to alter."""
    results, table = made(tuple((skill or SKILL).items()), seeds)
    save(directory, results, table)
    return copy.deepcopy(results)


@functools.cache
def made(skills: tuple[tuple[str, float], ...], seeds: int) -> tuple[dict[str, Any], pa.Table]:
    """The results and outcomes of a run, computed once."""
    skill = dict(skills)
    table = pa.Table.from_pylist(outcome_rows(skill, seeds))
    summary = summarise(table, K)
    names = [name for name in skill if name != "base"]
    rng = np.random.default_rng(0)
    edges = np.linspace(0, 1, 21)
    cells = [
        {
            "algorithm": name,
            "seed": seed,
            "learning_rate": 1e-4,
            "metrics": metrics_of(summary, name),
            "costs": COSTS,
            "curve": [curve_point(step, skill[name], rng) for step in (0, 10, 20, 30, 40)],
            "training": [{"step": 1, "loss": 0.3, "gradient_norm": 1.0}],
            "token_probabilities": np.histogram(rng.beta(0.6 - skill[name] / 2, 0.3, 5000), edges)[0].tolist(),
        }
        for name in names
        for seed in range(seeds)
    ]
    before = np.histogram(rng.beta(0.7, 0.5, 5000), edges)[0].tolist()
    error = f"RuntimeError: {EVIL}\nat x"
    results = {
        "experiment": "default",
        "description": "Three ways to learn sums.",
        "created": "2026-11-22T10:00:00+00:00",
        "versions": {"rlzoo": "0.1.0", "torch": "2.13.0"},
        "config": {"model": "tiny", "training": {"steps": 40}},
        "base": metrics_of(summary, "base"),
        "cells": cells,
        "summary": summary,
        "token_probabilities": {"edges": edges.tolist(), "before": before},
        "learning_rates": {name: {"1e-05": 0.21, "0.0001": 0.36} for name in names},
        "wall_seconds": 251.0,
        "failed": [{"algorithm": names[-1], "seed": 7, "learning_rate": 1e-3, "error": error}],
    }
    return results, table


def save(directory: Path, results: dict[str, Any], table: pa.Table | None = None) -> None:
    (directory / "results.json").write_text(json.dumps(results))
    if table is not None:
        pq.write_table(table, directory / "outcomes.parquet")


class Page(HTMLParser):
    """What a browser would see: the tags, the ids, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data


def read(directory: Path) -> tuple[str, str]:
    return (directory / "report.html").read_text(), (directory / "report.md").read_text()


def outside_fences(markdown: str) -> str:
    return re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def figures(sketched: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that would be drawn."""
    drawn: list[Any] = []

    def drawing(figure: Any) -> Drawing:
        drawn.append(figure)
        return Drawing(figure)

    monkeypatch.setattr(plots, "Drawing", drawing)
    return drawn


@pytest.mark.slow
def test_report_has_all_parts_in_order(tmp_path: Path) -> None:
    synthetic_run(tmp_path)
    write_report(tmp_path)
    source, markdown = read(tmp_path)
    headings = [
        "Comparison: default",
        "Results",
        "Differences from plain",
        "Learned and kept",
        "Robustness",
        "Learning curves",
        "Token probabilities",
        "Costs",
        "Learning rates",
        "Failed cells",
        "The same problems, side by side",
        "How to reproduce this",
    ]
    for text in (Page(source).text, markdown):
        places = [text.rindex(heading) for heading in headings]
        assert places == sorted(places)
        assert "rlzoo compare experiment.yaml" in text
        assert "1.23 M" in text and "812 MB" in text and "3.21 T" in text and "1 min 11 s" in text
    assert "steps: 40" in markdown
    assert "mathdefault" not in source, "no TeX shows"
    assert [path.name for path in tmp_path.glob(".*")] == [], "no temporary file is left"


def test_what_the_base_gets_wrong_is_told_apart_from_what_it_gets_right(tmp_path: Path) -> None:
    synthetic_run(tmp_path)
    table = next(block for block in learned_and_kept(read_run(tmp_path), "plain") if isinstance(block, Table))
    greedy = [r for r in outcome_rows(SKILL, 3) if r["decoding"] == "greedy" and r["benchmark"] == BENCHMARKS[0]]
    by_base = {row["problem_id"]: row["correct"] for row in greedy if row["algorithm"] == "base"}
    counts = [list(by_base.values()).count(right) for right in (False, True)]
    assert min(counts) > 1
    assert table.header == ["algorithm", f"learned of {counts[0]} (%)", f"kept of {counts[1]} (%)"]
    assert [row[0].text for row in table.rows] == ["plain", "weighted", "paired"]
    for name, *entries in table.rows:
        for right, entry in zip((False, True), entries, strict=True):
            own = [r["correct"] for r in greedy if r["algorithm"] == name.text and by_base[r["problem_id"]] is right]
            value, low, high = map(float, re.findall(r"[\d.]+", entry.text))
            assert value == pytest.approx(100 * np.mean(own), abs=0.06) and low < value < high


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_events_of_training_are_in_the_report(tmp_path: Path) -> None:
    results = synthetic_run(tmp_path)
    told = "12 of 16 groups drawn have equal rewards and therefore no gradient"
    for cell in results["cells"]:
        cell["events"] = [told] if cell["algorithm"] == "plain" and cell["seed"] > 0 else []
    save(tmp_path, results)
    write_report(tmp_path)
    source, markdown = read(tmp_path)
    assert f"| plain | 1, 2 | 0.0001 | {told} |" in markdown and markdown.count(told) == 1
    assert "Events in training" in Page(source).text and told in Page(source).text


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_what_was_done_to_the_data_is_in_the_report(tmp_path: Path) -> None:
    results = synthetic_run(tmp_path)
    write_report(tmp_path)
    assert "Events before training" not in read(tmp_path)[1]
    dropped = {"train": {"count": 2, "of": 9, "first": ["rows.jsonl line 3 is not JSON"]}}
    save(tmp_path, results | {"dropped_rows": dropped, "events": ["4 samples were computed"]})
    write_report(tmp_path)
    source, markdown = read(tmp_path)
    for line in (
        "Events before training",
        "train: dropped 2 of 9 rows",
        "rows.jsonl line 3",
        "4 samples were computed",
    ):
        assert line in Page(source).text
    assert "dropped 2 of 9 rows" in markdown


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_further_metrics_and_the_mean_over_benchmarks_are_in_the_report(tmp_path: Path) -> None:
    results = synthetic_run(tmp_path)
    write_report(tmp_path)
    assert "Further metrics" not in read(tmp_path)[1]
    results["metrics"] = {
        "avg_at_k": {"label": "avg@4", "unit": "%"},
        "maj": {"label": "maj@4 <b>", "unit": "%"},
        "nats": {"label": "log-likelihood", "unit": "nats per token"},
        "none": {"label": "nowhere", "unit": "%"},
    }
    for scores in (results["base"], *(cell["metrics"] for cell in results["cells"])):
        scores["sums"] |= {"maj": 0.5, "nats": -1.25}
    for seed, value in enumerate((0.1, 0.2, 0.6)):
        next(c for c in results["cells"] if (c["algorithm"], c["seed"]) == ("plain", seed))["metrics"]["sums"][
            "maj"
        ] = value
    scores = {"avg_at_k": 0.4, "pass_at_k": 0.7}
    results["mean_over_benchmarks"] = {"base": scores, "plain": scores | {"avg_at_k": 0.3, "maj": 0.25}}
    save(tmp_path, results)
    write_report(tmp_path)
    source, markdown = read(tmp_path)
    assert "<b>" not in source
    section = markdown.partition("## Further metrics")[2].partition("\n## ")[0]
    assert "| plain | 30.0 | −1.25 |" in section and "| weighted | 50.0 | −1.25 |" in section
    assert "nowhere" not in section and "| base | – |" in section and "| plain | 25.0 |" in section


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_the_mean_over_benchmarks_is_reported_like_a_benchmark(tmp_path: Path) -> None:
    results = synthetic_run(tmp_path)
    write_report(tmp_path)
    markdown = read(tmp_path)[1]
    scores, differences, *_ = markdown.split("### mean over benchmarks\n")[1:]
    rows = {(row["algorithm"], row["benchmark"]): row for row in results["summary"] if row["metric"] == "avg_at_k"}
    for name in ("base", "plain", "weighted"):
        row, each = rows[name, OVERALL], [rows[name, benchmark] for benchmark in BENCHMARKS]
        assert row["mean"] == pytest.approx(sum(one["mean"] for one in each) / 2)
        assert row["ci_low"] < row["mean"] < row["ci_high"]
        low, high = (f"{100 * row[end]:.1f}" for end in ("ci_low", "ci_high"))
        assert re.search(rf"\*?{100 * row['mean']:.1f} \[{low}, {high}\]", scores)
    assert "| algorithm | avg@4 (%) | greedy (%) | pass@2 (%) | seeds |" in scores
    assert "| algorithm | avg@4 (points) | greedy (points) | pass@2 (points) |" in differences and ", p" in differences
    assert "By the mean over benchmarks, weighted has the best avg@4" in markdown
    titles = [str(table.title) for table in report_table(results)]
    assert titles[2:] == ["mean over benchmarks: mean and 95 % interval", "costs: mean of a cell"]


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_answer_follows_from_the_data(tmp_path: Path) -> None:
    results = synthetic_run(tmp_path, SKILL | {"weighted": 0.9})
    write_report(tmp_path)
    mean = next(
        row["mean"] for row in results["summary"]
        if (row["algorithm"], row["benchmark"], row["metric"]) == ("weighted", "sums", "avg_at_k")
    )  # fmt: skip
    lead = next(line for line in read(tmp_path)[1].splitlines() if line.startswith("**On sums"))
    assert f"weighted has the best avg@4: {100 * mean:.1f} %" in lead
    assert "points over plain, the runner-up" in lead and "the two are distinguishable here" in lead
    assert lead.endswith("It also leads in greedy decoding and pass@2.**")


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_distinguishable_is_meant_after_correction(tmp_path: Path) -> None:
    """The interval of the best two alone excludes 0; for one of three pairs, that says too little."""
    synthetic_run(tmp_path)
    write_report(tmp_path)
    _, markdown = read(tmp_path)
    lead = next(line for line in markdown.splitlines() if line.startswith("**On sums"))
    found = re.search(r"interval \+(\S+) to \+(\S+); p = (\S+), Holm-corrected for 3 pairs\): the two are not d", lead)
    assert found is not None and 0 < float(found[1]) < float(found[2]) and float(found[3]) > 0.05
    entries = differences_shown(markdown)
    assert len(entries) == 2 * (len(BENCHMARKS) + 1) * 3, "of each benchmark and of their mean"
    matches = [re.search(r"\[.*\], p (?:= ([\d.e-]+)|&lt; 0.001)", entry) for entry in entries]
    p_values = [float(each[1] or 0) for each in matches if each]
    assert len(p_values) == len(entries), "the uncorrected interval beside the p-value"
    assert 0 < sum(p < 0.05 for p in p_values) < len(p_values)
    assert [entry.startswith("**") for entry in entries] == [p < 0.05 for p in p_values]


def differences_shown(markdown: str) -> list[str]:
    """The entries of the tables of differences, but for the base model's."""
    section = markdown.partition("## Differences from")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| (weighted|paired) ", line)]
    return [entry.strip() for row in rows for entry in row.strip("|").split("|")[1:]]


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_the_report_says_what_its_intervals_leave_out(tmp_path: Path) -> None:
    results = synthetic_run(tmp_path)
    write_report(tmp_path)
    assert "one base model, learned from one buffer" in read(tmp_path)[1]
    results["config"]["rollouts"] = {"per_seed": True}
    save(tmp_path, results)
    write_report(tmp_path)
    assert "one base model, learned from one set of training problems" in read(tmp_path)[1]


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_measured_variance_stands_next_to_the_results(tmp_path: Path) -> None:
    results = synthetic_run(tmp_path)
    write_report(tmp_path)
    assert "Variance of gradients" not in read(tmp_path)[1]
    ratio = {"value": 0.44, "ci_low": 0.35, "ci_high": 0.51}
    hidden = {"value": None, "ci_low": 391.0, "ci_high": None}
    noise = {"norm_ratio_to_sft": ratio, "noise_scale": hidden}
    found = {"model": "tiny", "created": "2026-11-22T11:00", "objectives": {"weighted": {"data_noise": noise}, "x": {}}}
    (tmp_path / "variance").mkdir()
    (tmp_path / "variance" / "variance.json").write_text(json.dumps(found))
    write_report(tmp_path)
    row = next(r for r in results["summary"] if (r["algorithm"], r["metric"]) == ("weighted", "avg_at_k"))
    shown = f"{100 * row['mean']:.1f} [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
    section = read(tmp_path)[1].partition("## Variance of gradients")[2].partition("\n## ")[0]
    assert f"| weighted | {shown} | 0.44 [0.35, 0.51] | – | – | &gt; 391 |" in section
    assert "| x | – | – | – | – | – |" in section, "an objective that the comparison does not have"
    (tmp_path / "variance" / "variance.json").write_text("{}")
    with pytest.raises(UserError, match="was not written by rlzoo variance"):
        write_report(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_answer_owns_up_to_a_tie_and_to_a_better_base(tmp_path: Path) -> None:
    synthetic_run(tmp_path, {"base": 0.9, "plain": 0.30, "other": 0.31}, seeds=1)
    write_report(tmp_path)
    text = Page(read(tmp_path)[0]).text
    assert "the two are not distinguishable here" in text
    assert re.search(r"The base model, at \d+\.\d %, is not below it", text)


@pytest.mark.slow
def test_model_output_and_names_show_as_text(tmp_path: Path) -> None:
    synthetic_run(tmp_path, {"base": 0.2, EVIL: 0.4, "a|b `$x_1$": 0.5})
    write_report(tmp_path)
    source, markdown = read(tmp_path)
    page = Page(source)
    assert page.tags.count("script") == 1, "the page's own"
    assert not page.open, "every element is closed"
    assert page.text.count(EVIL) > 10, "in tables, figures and completions"
    assert "<script" not in outside_fences(markdown)
    assert r"a\|b \`\$x\_1\$" in markdown
    assert EVIL in markdown, "inside the fences it stands as the model wrote it"
    for drawing in (tmp_path / "figures").iterdir():
        assert "<script" not in drawing.read_text()


def shown(page: Path) -> str:
    """The page as a browser has it after its scripts ran."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@needs_chromium
def test_a_browser_runs_nothing_that_a_model_wrote(tmp_path: Path) -> None:
    synthetic_run(tmp_path, {"base": 0.2, EVIL: 0.4})
    write_report(tmp_path)
    source, _ = read(tmp_path)
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)  # the policy would hide a mistake
    assert bare != source
    (tmp_path / "bare.html").write_text(bare)
    (tmp_path / "broken.html").write_text(bare.replace("<main>", f"<main>{EVIL}"))
    assert "<title>owned</title>" in shown(tmp_path / "broken.html"), "this browser would run it"
    page = shown(tmp_path / "bare.html")
    assert "<title>owned</title>" not in page and page.count("&lt;script&gt;document.title") > 10


def table_page(tmp_path: Path) -> Path:
    """A page with a table, answers and wide content, and what a model wrote among it."""
    rows = [
        ("b10", "−1.5 [−3.0, 0.0], p = 0.5", "2 h 5 min", "x"),
        ("b9", "+12.0 [1.0, 23.0], p < 0.001", "41 s", EVIL),
        ("a", "–", "3 min 20 s", "y"),
        ("c", "2.5 [1.0, 4.0], p = 0.04", "0.5 s", "z"),
    ]
    table = Table(["algorithm", "difference", "time", "text"], [list(map(Entry, row)) for row in rows], words=["text"])
    answers = Answers("sums, 1", "1 + 1?", [Answer(name, name != "b", f"# 2 {EVIL}" * 9) for name in "abcdefgh"])
    blocks: list[Block] = [Heading("Page", level=1), table, answers, Code("x" * 500)]
    (tmp_path / "page.html").write_text(render_html("page", [*blocks, *map(Heading, ("One", "Two", "Three", "Four"))]))
    return tmp_path / "page.html"


def test_only_the_page_s_own_script_is_admitted(tmp_path: Path) -> None:
    source = table_page(tmp_path).read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", source, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', source)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


@pytest.mark.slow
@needs_chromium
def test_headers_sort_and_the_page_fits_a_phone(tmp_path: Path) -> None:
    page = table_page(tmp_path)
    head = "document.querySelector('thead').rows[0].cells[{}]"
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)

        def order() -> str:
            names = browser.evaluate("[...document.querySelector('tbody').rows].map(row => row.cells[0].innerText)")
            return " ".join(names)

        def click(column: int) -> tuple[str, str | None]:
            browser.evaluate(f"{head.format(column)}.querySelector('button').click()")
            return order(), browser.evaluate(f"{head.format(column)}.getAttribute('aria-sort')")

        assert order() == "b10 b9 a c"
        assert click(1) == ("b9 c b10 a", "descending"), "by the number before the interval; what has none comes last"
        assert click(1) == ("b10 c b9 a", "ascending")
        assert click(1) == ("b10 b9 a c", None), "as it was"
        assert click(2) == ("b10 a b9 c", "descending"), "hours, minutes and seconds"
        assert click(0) == ("a b9 b10 c", "ascending"), "names with numbers"
        assert browser.evaluate(f"{head.format(2)}.getAttribute('aria-sort')") is None, "one column at a time"
        browser.evaluate(f"{head.format(0)}.querySelector('button').focus()")
        browser.press("Enter")
        assert order() == "c b10 b9 a"
        assert browser.evaluate("document.title") == "page" and browser.complaints() == []
        light = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        browser.open(page, width=390, scheme="dark")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        grid = "document.querySelector('.answers')"
        assert browser.evaluate(f"{grid}.scrollWidth > {grid}.clientWidth"), "the answers scroll in their own box"
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") != light
        assert browser.complaints() == []
        (tmp_path / "bad.html").write_text(page.read_text().replace("</main>", f"</main>{EVIL}"))
        browser.open(tmp_path / "bad.html")
        assert browser.evaluate("document.title") == "page" and "Content Security Policy" in browser.complaints()[0]


@pytest.mark.parametrize(
    ("shown", "value"),
    [
        ("46.0 [42.0, 50.1]", 46), ("−10.8 [−14.0, −7.5], p = 0.011", -10.8), ("+1.8", 1.8), ("1,779", 1779),
        ("1.23 M", 1.23e6), ("58 k", 58e3), ("812 MB", 812e6), ("300 B", 300), ("3.21 T", 3.21e12), ("0.001", 0.001),
        ("2 h 5 min", 7500), ("1 min 11 s", 71), ("0.5 s", 0.5), ("3e-05", 3e-5), ("10^300", np.inf), ("10^-2", 0.01),
        ("< 0.001", 0.001 - 1e-12), ("> 391", 391 + 391e-9), ("167 [121, 223]", 167), ("–", None), ("sft", None),
    ],
)  # fmt: skip
def test_numbers_are_sorted_by_what_they_mean(shown: str, value: float | None) -> None:
    assert sort_value(shown) == (None if value is None else pytest.approx(value, rel=1e-12))


@pytest.mark.slow
@needs_chromium
def test_a_report_has_no_errors_and_fits_a_phone(tmp_path: Path) -> None:
    synthetic_run(tmp_path)
    write_report(tmp_path)
    with Browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "report.html", width=390, scheme="dark")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390 and browser.complaints() == []
        colours = "[...document.querySelectorAll('figure svg text')].map(text => getComputedStyle(text).fill)"
        ink = browser.evaluate("getComputedStyle(document.body).color")
        assert set(browser.evaluate(colours)) == {ink}, "text of figures is legible in the dark"
        first = browser.evaluate("document.querySelector('h1 + p.lead + figure svg') !== null")
        assert first, "the page opens with the answer and one figure"


@pytest.mark.slow
def test_page_stands_alone_and_describes_its_figures(tmp_path: Path) -> None:
    synthetic_run(tmp_path)
    write_report(tmp_path)
    source, markdown = read(tmp_path)
    page = Page(source)
    assert "http://" not in source and "https://" not in source and "src=" not in source
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)), "drawings do not share ids"
    targets = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', source)
    assert {a or b for a, b in targets} <= set(ids)
    assert page.tags.count("figure") == page.tags.count("figcaption") == 9
    assert source.count('<svg role="img" aria-label="') == 9 and 'aria-label=""' not in source
    for alt, path in re.findall(r"!\[(.*?)\]\((.*?)\)", markdown):
        assert alt and ElementTree.parse(tmp_path / path).getroot().tag.endswith("svg")


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_parts_without_data_are_left_out(tmp_path: Path) -> None:
    results = synthetic_run(tmp_path)
    for cell in results["cells"]:
        del cell["curve"], cell["token_probabilities"]
    for key in ("description", "failed", "learning_rates", "token_probabilities"):
        del results[key]
    save(tmp_path, results)
    write_report(tmp_path)
    text = Page(read(tmp_path)[0]).text
    for heading in ("Learning curves", "Token probabilities", "Learning rates", "Failed cells"):
        assert heading not in text
    assert "The same problems, side by side" in text


def test_learning_curves_start_at_the_base_and_average_the_seeds() -> None:
    def point(step: int, value: float) -> dict[str, Any]:
        return {"step": step, "metrics": {"sums": {"avg_at_k": value}}}

    cells = [
        {"algorithm": "a", "seed": seed, "metrics": {}, "curve": [point(5, value)]}
        for seed, value in enumerate((0.4, 0.6, 0.8))
    ]
    results = parse_results(
        {
            "experiment": "x",
            "created": "now",
            "base": {"sums": {"k": 1}},
            "base_curve": point(0, 0.2),
            "cells": [*cells, {"algorithm": "b", "seed": 0, "metrics": {}, "curve": []}],
            "summary": [],
        }
    )
    curves = curves_of(results, "sums", "avg_at_k")
    assert list(curves) == ["a"]
    np.testing.assert_allclose(np.stack(curves["a"]), [[0.0, 5.0], [0.2, 0.6], [0.2, 0.4], [0.2, 0.8]])


@pytest.mark.slow
def test_figures_show_the_numbers_of_the_tables(figures: list[Any], tmp_path: Path) -> None:
    results = parse_results(synthetic_run(tmp_path))
    plots.result_bars(results, "longer sums")
    for axes, metric in zip(figures[-1].axes, METRICS, strict=True):
        rows = [results.row(name, "longer sums", metric) for name in ("base", "plain", "weighted", "paired")]
        assert all(row is not None for row in rows)
        known = [row for row in rows if row is not None]
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([100 * row.mean for row in known])
        assert [bar.get_y() + bar.get_height() / 2 for bar in axes.patches] == pytest.approx([0, 1, 2, 3])
        assert whiskers(axes) == pytest.approx([100 * x for row in known for x in (row.ci_low, row.ci_high)])
        assert 100 * known[0].mean in [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert names_of(figures[-1]) == list(SKILL)

    differences = compare_to(read_run(tmp_path).outcomes, "plain", results.k)
    plots.differences(differences, results, "longer sums")
    for axes, metric in zip(figures[-1].axes, METRICS, strict=True):
        own = [row for row in differences if (row["benchmark"], row["metric"]) == ("longer sums", metric)]
        assert [row["algorithm"] for row in own] == names_of(figures[-1])
        assert whiskers(axes) == pytest.approx([100 * x for row in own for x in (row["ci_low"], row["ci_high"])])
        points = [line for line in axes.lines if line.get_marker() == "o"]
        means = {name: results.row(name, "longer sums", metric) for name in SKILL}
        for row in own:
            one, other = means[row["algorithm"]], means["plain"]
            assert one and other and row["difference"] == pytest.approx(one.mean - other.mean)
        expected = [(100 * row["difference"], place) for place, row in enumerate(own)]
        np.testing.assert_allclose([point.get_xydata()[0] for point in points], expected)
        assert [point.get_markerfacecolor() != PAPER for point in points] == [row["p"] < 0.05 for row in own]

    plots.token_probabilities(results)
    for axes, name in zip(figures[-1].axes, results.algorithms, strict=False):
        counts = [cell.token_probabilities for cell in results.cells if cell.algorithm == name]
        before, after = (patch.get_data().values for patch in axes.patches)
        assert results.token_probabilities is not None
        assert before.tolist() == results.token_probabilities.before
        np.testing.assert_allclose(after, np.maximum(np.mean(np.array(counts), axis=0), 0.5))

    plots.learning_curves(results, "longer sums")
    (axes,) = figures[-1].axes
    for line, name in zip(axes.lines, results.algorithms, strict=True):
        steps, mean, _low, _high = curves_of(results, "longer sums", "avg_at_k")[name]
        np.testing.assert_allclose(line.get_xydata(), np.stack([steps, 100 * mean], axis=1))


def names_of(figure: Any) -> list[str]:
    """The rows, which the first panel names."""
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def whiskers(axes: Any) -> list[float]:
    """The ends of the intervals, in order."""
    segments = [segment for collection in axes.collections for segment in collection.get_segments()]
    return [float(x) for segment in segments for x in segment[:, 0]]


def test_costs_are_means_of_cells_and_the_highest_peak() -> None:
    costs = [dict.fromkeys(COSTS, value) for value in (100.0, 300.0)]
    cells = [
        {"algorithm": name, "seed": 0, "learning_rate": 1e-4, "metrics": {}, "costs": own}
        for name, own in (("a", costs[0]), ("a", costs[1]), ("b", {}))
    ]
    rates = {"a": {"1e-05": 0.5, "0.0001": 0.25}, "b": {}}
    known = {"experiment": "x", "created": "now", "base": {}, "summary": [], "cells": cells, "learning_rates": rates}
    results = parse_results(known)
    rows = [[entry.text for entry in row] for row in tables.cost_table(results).rows]
    assert rows == [["a", "200", "200", "200", "3 min 20 s", "300 B", "2"], ["b", *["–"] * 5, "1"]]
    chosen = tables.learning_rate_table(results)
    assert chosen is not None and list(chosen.header) == ["algorithm", "1e-05", "0.0001"]
    assert chosen.rows == [[Entry("a"), Entry("50.0"), Entry("25.0", best=True)]]


def test_the_best_algorithm_is_marked_and_what_is_missing_is_no_number() -> None:
    """Not the base model, whose scores stand in for no algorithm's."""
    summary = [
        {"algorithm": name, "benchmark": "sums", "metric": metric, "mean": m, "ci_low": 0, "ci_high": 1, "seeds": n}
        for name, metric, m, n in (("a", "avg_at_k", 0.5, 3), ("b", "avg_at_k", 0.25, 2), ("b", "greedy", 0.25, 1))
    ]
    cells = [{"algorithm": name, "seed": 0, "metrics": {}} for name in "ab"]
    base = {"sums": {"k": 2, "avg_at_k": 0.5, "greedy": 0.5}}
    known = {"experiment": "x", "created": "now", "base": base, "summary": summary, "cells": cells}
    rows = tables.result_table(parse_results(known), "sums").rows
    assert [[entry.text for entry in row] for row in rows] == [
        ["base", "50.0", "50.0", "–", "–"], ["a", "50.0 [0.0, 100.0]", "–", "–", "3"],
        ["b", "25.0 [0.0, 100.0]", "25.0 [0.0, 100.0]", "–", "2"],
    ]  # fmt: skip
    assert [entry.text for row in rows for entry in row if entry.best] == ["50.0 [0.0, 100.0]", "25.0 [0.0, 100.0]"]


SUMMARY = {  # avg@k, greedy and pass@k of each
    "same order": ({"a": (0.5, 0.6, 0.7), "b": (0.4, 0.5, 0.6)}, "In greedy decoding a leads with 60.0 %: the ranking "
                   "is the same. In pass@2 a leads with 70.0 %: the ranking is the same."),
    "another leads": ({"a": (0.5, 0.5, 0.5), "b": (0.4, 0.6, 0.5)}, "In greedy decoding b leads with 60.0 %: the "
                      "ranking differs. In pass@2 all are equal, at 50.0 %."),
    "behind": ({"a": (0.5, 0.6, 0.7), "b": (0.4, 0.4, 0.7), "c": (0.3, 0.5, 0.1)}, "In greedy decoding a leads with "
               "60.0 %: only the ranking behind it differs. In pass@2 a and b lead with 70.0 %: the ranking is the "
               "same."),
}  # fmt: skip


@pytest.mark.parametrize("case", SUMMARY)
def test_whether_the_metrics_agree_is_said(case: str) -> None:
    means, told = SUMMARY[case]
    summary = [
        {"algorithm": name, "benchmark": "sums", "metric": metric, "mean": mean, "ci_low": 0, "ci_high": 1, "seeds": 1}
        for name, own in reversed(means.items())
        for metric, mean in zip(METRICS, own, strict=True)
    ]
    cells = [{"algorithm": name, "seed": 0, "metrics": {}} for name in means]
    base = {"sums": {"k": 2, "samples": 3, "avg_at_k": 0.5 if case == "behind" else 0.1}}
    known = {"experiment": "x", "created": "now", "base": base, "summary": summary, "cells": cells}
    below = " The base model, at 50.0 %, is not below it." if case == "behind" else ""
    assert answer(parse_results(known), {}, "sums") == (
        "On sums, a has the best avg@3: 50.0 %, ahead of b, with which it has no seed in common, so the two are not "
        f"compared.{below} {told}"
    )


@pytest.mark.parametrize(
    ("mean", "told"),
    [
        (0.5, "On sums, all algorithms have the same avg@3, 50.0 %. The base model, at 50.0 %, is not below them. "
              "In greedy decoding all are equal, and in pass@2 all are equal."),
        (0.0, "On sums, not one answer is correct, of the base model or of any algorithm: the problems are too hard "
              "for it, or the reward expects another format."),
    ],
)  # fmt: skip
def test_of_equal_results_none_is_the_best_and_no_difference_is_detectable(mean: float, told: str) -> None:
    row = {"benchmark": "sums", "mean": mean, "ci_low": 0, "ci_high": 1, "seeds": 2}
    summary = [row | {"algorithm": name, "metric": metric} for name in "ab" for metric in METRICS]
    base = {"sums": {"k": 2, "samples": 3, **dict.fromkeys(METRICS, mean)}}
    cells = [{"algorithm": name, "seed": 0, "metrics": {}} for name in "ab"]
    failed = [{"algorithm": name, "seed": seed, "error": "oh"} for name, seed in (("a", 1), ("c", 0), ("c", 1))]
    known = {"experiment": "x", "created": "now", "base": base, "summary": summary, "cells": cells, "failed": failed}
    results = parse_results(known)
    assert headline(results, {}, "sums") == told
    assert unfinished(results) == "3 of 5 cells failed, so c has no result: see Failed cells below."
    assert not any(entry.best for row in tables.result_table(results, "sums").rows for entry in row)
    alike = {"benchmark": "sums", "seeds": 2, "problems": 4, "detectable": 0.0, "detectable_alone": 0.0}
    sentence = detectable([alike | {"metric": metric} for metric in METRICS], results, "sums")
    assert sentence.startswith("With 2 seeds and 4 problems, no two results differ")


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_every_algorithm_answers_the_same_problems_side_by_side(tmp_path: Path) -> None:
    """The first problems of each benchmark in turn, then those on which the shares of right samples vary most."""
    results = synthetic_run(tmp_path)
    rows = outcome_rows(SKILL, seeds=2)[::-1]
    for row in rows:
        first = row["decoding"] == "sample" and row["sample"] == 0 and row["seed"] <= 0
        row.update(text="this one" if first else "another", prompt=row["problem_id"] * 100)
        row.update(correct=row["algorithm"] == "plain", truncated=row["algorithm"] == "paired")
        if row["problem_id"] in ("sums-007", "longer sums-005"):  # varies less
            row.update(correct=row["algorithm"] in ("plain", "weighted") and row["sample"] < 2)
        if row["problem_id"] == "sums-011":
            row.update(correct=False)
    save(tmp_path, results, pa.Table.from_pylist(rows))
    blocks = list(contents(read_run(tmp_path), None))
    shown = [block for block in blocks if isinstance(block, Answers)]
    disputed = ["sums, sums-002", "sums, sums-003", "sums, sums-004"]
    first = ["sums, sums-000", "longer sums, longer sums-000", "sums, sums-001"]
    assert [block.name for block in shown] == first + disputed, "equally disputed ones in order of their names"
    for block in shown:
        assert block.prompt == f"{(block.name.split(', ')[1] * 100)[:700]} …"
        assert [answer.name for answer in block.answers] == list(SKILL)
        assert [answer.correct for answer in block.answers] == [False, True, False, False]
        assert {answer.text for answer in block.answers} == {"this one"}
    notes = ["0 of 4 samples right", "8 of 8 samples right", "0 of 8 samples right", "0 of 8 samples right, truncated"]
    assert [answer.note for answer in shown[0].answers] == notes
    write_report(tmp_path)
    source, markdown = read(tmp_path)
    assert "✓ right" in source and "✗ wrong" in source, "not by colour alone"
    assert "plain: ✓ right, 8 of 8 samples right" in markdown


@pytest.mark.usefixtures("figures")
def test_run_in_which_every_cell_failed(tmp_path: Path) -> None:
    results = synthetic_run(tmp_path, {"base": 0.2, "plain": 0.3})
    results["cells"] = []
    save(tmp_path, results, pa.Table.from_pylist(outcome_rows({"base": 0.2}, seeds=1)))
    write_report(tmp_path)
    text = Page(read(tmp_path)[0]).text
    assert "On sums, no algorithm has a result." in text
    assert "Failed cells" in text and "Differences" not in text


@pytest.mark.slow
@pytest.mark.usefixtures("figures")
def test_baseline_can_be_chosen(tmp_path: Path) -> None:
    synthetic_run(tmp_path)
    write_report(tmp_path, baseline="base")
    assert "## Differences from base" in read(tmp_path)[1]
    results = synthetic_run(tmp_path)
    results["failed"] = [{"algorithm": "broken", "seed": 0, "error": "out of memory"}]
    save(tmp_path, results)
    write_report(tmp_path, baseline="broken")
    assert "## Differences from plain" in read(tmp_path)[1], "a baseline that failed does not sink the report"
    with pytest.raises(UserError, match="unknown baseline 'bass': did you mean 'base'"):
        write_report(tmp_path, baseline="bass")


@pytest.mark.parametrize("damage", ["nowhere", "empty", "json", "field", "parquet"])
def test_damaged_run_is_one_line_and_writes_nothing(tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "run"
    if damage != "nowhere":
        directory.mkdir()
    if damage in ("json", "field", "parquet"):
        results = synthetic_run(directory)
    match damage:
        case "json":
            (directory / "results.json").write_text('{"experiment": ')
        case "field":
            del results["cells"][1]["seed"]
            save(directory, results)
        case "parquet":
            (directory / "outcomes.parquet").write_bytes(b"not parquet")
    expected = {"nowhere": "does not exist", "empty": "has no results.json", "json": "not valid JSON",
                "field": r"cells\.1\.seed is missing", "parquet": "cannot be read"}[damage]  # fmt: skip
    with pytest.raises(UserError, match=expected) as error:
        write_report(directory)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("report.*"))


def test_terminal_tables_fit_and_mark_the_best(tmp_path: Path) -> None:
    results = synthetic_run(tmp_path, {**SKILL, "[red]odd[/red]": 0.3})
    found = report_table(results)
    console = rich.console.Console(width=110, record=True, force_terminal=True, color_system=None)
    for table in found:
        console.print(table)
    text = console.export_text(styles=True)
    assert len(found) == len(BENCHMARKS) + 2, "and their mean, and the costs"
    assert "[red]odd[/red]" in text, "a name is no markup"
    best = next(row for row in results["summary"] if row["algorithm"] == "weighted" and row["metric"] == "greedy")
    low, high = 100 * best["ci_low"], 100 * best["ci_high"]
    shown = f"{100 * best['mean']:.1f} [{low:.1f}, {high:.1f}]"
    assert re.search(rf"\x1b\[1m\s*{re.escape(shown)}", text)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (amount(0), "0"), (amount(999), "999"), (amount(1500), "1.5 k"), (amount(3.21e12), "3.21 T"),
        (amount(812e6, "B"), "812 MB"), (amount(None), "–"), (amount(0.25), "0.25"),
        (seconds(0.42), "0.4 s"), (seconds(59.7), "1 min 0 s"), (seconds(7500), "2 h 5 min"),
        (significance(0.0004), "p < 0.001"), (significance(0.0123), "p = 0.012"), (significance(0.996), "p = 1"),
        (points(-0.0123), "−1.2"), (points(0.0123), "+1.2"), (points(-0.0001), "0.0"),
    ],
)  # fmt: skip
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected


def test_published_results_stand_beside_the_measured_ones(tmp_path: Path) -> None:
    results = synthetic_run(tmp_path)
    assert not list(reported(read_run(tmp_path), "plain")), "there are none"
    published = {
        "base": {"sums": 10.0, "longer sums": 5.0},
        "plain": {"sums": 20.5, "mean": 15.0},
        "other": {"mean": 4.0},
    }
    config = {
        "source": "A paper, table 1",
        "model": "tiny",
        "metric": "avg@16",
        "results": published,
        "notes": ["Note."],
    }
    results["config"]["reported"] = config
    save(tmp_path, results)
    run = read_run(tmp_path)
    heading, told, table, note = reported(run, "plain")
    assert heading == Heading("Reported and measured") and note == Paragraph("Note.")
    assert isinstance(told, Paragraph) and all(
        word in told.text for word in ("A paper, table 1; model tiny, avg@16", "this run; model tiny, avg@4")
    )
    assert isinstance(table, Table)
    assert [name for name in table.header if name.endswith("reported")] == [
        "sums, reported", "longer sums, reported", "mean, reported", "gain, reported",
    ]  # fmt: skip
    shown = {row[0].text: [entry.text for entry in row[1:]] for row in table.rows}
    assert list(shown) == ["base", "plain", "other", "weighted", "paired"]
    measured = {(row.algorithm, row.benchmark): row.mean for row in run.results.summary if row.metric == "avg_at_k"}
    sums, mean = measured["plain", "sums"], measured["plain", OVERALL]
    assert shown["plain"][:2] == ["20.5", f"{100 * sums:.1f}"] and shown["plain"][2] == "–"
    assert shown["plain"][4:6] == ["15.0", f"{100 * mean:.1f}"]
    assert shown["base"][4] == "7.5", "without a published mean, that of the benchmarks"
    assert shown["plain"][6] == "+7.5" and shown["base"][6:] == ["–", "–"] and shown["other"][6] == "−3.5"
    assert shown["weighted"][0] == "–" and shown["other"][1] == "–"
    for change in ({"model": "large"}, {"results": {"plain": {"elsewhere": 3.0}}}):
        results["config"]["reported"] = config | change
        save(tmp_path, results)
        _, _, warning, *_ = reported(read_run(tmp_path), "plain")
        assert isinstance(warning, Paragraph) and "not the numbers" in warning.text
