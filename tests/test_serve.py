"""`rlzoo serve`: what its pages show of a run while it runs, after it stopped and when it is done, and to whom."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, Browser
from comparisons import Copy, inline_pool, small
from rich.console import Console

from rlzoo.buffers import OfflineBuffer
from rlzoo.cli import main
from rlzoo.comparison import one_cell, runner, shared_buffer
from rlzoo.comparison.dashboard.curves import StepColumns, mean_line, thinned
from rlzoo.comparison.dashboard.elements import h, url
from rlzoo.comparison.dashboard.files import WatchedFolder
from rlzoo.comparison.dashboard.outcomes import OutcomeStore
from rlzoo.comparison.dashboard.runs import WatchedRun
from rlzoo.comparison.dashboard.server import is_loopback, listening
from rlzoo.comparison.dashboard.state import RunView, TaskLog, holder_of
from rlzoo.document.drawing import Drawing
from rlzoo.errors import UserError
from rlzoo.jobs.journal import Journal
from rlzoo.jobs.runs import run_in
from rlzoo.types import Trajectory

pytest.importorskip("starlette", reason="needs the packages of rlzoo[serve]")
pytest.importorskip("uvicorn", reason="needs the packages of rlzoo[serve]")

from starlette.testclient import TestClient

from rlzoo.comparison.dashboard.app import make_app
from rlzoo.comparison.dashboard.layout import POLICY, SCRIPT, STYLE

EVIL = "<script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>\u202edesrever\0\x1b[31m"
DFT = "dft-lr0.0003-seed0"


@dataclass(frozen=True)
class Runs:
    """One small comparison at three moments."""

    seen: RunView
    """While its second cell was being evaluated."""
    killed: Path
    """A copy of its folder at that moment, whose process is gone."""
    finished: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A comparison of two rows, copied while it runs."""
    folder = tmp_path_factory.mktemp("runs")
    out, copy, seen = folder / "run", folder / "killed", list[RunView]()
    experiment = small(
        {"sft": {}, "dft": {}}, training={"steps": 3, "batch_size": 8, "learning_rate": 3e-4},
        evaluation={"samples": 3, "k": 2, "max_new_tokens": 8, "curve_points": 3, "curve_problems": 2},
    )  # fmt: skip
    probe = shared_buffer.token_probabilities

    def looked_at(*arguments: Any) -> Any:
        if (out / ".state" / "cells").is_dir() and any((out / ".state" / "cells").glob("sft*.result")):
            seen.append(WatchedRun(out).look())
            shutil.copytree(out, copy)
            gone = f"process {2**22 + 5} on {socket.gethostname()}, since 2026-01-01 00:00:00"
            (copy / ".state" / "lock").write_text(gone)
        return probe(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "pool", inline_pool)
        patched.setattr(one_cell, "token_probabilities", looked_at)
        patched.setattr(Drawing, "svg", '<svg width="1pt" height="1pt" viewBox="0 0 1 1"></svg>')
        runner.compare(experiment, out, 1, console=Console(file=io.StringIO()))
    return Runs(seen[0], copy, out)


class Page(HTMLParser):
    """A page as a browser reads it."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text, self.source = "", source
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def client(folder: Path, host: str = "127.0.0.1") -> TestClient:
    return TestClient(make_app(folder), base_url=f"http://{host}", raise_server_exceptions=False)


def page(folder: Path, path: str) -> Page:
    answer = client(folder).get(path)
    assert answer.status_code == 200, answer.text
    return Page(answer.text)


# The state of a run


def test_a_running_comparison_shows_its_cells_and_their_steps(runs: Runs) -> None:
    view = runs.seen
    assert (view.state, view.told.split(" on ")[0]) == ("running", f"process {os.getpid()}")
    assert [(cell.id, cell.status) for cell in view.cells] == [("sft-lr0.0003-seed0", "done"), (DFT, "running")]
    done, running = view.cells
    assert done.metrics.keys() == {"facts"} and [point["step"] for point in done.steps.points] == [1, 2, 3]
    assert running.steps.columns["step"] == [1, 2, 3] and running.planned == 3
    assert running.log.detail.startswith("step ") and 0 < running.log.share <= 0.8
    assert running.steps.last("loss") is not None and running.steps.last("gradient_norm") is not None
    assert set(view.base) == {"facts"} and {"shared buffer", "base model"} <= set(view.tasks)
    assert all(log.has_ended and log.error is None for log in view.tasks.values())


def test_what_the_journal_says_is_what_the_results_say(runs: Runs) -> None:
    finished = {cell.id: cell for cell in WatchedRun(runs.finished).look().cells}[DFT]
    (running,) = [cell for cell in runs.seen.cells if cell.id == DFT]
    assert running.steps.columns == finished.steps.columns
    points = finished.steps.point_line(("metrics", "facts")).tolist()
    assert len(points) == 3 and running.steps.point_line(("metrics", "facts")).tolist() == points[:2], (
        "the last is that of the evaluation at the end"
    )


def test_a_killed_run_is_told_from_one_that_was_stopped_or_failed(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs.killed, folder)
    run = WatchedRun(folder)
    assert run.look().state == "killed" and run.look().cells[1].status == "stopped"
    assert "its process is gone" in page(folder, "/").text
    ended = folder / ".state" / "journal" / "ended.json"
    ended.write_text('{"error": null}')
    assert run.look().state == "interrupted"
    ended.write_text(json.dumps({"error": f"no space left {EVIL}"}))
    assert run.look().state == "failed"
    shown = page(folder, "/")
    assert "no space left <script>" in shown.text and shown.tags.count("script") == 1


def test_a_lock_of_another_machine_or_of_a_reused_number_is_no_proof(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert holder_of(None) == ("", False)
    lock.write_text("process 1 on another-machine, since 2026-01-01 00:00:00")
    assert holder_of(lock)[1] is None
    lock.write_text(f"process {os.getpid()} on {socket.gethostname()}, since 2026-01-01 00:00:00")
    if Path("/proc/locks").is_file() and Path("/proc/locks").read_text():
        assert holder_of(lock)[1] is False, "this process lives, and holds no lock of the file"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyboardInterrupt(), None),
        (OSError(28, "No space left on device"), "cannot be written (No space left on device)"),
    ],
)
def test_a_run_records_why_it_ended(tmp_path: Path, error: BaseException, told: str | None) -> None:
    with pytest.raises((KeyboardInterrupt, UserError)), run_in(tmp_path / "run", "compare", {}) as run:
        (run.state / "half").touch()
        raise error
    found = json.loads((tmp_path / "run" / ".state" / "journal" / "ended.json").read_text())["error"]
    assert found is None if told is None else told in found
    with run_in(tmp_path / "run", "compare", {}) as run:
        assert run.resumed and WatchedRun(tmp_path / "run").look().state == "running"


def test_failed_cells_are_listed_with_their_error(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs.killed, folder)
    Journal(folder / ".state", DFT).write(ended="WorkError: step 3: the loss is nan <b>")
    shown = page(folder, "/")
    assert "Failed cells" in shown.text and "the loss is nan <b>" in shown.text and "b" not in shown.tags
    Journal(folder / ".state", DFT).begin()
    assert "Failed cells" not in page(folder, "/").text, "it is retried"


def test_files_that_are_being_written_are_read_as_far_as_they_go(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs.killed, folder)
    run = WatchedRun(folder)
    assert len(run.look().cells[1].steps) == 3
    journal = folder / ".state" / "journal" / f"{DFT}.jsonl"
    whole = json.dumps({"time": 1e9, "row": {"step": 4, "loss": 0.5}})
    with journal.open("a") as file:
        file.write(f"not JSON\n[1]\n{{}}\n{whole[:20]}")
        file.flush()
        assert len(run.look().cells[1].steps) == 3
        file.write(f"{whole[20:]}\n")
        file.flush()
        assert run.look().cells[1].steps.last("loss") == 0.5
    result = next((folder / ".state" / "cells").glob("sft*.result"))
    result.write_bytes(result.read_bytes()[:-40])
    assert run.look().cells[0].metrics, "what was read while it was intact"
    assert WatchedRun(folder).look().cells[0].status == "stopped", "the damaged result alone"
    journal.unlink()
    assert run.look().cells[1].status == "waiting" and page(folder, "/").text


def test_a_run_goes_on_where_its_journal_cannot_be_written(tmp_path: Path) -> None:
    row = {"step": 1, "loss": float("nan")}
    Journal(tmp_path / "gone", "cell").step(row)
    assert not (tmp_path / "gone").exists()
    journal = Journal(tmp_path, "a/b")
    journal.begin()
    journal.step(row, before=2)
    journal.progress(0.1, "so far")
    lines = (tmp_path / "journal" / "a%2Fb.jsonl").read_text().splitlines()
    assert [json.loads(line).get("row") for line in lines] == [None, {"step": 3, "loss": None}, None]


def test_steps_that_an_interruption_repeats_replace_those_before() -> None:
    steps = StepColumns()
    for step, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 6.0)):
        steps.add({"step": step, "loss": loss, **({"late": 1.0} if step == 3 else {})})
    assert steps.columns["step"] == [1, 2] and steps.columns["loss"] == [9.0, 6.0] and steps.names == ["loss"]
    other = StepColumns()
    other.add({"step": 1, "loss": 1.0})
    assert mean_line([steps.line("loss"), other.line("loss")]).tolist() == [[1.0, 5.0], [2.0, 6.0]]
    assert thinned(steps.line("loss"), 1).tolist() == [[1.5, 7.5]]


def test_the_remaining_time_is_that_of_the_newest_attempt() -> None:
    log = TaskLog()
    for entry in (
        {"time": 0, "begun": True}, {"time": 1, "share": 0.9, "detail": "x"}, {"time": 100, "begun": True},
        {"time": 110, "share": 0.5, "detail": "y"}, {"time": 120, "share": 0.75, "detail": "z"},
    ):  # fmt: skip
        log.add(entry)
    assert log.seconds_left == 10.0, "from 0.5, with which it resumed, to 0.75 in 10 seconds"
    log.add({"time": 121, "ended": None})
    assert log.seconds_left is None
    log.add({"time": 130, "begun": True})
    assert (log.share, log.detail) == (0.0, ""), "what an earlier attempt told is no longer so"


def test_a_point_without_a_number_is_not_drawn() -> None:
    steps = StepColumns()
    for step, value in enumerate([0.5, float("nan"), None], 1):
        steps.add_point({"step": step, "validation": {"avg_at_k": value}})
    assert steps.point_line(("validation",)).tolist() == [[1.0, 50.0]]


def test_problems_that_nothing_was_scored_on_are_arranged(tmp_path: Path) -> None:
    store = OutcomeStore(WatchedFolder(tmp_path))
    sample = {"algorithm": "sft", "benchmark": "mine", "problem_id": "1", "decoding": "sample", "correct": None}
    store.add("cell", [sample])
    [problem] = store.problems("sample")
    assert (problem.share([]), problem.spread([])) == (0.0, 0.0)


def test_a_training_run_is_followed_and_then_shown(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RunView] = []
    step = Journal.step

    def looked_at(self: Journal, *arguments: Any, **options: Any) -> None:
        step(self, *arguments, **options)
        seen.append(WatchedRun(tmp_path / "out").look())

    monkeypatch.setattr(Journal, "step", looked_at)
    command = ["train", "sft", "--buffer", str(runs.finished / "buffer"), "--steps", "2", "--batch-size", "4"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert [(view.state, len(view.cells[0].steps), view.share) for view in seen] == [
        ("running", 1, 0.5), ("running", 2, 1.0),
    ]  # fmt: skip
    shown = page(tmp_path / "out", "/")
    assert "finished" in shown.text and "Gradient norm" in shown.text and "sft" in shown.text
    assert "no samples" in page(tmp_path / "out", "/samples").text


# The pages of a finished run


def test_a_finished_run_shows_results_samples_settings_and_report(runs: Runs) -> None:
    overview = page(runs.finished, "/")
    assert "Results" in overview.text and "avg@3" in overview.text and "2 of 2 cells done" in overview.text
    assert overview.tags.count("figure") == 4, "loss, gradient norm, log-prob, and facts along the way"
    assert "3 steps" in page(runs.finished, f"/cell/{DFT}").text.replace("ended bysteps", "3 steps")
    assert "batch_size: 8" in page(runs.finished, "/settings").text
    for row in json.loads((runs.finished / "results.json").read_text())["summary"]:
        interval = f"{100 * row['mean']:.1f} [{100 * row['ci_low']:.1f}, {100 * row['ci_high']:.1f}]"
        assert interval in overview.text, "as in the report"
    answer = client(runs.finished).get("/report")
    assert "rlzoo" in answer.text and '<a href="/samples">' in answer.text
    assert "script-src 'sha256-" in answer.headers["content-security-policy"]


def test_samples_stand_side_by_side_with_the_reference(runs: Runs) -> None:
    rows = pq.read_table(runs.finished / "outcomes.parquet").to_pylist()
    first = rows[0]
    own = [row for row in rows if row["problem_id"] == first["problem_id"] and row["decoding"] == "sample"]
    shown = page(runs.finished, "/samples")
    assert (
        shown.tags.count("article") == 3 and first["reference"] in shown.text and first["prompt"].strip() in shown.text
    )
    for algorithm in ("base", "sft", "dft"):
        samples = [row for row in own if row["algorithm"] == algorithm]
        assert samples[0]["text"].strip() in shown.text
        assert f"{sum(row['correct'] for row in samples)} of 3 right" in shown.text
    assert shown.text.count("✓ right") == sum(row["correct"] for row in own if row["sample"] == 0)
    only = page(runs.finished, url("/samples", row="dft", place=1, seed="0"))
    assert only.tags.count("article") == 2 and "2 of 4" in only.text
    assert page(runs.finished, "/samples?decoding=greedy&place=999").text.count("4 of 4") == 1


def test_samples_of_a_running_comparison_are_those_of_the_cells_that_ended(runs: Runs) -> None:
    shown = page(runs.killed, "/samples")
    assert shown.tags.count("article") == 2 and "sft" in shown.text


def with_outcomes(run: Path, folder: Path, changes: dict[str, Any], rows: Sequence[int] = (0,)) -> Path:
    """A copy of a run with other values in some outcomes."""
    shutil.copytree(run, folder)
    made = pq.read_table(folder / "outcomes.parquet").to_pylist()
    for place in rows:
        made[place] |= changes
    pq.write_table(pa.Table.from_pylist(made, pq.read_schema(folder / "outcomes.parquet")), folder / "outcomes.parquet")
    return folder


def test_problems_are_arranged_by_disagreement(runs: Runs, tmp_path: Path) -> None:
    table = pq.read_table(runs.finished / "outcomes.parquet").to_pylist()
    last = [n for n, r in enumerate(table) if r["problem_id"] == table[-1]["problem_id"] and r["decoding"] == "sample"]
    right = [n for n, row in enumerate(table) if row["decoding"] == "sample" and n not in last]
    folder = with_outcomes(runs.finished, tmp_path / "run", {"correct": True}, right)
    folder = with_outcomes(folder, tmp_path / "next", {"correct": False}, last)
    dft = [n for n in last if table[n]["algorithm"] == "dft"]
    folder = with_outcomes(folder, tmp_path / "last", {"correct": True}, dft)
    disputed, right_, wrong = (page(folder, f"/samples?order={name}") for name in ("disagreement", "right", "wrong"))
    assert "1 of 1" in disputed.text and table[-1]["problem_id"] in disputed.text
    assert "1 of 3" in right_.text and "No problem is like that." in wrong.text
    assert "1 of 1" in page(folder, "/samples?order=wrong&row=sft").text


def test_a_study_and_a_buffer_have_pages(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    studies = Path(runner.__file__).parents[1] / "experiments" / "results"
    shown = page(studies / "facts", "/")
    assert "cells done" in shown.text and shown.tags.count("figure") >= 3
    assert page(studies / "facts", "/samples").tags.count("article") > 2
    rows = page(runs.finished / "buffer", "/")
    assert "Groups by prompt" in rows.text and "demonstration" in rows.text


@pytest.fixture
def buffer(tmp_path: Path) -> Path:
    """120 rows of 30 prompts, in a folder of a run."""
    rows = [
        Trajectory(
            f"{n // 4} + 1?", f"answer {n}", [1, 2], [3, 4, 5], f"p{n // 4}", "policy",
            reward=float(n % 4 == 0 or n < 8), behaviour_logp=[-1.0, -2.0, -3.0],
        )
        for n in range(120)
    ]  # fmt: skip
    turns: list[dict[str, Any]] = [{"role": "assistant", "content": None, "tool_calls": ["add"]}]
    turns += [{"role": "tool", "content": "11 + 1 = 12"}, {"role": "assistant", "content": "answer 12"}]
    rows[12] = replace(rows[12], completion_messages=turns)
    evil = {"messages": [{"role": EVIL, "content": EVIL, EVIL: EVIL}], "columns": {EVIL: EVIL}}
    rows[7] = Trajectory(EVIL, EVIL, [1], [2], EVIL, "policy", reward=1.0, **evil)  # type: ignore[arg-type]
    OfflineBuffer.from_trajectories(rows).save(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_buffer_is_paged_searched_and_grouped(buffer: Path) -> None:
    first = page(buffer, "/")
    assert first.tags.count("tr") == 1 + 50 and "120: 120 policy" in first.text and "-2" in first.text.replace("−", "-")
    assert "answer 50" in page(buffer, "/buffer/rows?start=50").text
    assert page(buffer, "/buffer/rows?start=100").tags.count("tr") == 1 + 20
    assert "next →" not in page(buffer, "/buffer/rows?start=70").text
    assert page(buffer, "/buffer/rows?q=ANSWER+11").tags.count("tr") == 1 + 11  # 11 and 110 to 119
    assert page(buffer, "/buffer/rows?prompt=p5").tags.count("tr") == 1 + 4
    assert "No row is like that." in page(buffer, "/buffer/rows?source=demonstration").text
    assert "31 prompts" in page(buffer, "/buffer/rows/groups").text
    assert "3 prompts" in page(buffer, "/buffer/rows/groups?equal=yes").text, "p0, p1, and that of the row alone"
    row = page(buffer, "/buffer/rows/row/12")
    assert "answer 12" in row.text and "completion tokens3" in row.text and "Log-prob per token" in row.text
    assert '{"content": null, "tool_calls": ["add"]}' in row.text and "11 + 1 = 12" in row.text
    assert client(buffer).get("/buffer/rows/row/120").status_code == 404


def test_a_buffer_that_is_replaced_is_read_anew(buffer: Path) -> None:
    asked = client(buffer)
    assert "120: 120 policy" in asked.get("/").text
    few = OfflineBuffer.from_trajectories([Trajectory("a", "b", [1], [2], "p", "demonstration")])
    few.save(buffer)
    assert "1: 1 demonstration" in asked.get("/").text
    (buffer / "data-00000-of-00001.arrow").write_bytes(b"half")
    os.utime(buffer / "state.json", ns=(1, 1))
    assert "cannot be read" in asked.get("/").text


# Who may read, and what a model wrote


def test_what_a_model_wrote_is_text(runs: Runs, buffer: Path, tmp_path: Path) -> None:
    long = "x" * 50_000
    folder = with_outcomes(
        runs.finished, tmp_path / "run", {"text": EVIL, "prompt": EVIL, "reference": EVIL, "answer": EVIL}
    )
    folder = with_outcomes(folder, tmp_path / "other", {"text": long, "algorithm": EVIL, "problem_id": EVIL}, [1])
    shutil.rmtree(folder / "buffer")
    shutil.copytree(buffer, folder / "buffer")
    asked = ["/samples", "/samples?place=1", "/buffer/buffer", "/buffer/buffer/groups", "/buffer/buffer/row/7", "/"]
    evil = urllib.parse.quote(EVIL)
    asked += [
        f"/samples?order={evil}&row={evil}&seed={evil}&benchmark={evil}",
        f"/buffer/buffer?q={evil}&prompt={evil}",
    ]
    for path in asked:
        found = page(folder, path)
        assert found.tags.count("script") == 1 and not {"img", "iframe", "object"} & set(found.tags), path
        assert not any(name.startswith("on") for name, _ in found.attributes), path
        assert not any(c in found.source for c in "\u202e\0\x1b"), path
        assert len(found.source) < 100_000, "endless text is cut"
    assert "<script>document.title" in page(folder, "/buffer/buffer/row/7").text
    assert f"{30_000:,} more characters" in page(folder, "/samples?place=1").text


def test_html_is_escaped_once() -> None:
    assert h("p", "<b>", h("i", '"&'), title='"') == '<p title="&quot;">&lt;b&gt;<i>&quot;&amp;</i></p>'


def test_every_answer_forbids_other_scripts(runs: Runs) -> None:
    asked = client(runs.finished)
    for answer in (asked.get("/"), asked.get("/nothing"), asked.post("/"), asked.get("/", headers={"host": "evil"})):
        assert answer.headers["x-content-type-options"] == "nosniff", answer.status_code
        assert answer.headers["content-security-policy"] == POLICY and "unsafe" not in POLICY
    source = asked.get("/").text
    assert f"<script>{SCRIPT}</script>" in source and f"<style>{STYLE}</style>" in source
    assert (
        source.count("<script") == 1 and "style=" not in source and "http://" not in source.replace("http://www.w3", "")
    )


def test_what_cannot_be_shown_is_told_on_a_page(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WatchedRun, "look", lambda self: 1 / 0)
    answer = client(runs.finished).get("/")
    assert answer.status_code == 500 and "ZeroDivisionError: division by zero" in Page(answer.text).text
    assert answer.headers["content-security-policy"] == POLICY


def test_other_names_are_refused(runs: Runs) -> None:
    asked = client(runs.finished)
    for host, status in (
        ("localhost:8765", 200),
        ("127.0.0.1", 200),
        ("[::1]:1", 200),
        ("evil.example", 400),
        ("", 400),
    ):
        assert asked.get("/", headers={"host": host}).status_code == status, host
    assert asked.get("/", headers={"host": "10.0.0.7"}).status_code == 400
    opened = TestClient(make_app(runs.finished, ["my-machine"], trusts_addresses=True))
    for host, status in (("10.0.0.7:1", 200), ("my-machine", 200), ("[fe80::1]:2", 200), ("evil.example", 400)):
        assert opened.get("/", headers={"host": host}).status_code == status, host


def test_no_path_and_no_link_leads_out_of_the_folder(runs: Runs, buffer: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.html"
    secret.write_text("<p>secret</p>")
    folder = tmp_path / "run"
    shutil.copytree(runs.finished, folder)
    (folder / "report.html").unlink()
    (folder / "report.html").symlink_to(secret)
    shutil.rmtree(folder / "buffer")
    (folder / "buffer").symlink_to(buffer)
    (folder / "outcomes.parquet").rename(tmp_path / "outcomes.parquet")
    (folder / "outcomes.parquet").symlink_to(tmp_path / "outcomes.parquet")
    asked = client(folder)
    paths = ["/report", "/buffer/buffer", "/buffer/..%2Fsaved", "/cell/..%2F..%2Fsecret.html", "/..%2Fsecret.html"]
    assert [asked.get(path).status_code for path in paths] == [404] * 5
    assert "no samples" in asked.get("/samples").text and "/report" not in asked.get("/").text
    (folder / "results.json").rename(folder / "kept.json")
    (folder / "results.json").symlink_to(folder / "kept.json")
    assert "cells done" in asked.get("/").text, "a link inside is followed"


def test_a_run_is_only_read(runs: Runs) -> None:
    def files() -> dict[Path, tuple[int, int]]:
        every = (runs.killed, runs.finished)
        return {p: (p.stat().st_mtime_ns, p.stat().st_size) for root in every for p in (root, *root.rglob("*"))}

    before = files()
    for folder in (runs.killed, runs.finished):
        for path in ("/", "/samples", "/buffer/buffer", "/buffer/buffer/groups", "/settings", f"/cell/{DFT}"):
            page(folder, path)
    assert files() == before


# The command


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{tmp}"], "holds no run: name a folder that rlzoo compare, train or rollout writes, or a study"),
        (["{tmp}/nothing"], "is not a folder: name one that rlzoo compare, train or rollout wrote"),
        (["{run}", "--port", "{taken}"], "port {taken} is in use: give another with --port, or --port 0"),
        (["{run}", "--host", "256.1.1.1.1"], "no such address"),
        (["{run}", "--port", "70000"], "70000 is no port: give 0 to 65535"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], told: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with listening("127.0.0.1", 0) as taken:
        given = {"tmp": str(tmp_path), "run": str(runs.finished), "taken": str(taken.getsockname()[1])}
        assert main(["serve", *(each.format(**given) for each in arguments)]) == 2
    errors = capsys.readouterr().err
    assert told.format(**given) in errors and errors.count("\n") == 1


def test_without_the_packages_the_command_says_how_to_get_them(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(runs.finished)]) == 2
    assert capsys.readouterr().err == "rlzoo: rlzoo serve needs Starlette and Uvicorn: pip install 'rlzoo[serve]'\n"


@pytest.mark.parametrize(
    ("host", "expected"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_loopback_is_known(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


def test_it_serves_until_it_is_interrupted(runs: Runs, tmp_path: Path) -> None:
    told = tmp_path / "told"

    def served() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(told, os.O_CREAT | os.O_WRONLY), 1)
        return main(["serve", str(runs.finished), "--port", "0", "--host", "0.0.0.0"])

    server = Copy(served)
    while not (told.exists() and "\n" in (line := told.read_text())):
        assert os.waitpid(server.pid, os.WNOHANG) == (0, 0), server.errors()
    address = line.split(" at ")[1].split(" ")[0].replace("0.0.0.0", "127.0.0.1")
    with urllib.request.urlopen(address) as answer:
        assert answer.status == 200 and "server" not in answer.headers
    os.kill(server.pid, signal.SIGINT)
    ended = server.ended()
    assert ended.status == 130
    warning, end = ended.errors.splitlines()
    assert "anyone who reaches" in warning and end == "rlzoo: interrupted"


@pytest.mark.parametrize("found", [True, False])
def test_the_address_is_opened_in_a_browser_if_there_is_one(
    found: bool, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []

    def browser(address: str) -> bool:
        opened.append(address)
        return found

    monkeypatch.setattr("webbrowser.open", browser)
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets: None)
    assert main(["serve", str(runs.finished), "--port", "0", "--open"]) == 0
    told = capsys.readouterr()
    assert opened == re.findall(r"http://127\.0\.0\.1:[1-9]\d*", told.out)
    assert ("open the address yourself" in told.err) is not found


@pytest.fixture
def served(runs: Runs, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address at which a running comparison is served, and its folder."""
    import uvicorn

    folder = tmp_path / "run"
    shutil.copytree(runs.killed, folder)
    (folder / ".state" / "lock").write_text("process 1 on another-machine, since 2026-01-01 00:00:00")
    server = uvicorn.Server(uvicorn.Config(make_app(folder), log_level="critical", lifespan="off"))
    with listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", folder
        server.should_exit = True
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_the_pages_and_follows_the_run(served: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = served
    asked = ["/", "/samples", "/buffer/buffer", "/buffer/buffer/row/1", "/buffer/buffer/groups", "/settings"]
    with Browser(tmp_path / "profile") as browser:
        for width in (1280, 390):
            for path in (*asked, f"/cell/{DFT}"):
                browser.open(address + path, width)
                assert browser.complaints() == [], (path, width)
                assert browser.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
        browser.open(f"{address}/")
        cells = "document.querySelector('#part-cells table')"
        browser.evaluate(f"{cells}.querySelector('th:nth-child(5) button')?.click()")
        assert "step 3/3" in browser.evaluate(f"{cells}.innerText")
        journal = Journal(folder / ".state", DFT)
        journal.step({"step": 4, "loss": 0.125})
        journal.progress(0.9, "evaluating facts")
        browser.call("Runtime.evaluate", expression="refresh()", awaitPromise=True)
        assert "evaluating facts" in browser.evaluate(f"{cells}.innerText")
        assert "0.125" in browser.evaluate(f"{cells}.innerText")
        assert browser.evaluate("lost.hidden") is True and browser.complaints() == []
