"""The analysis as a whole: what it reports of any objective, along training, by command, and of wrong input."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from batches import built, of_each_kind
from comparisons import inline_pool

import rlzoo
from rlzoo import OfflineBuffer, Policy, analyze_variance, cli, get_objective, load_policy, train
from rlzoo.buffers import Buffer
from rlzoo.buffers.problems import demonstrations, encode_problems, load_problems
from rlzoo.config import ProblemSource, Sampling, Training, VarianceSettings, load_experiment
from rlzoo.document import Block, Figure, write_document
from rlzoo.document.estimates import estimate
from rlzoo.errors import UserError
from rlzoo.inputs import Behaviour, Input, Statistic
from rlzoo.jobs.pool import in_this_process
from rlzoo.objective import Objective, is_composite, list_objectives, objective_class
from rlzoo.policy import Assembler
from rlzoo.reward import get_reward
from rlzoo.rollout import TransformersSampler, collect_rollouts
from rlzoo.training import with_reference
from rlzoo.types import Coefficients, Selection, TokenBatch
from rlzoo.variance import plots
from rlzoo.variance.probe import VarianceProbe
from rlzoo.variance.report import NOISE_COLUMNS, contents, hidden, report_tables, write_report
from rlzoo.variance.run import _cut, fill, run_variance
from rlzoo.variance.scoring import score

SINGLE = [name for name in list_objectives() if not is_composite(objective_class(name))]
COEFFICIENTS = {"mean", "cv", "max_over_mean", "kurtosis", "hill", "ess_fraction"}
MOMENTS = {"predicted_trace_cov", "comparable", "slope", "slope_ci"}
COMPARABLE = {"fraction", "predicted", "monte_carlo", "ci_low", "ci_high"}
NOISE = {"grad_norm_sq", "trace_cov", "noise_scale", "snr", "cosine_to_sft", "norm_ratio_to_sft"}
Run = Callable[..., tuple[int, str, str]]
PLUGIN = """\
from dataclasses import dataclass
import rlzoo

@dataclass(frozen=True)
class RootDFT(rlzoo.Objective):
    name = "root-dft"

    def coefficients(self, batch):
        return rlzoo.Coefficients((0.5 * batch.logp).exp())
"""


@pytest.fixture(scope="module")
def base() -> Policy:
    return load_policy("embedded")


@pytest.fixture(scope="module")
def buffer(base: Policy) -> Buffer:
    """Demonstrations of both worlds, and samples of the base on them."""
    problems = load_problems(ProblemSource(source="world:both/train", limit=240))
    rows = demonstrations(base.tokenizer, problems)
    encoded = encode_problems(base.tokenizer, problems[:40])
    samples = collect_rollouts(
        base, TransformersSampler(base), encoded, get_reward("exact-match"), Sampling(samples=4, max_new_tokens=40), 0
    )
    scored = [replace(row, reward=1.0 + i % 3) for i, row in enumerate(rows)]
    return OfflineBuffer.from_trajectories([*scored, *samples])


@pytest.fixture(scope="module")
def registered() -> dict[str, Objective]:
    """All registered objectives but composites."""
    named = {name: built(name) for name in SINGLE}
    named["pear"] = get_objective("pear", demonstrator="embedded")  # the rows do not record their demonstrator
    return named


@pytest.fixture(scope="module")
def report(base: Policy, buffer: Buffer, registered: dict[str, Objective]) -> dict[str, Any]:
    """An objective of each kind on the embedded base, with gradients."""
    kinds = [*of_each_kind(registered), "sft", "dft"]
    return analyze_variance(base, {name: registered[name] for name in kinds}, buffer, rows=36, draws=256)


def is_estimate(found: Any) -> bool:
    return {"value", "ci_low", "ci_high"} <= set(found) and (found["value"] is not None or bool(found["reason"]))


@pytest.mark.slow
def test_every_registered_objective_is_reported_in_full(
    base: Policy, buffer: Buffer, registered: dict[str, Objective], report: dict[str, Any]
) -> None:
    """Its own part needs no gradient; gradients are measured of each kind (see also test_variance_gradients.py)."""
    tokens = analyze_variance(base, registered, buffer, rows=36, draws=256, gradients=False)
    json.dumps([tokens, report], allow_nan=False)
    assert set(tokens["objectives"]) == set(SINGLE) and tokens["skipped"] == report["skipped"] == {}
    read = set()
    for name, entry in tokens["objectives"].items():
        assert set(entry["coefficients"]) == COEFFICIENTS
        assert set(entry["token_moments"]) >= MOMENTS
        expert = built(name).learns_from is Selection.DEMONSTRATIONS
        if expert and entry["coefficients"]["mean"] == 0:
            assert "full-vocabulary term" in entry["token_moments"]["reason"] and name in ("gift", "otr")
        elif expert:
            read.add(name)
            assert set(entry["token_moments"]["comparable"]) >= COMPARABLE
            assert entry["token_moments"]["predicted_trace_cov"] > 0
        else:
            assert "a policy sampled" in entry["token_moments"]["reason"]
        assert 30 <= entry["rows"] <= 40 and 0 < entry["prompts"] <= entry["units"] <= entry["rows"]
    assert {row["objective"] for row in tokens["bins"]} == read >= {"sft", "dft", "iw-sft", "dft-control"}
    for entry in report["objectives"].values():
        assert set(entry["data_noise"]) == NOISE and all(map(is_estimate, entry["data_noise"].values()))
        assert set(entry["layers"]) == set(report["layers"])
        proxies = entry["proxies"]
        assert proxies["total_power"]["exact"] == pytest.approx(sum(proxies["prompts"]["exact"]) / entry["prompts"])


@pytest.mark.slow
def test_the_layers_add_up_to_the_whole(report: dict[str, Any]) -> None:
    for entry in report["objectives"].values():
        total = sum(layer["trace_cov"]["value"] for layer in entry["layers"].values())
        assert total == pytest.approx(entry["data_noise"]["trace_cov"]["value"], rel=1e-6)
        total = sum(layer["grad_norm_sq"]["value"] for layer in entry["layers"].values())
        assert total == pytest.approx(entry["data_noise"]["grad_norm_sq"]["value"], rel=1e-4, abs=1e-9)


@pytest.mark.slow
def test_what_the_paper_says_and_what_it_does_not(base: Policy, buffer: Buffer) -> None:
    report = analyze_variance(base, ["sft", "dft", "iw-sft"], buffer, rows=480, draws=512)
    sft, dft = (report["objectives"][name] for name in ("sft", "dft"))
    assert sft["token_moments"]["slope"] == pytest.approx(-1, abs=0.05)
    assert dft["token_moments"]["slope"] == pytest.approx(1, abs=0.05)
    assert sft["token_moments"]["predicted_trace_cov"] > 30 * dft["token_moments"]["predicted_trace_cov"]
    # over the data, relative to its own gradient, DFT is no less noisy than SFT
    assert dft["data_noise"]["norm_ratio_to_sft"]["ci_high"] < 1
    assert dft["data_noise"]["snr"]["value"] < 3 * sft["data_noise"]["snr"]["value"]
    iw = report["objectives"]["iw-sft"]  # at its reference it is SFT
    assert iw["data_noise"]["cosine_to_sft"] == {"value": 1.0, "ci_low": 1.0, "ci_high": 1.0}
    assert sft["data_noise"]["norm_ratio_to_sft"]["value"] == pytest.approx(1, rel=1e-12)


@pytest.mark.slow
def test_exact_and_sampled_variances_agree(base: Policy, buffer: Buffer) -> None:
    """Over five seeds of rows and draws, in the bins that can be compared."""
    inside = total = 0
    for seed in range(5):
        found = analyze_variance(base, ["sft", "dft"], buffer, rows=256, seed=seed, gradients=False)
        rows = [row for row in found["bins"] if row["comparable"]]
        inside += sum(row["ci_low"] <= row["predicted"] <= row["ci_high"] for row in rows)
        total += len(rows)
    assert total > 100 and inside / total >= 0.93


@pytest.mark.slow
def test_the_same_seed_gives_the_same_report(base: Policy, buffer: Buffer) -> None:
    one, two, other = (analyze_variance(base, ["dft", "grpo"], buffer, rows=24, draws=256, seed=s) for s in (1, 1, 2))
    assert one == two and one != other


@pytest.mark.slow
def test_sft_is_measured_for_comparison_even_if_not_asked_for(base: Policy, buffer: Buffer) -> None:
    found = analyze_variance(base, ["dft"], buffer, rows=24, draws=0)
    assert list(found["objectives"]) == ["dft"] and found["cosines"]["dft"].keys() == {"dft", "(demonstrations)"}
    cosine = found["objectives"]["dft"]["data_noise"]["cosine_to_sft"]
    assert cosine["value"] is None and "noise hides the gradient" in cosine["reason"]  # over 24 rows
    itself = {"value": 1, "ci_low": 1, "ci_high": 1}
    assert found["cosines"]["dft"] == {"dft": itself, "(demonstrations)": cosine}
    assert cosine["ci_low"] is None and cosine["ci_high"] is None


@pytest.mark.slow
def test_rows_that_are_missing_skip_an_objective_and_are_named(base: Policy, buffer: Buffer) -> None:
    experts = OfflineBuffer.from_trajectories([row for row in buffer if row.source == "demonstration"][:20])
    found = analyze_variance(base, ["sft", "grpo"], experts, draws=0)
    assert list(found["objectives"]) == ["sft"] and "no groups" in found["skipped"]["grpo"]
    with pytest.raises(UserError, match="no groups"):
        analyze_variance(base, ["grpo"], experts, draws=0)
    samples = OfflineBuffer.from_trajectories([row for row in buffer if row.source == "policy"])
    alone = analyze_variance(base, ["grpo"], samples, rows=24, draws=0)["objectives"]["grpo"]
    assert "no demonstrations" in alone["data_noise"]["cosine_to_sft"]["reason"]


@pytest.mark.slow
def test_single_rows_can_come_from_another_view(base: Policy, buffer: Buffer) -> None:
    found = analyze_variance(base, ["sft", "rft"], buffer, rows=24, draws=0, learns_from=Selection.CORRECT)
    assert found["cosines"]["rft"]["sft"]["value"] == pytest.approx(1)  # the same rows with the same coefficient


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rows": 0}, "rows must be at least 1"),
        ({"draws": 10}, "draws 0 or at least 256"),
        ({"draws": -1}, "draws 0 or at least 256"),
        ({"seed": -1}, "seed = -1"),
    ],
    ids=str,
)
def test_wrong_numbers_are_refused(base: Policy, buffer: Buffer, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        analyze_variance(base, ["sft"], buffer, **changes)


@pytest.mark.slow
def test_what_cannot_be_measured_is_told_and_the_rest_goes_on(base: Policy, buffer: Buffer) -> None:
    class Broken(rlzoo.Objective):
        name = "broken"

        def coefficients(self, batch: TokenBatch) -> Coefficients:
            raise KeyError("nothing here")

    class Infinite(rlzoo.Objective):
        name = "infinite"

        def coefficients(self, batch: TokenBatch) -> Coefficients:
            return Coefficients(torch.full_like(batch.logp, torch.inf))

    found = analyze_variance(base, [Broken(), "dft", Infinite()], buffer, rows=16, draws=0)
    assert list(found["objectives"]) == ["dft"]
    assert "failed: KeyError" in found["skipped"]["broken"] and "not finite" in found["skipped"]["infinite"]
    with pytest.raises(UserError, match="not finite"):
        analyze_variance(base, [Infinite()], buffer, rows=16, draws=0)
    assert not base.training


@pytest.mark.slow
def test_likely_tokens_have_an_exact_score_norm(base: Policy, buffer: Buffer) -> None:
    """In float32 Σπ² - p² would be rounding for them: S lies between (1-p)² and 2(1-p)²."""
    rows = [row for row in buffer if row.source == "demonstration"][:100]
    scored = score(Assembler(base), rows, [], {}, 0, 0)
    table = scored.table(range(100))
    assert (table.logp > -1e-4).sum() > 100
    assert (table.score_norm >= 0.9999 * table.miss**2).all() and (table.score_norm <= 2.0001 * table.miss**2).all()
    exact = load_policy("embedded", "float64")
    double = score(Assembler(exact), rows, [], {}, 0, 0).table(range(100))
    np.testing.assert_allclose(table.score_norm, double.score_norm, rtol=2e-3)


@pytest.mark.slow
def test_an_experiments_rows_are_measured_on_what_they_learn_from(base: Policy, buffer: Buffer) -> None:
    named = {"a": get_objective("sft"), "b": get_objective("sft"), "c": get_objective("dpo")}
    found = analyze_variance(base, named, buffer, rows=24, draws=0, learns_from={"b": Selection.CORRECT})
    assert found["objectives"]["a"]["data_noise"]["cosine_to_sft"]["value"] == 1
    assert found["objectives"]["b"]["data_noise"]["cosine_to_sft"]["value"] is None
    assert "correct" in found["objectives"]["b"]["token_moments"]["reason"]
    with pytest.raises(
        UserError, match=r"^c: learns_from: the view 'correct' has single rows, and 'dpo' learns from pairs"
    ):
        analyze_variance(base, named, buffer, draws=0, learns_from={"c": Selection.CORRECT})
    with pytest.raises(
        UserError, match=r"^sft: learns_from: the view 'groups' has groups, and 'sft' learns from single rows"
    ):
        analyze_variance(base, ["sft"], buffer, draws=0, learns_from=Selection.GROUPS)


def test_behaviour_log_probs_are_asked_for(base: Policy, buffer: Buffer) -> None:
    @dataclass(frozen=True)
    class NeedsBehaviour(rlzoo.Objective):
        name: ClassVar[str] = "needs-behaviour"

        @property
        def requires(self) -> tuple[Input, ...]:
            return (Behaviour(), Statistic("entropy"))

        def coefficients(self, batch: TokenBatch) -> Coefficients:
            return Coefficients(batch["entropy"])

    with pytest.raises(UserError, match="no log-probs of its author"):
        analyze_variance(base, [NeedsBehaviour()], buffer, rows=4, draws=0)


# Along training


@pytest.mark.slow
def test_the_probe_measures_every_k_steps_and_changes_nothing(base: Policy, buffer: Buffer) -> None:
    settings = Training(steps=4, batch_size=8, learning_rate=1e-3)
    weights = []
    with pytest.raises(UserError, match="no reference log-probs"):
        own = VarianceProbe(buffer, every=1, rows=16)
        train(load_policy("embedded"), get_objective("iw-sft"), buffer, settings, callbacks=[own])
    buffer = with_reference(buffer, load_policy("embedded"))
    probe = VarianceProbe(buffer, every=2, rows=16)
    for callbacks in ([], [probe]):
        policy = load_policy("embedded")
        train(policy, get_objective("iw-sft"), buffer, settings, callbacks=callbacks)
        weights.append([p.detach().clone() for p in policy.parameters()])
    assert all(map(torch.equal, *weights))
    assert [row["step"] for row in probe.records] == [2, 4]
    first, second = probe.records
    assert first["cv"] > 0 and first["trace_cov"]["value"] != second["trace_cov"]["value"]
    assert set(first) == {"step", "mean", "cv", "ess_fraction", "median_p", *NOISE}
    with pytest.raises(UserError, match="at least 1"):
        VarianceProbe(buffer, every=0)


# The command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """A command in an empty folder: its exit status, standard output and standard error, workers' included."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def main(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = cli.main(arguments)
        return status, *capfd.readouterr()

    yield main
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.slow
@pytest.mark.usefixtures("sketched", "copied")
def test_the_command_with_an_objective_from_a_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    options = ["--objectives", "sft,mine.py:RootDFT,grpo", "--rows", "16", "--draws", "256", "--steps", "2"]
    options += ["--every", "1", "--probe-rows", "8", "--limit", "24", "--workers", "1", "--out", "found"]
    status, told, errors = run("variance", *options)  # in a process of its own
    assert status == 0, errors
    assert "root-dft" in told and "report.html" in told
    found = json.loads((tmp_path / "found" / "variance.json").read_text())
    assert list(found["objectives"]) == ["sft", "root-dft", "grpo"]
    # c = √p, so tr Cov = S(1-p): for every bin between p(1-p)S and (1-p)S/p, and the coefficient's mean below 1
    assert 0 < found["objectives"]["root-dft"]["coefficients"]["mean"] < 1
    assert [row["step"] for row in found["training"]["root-dft"]] == [0, 1, 2]
    assert {p.name for p in (tmp_path / "found").iterdir()} == {
        "README.md", "buffer", "figures", "report.html", "report.md", "run.json", "variance.json",
    }  # fmt: skip
    card = (tmp_path / "found" / "README.md").read_text()
    assert "rlzoo variance --objectives" in card and "| root-dft |" in card and "## Files" in card
    assert "| problems | world:" in (tmp_path / "found" / "buffer" / "README.md").read_text()
    page = (tmp_path / "found" / "report.html").read_text()
    assert page.count("<figure>") == 6 and "root-dft" in page and page.count("<script") == 1
    assert run("report", "found")[0] == 0 and (tmp_path / "found" / "report.html").read_text() == page
    monkeypatch.setattr("rlzoo.variance.run.pool", inline_pool)
    options = ["--objectives", "dft", "--every", "0", "--draws", "0", "--rows", "16", "--out", "b"]
    status, _, errors = run("variance", "--buffer", "found/buffer", *options)
    assert status == 0, errors
    assert json.loads((tmp_path / "b" / "variance.json").read_text())["training"] == {}


def test_a_table_is_cut_and_scored_as_the_settings_of_training_say(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}+1=", "completion": "A long answer.", "reward": n} for n in (0, 1)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"training.max_completion_tokens": 2, "training.behaviour": "current"}
    table = str(tmp_path / "rows.jsonl")
    found = fill(load_experiment("both-worlds", changes), tmp_path / "b", tmp_path, table, lambda *_: None)
    buffer = OfflineBuffer.load(tmp_path / "b")
    assert [len(row.completion_ids) for row in buffer] == [2, 2] and all(row.truncated for row in buffer)
    assert buffer.is_complete("behaviour_logp")
    cut, scored = found["events"]
    assert found["rows"] == 2 and "completions cut" in cut and "2 samples were computed" in scored


@pytest.mark.slow
def test_a_row_may_be_called_as_the_analysis_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlzoo.variance.run.pool", inline_pool)
    changes = {"algorithms": {"analysis": {"objective": "sft"}}, "baseline": "analysis", "training.steps": 1}
    experiment = load_experiment("both-worlds", {**changes, "train.limit": 8, "training.batch_size": 4})
    settings = VarianceSettings(rows=8, draws=0, every=1, probe_rows=4)
    found = run_variance(experiment, tmp_path / "out", settings)
    assert list(found["objectives"]) == list(found["training"]) == ["analysis"] and found["failed"] == {}
    assert [row["step"] for row in found["training"]["analysis"]] == [0, 1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--objectives", "sftt"], "unknown objective 'sftt': did you mean 'sft'?"),
        (["--rows", "0"], "variance: rows = 0"),
        (["--draws", "5"], "give 0 or at least 256"),
        (["--workers", "0"], "--workers: 0 is too few"),
        (["--buffer", "nowhere"], "nowhere"),
        (["--model", "nowhere"], "model 'nowhere' cannot be loaded"),
        (["no-such-experiment"], "unknown experiment"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    monkeypatch.setattr("rlzoo.variance.run.pool", lambda *_: in_this_process())
    status, _, errors = run("variance", *options, "--limit", "4", "--steps", "1", "--out", "out")
    assert status == 2, errors
    (line,) = [
        line for line in errors.splitlines() if not line.startswith("  0:0")
    ]  # but for progress on a busy machine
    assert line.startswith("rlzoo: ") and told in line
    assert list(tmp_path.iterdir()) == []


def test_an_analysis_under_a_launcher_is_refused(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process would otherwise start workers and write the same files."""
    monkeypatch.setattr("rlzoo.variance.run.world_size", lambda: 2)
    status, _, errors = run("variance", "arithmetic", "--limit", "4", "--out", "out")
    assert status == 2 and "start it without accelerate or torchrun" in errors
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_is_cut_to_what_the_rows_are_worth() -> None:
    whole = load_experiment("smollm2-gsm8k")
    cut = _cut(whole, 8)
    assert (cut.train.limit, cut.rollouts.prompts) == (32, 8)
    assert [source.source for source in cut.benchmarks.values()] == [whole.train.source] and cut.validation is None
    small = _cut(load_experiment("both-worlds", {"train.limit": 5, "rollouts.prompts": 3}), 512)
    assert (small.train.limit, small.rollouts.prompts) == (5, 3)


# The report


@pytest.mark.slow
def test_the_report_says_what_figures_do_not_show(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []

    def written(folder: Path, title: str, blocks: Sequence[Block]) -> None:
        figures.extend(block for block in blocks if isinstance(block, Figure))
        write_document(folder, title, blocks)

    monkeypatch.setattr("rlzoo.variance.report.write_document", written)
    monkeypatch.setattr(plots, "FEWEST_ON_CHART", 1)  # of so few rows, noise hides most
    whole = {
        **shown(report, ["sft", "dft", "asft", "ppo", "grpo"]), "experiment": "x<script>", "model": "embedded",
        "created": "now", "settings": {}, "versions": {}, "failed": {"broken": "why"},
    }  # fmt: skip
    (tmp_path / "variance.json").write_text(json.dumps(whole))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "does not show the noise of training on demonstrations" in text
    assert "broken was left out: why" in text
    page = (tmp_path / "report.html").read_text()
    assert "x&lt;script&gt;" in page and page.count("<script>") == 1  # the page's own
    assert all(figure.hides for figure in figures) and len(figures) == 6  # no training
    monkeypatch.chdir(tmp_path)
    assert cli.main(["results", "export", str(tmp_path), "--format", "pdf", "--to", "pages"]) == 0
    assert cli.main(["results", "export", str(tmp_path), "--to", "tables"]) == 0
    pages = {file.stem: file.read_bytes() for file in (tmp_path / "pages").iterdir()}
    assert pages.keys() == {figure.name for figure in figures}
    assert all(page.startswith(b"%PDF") for page in pages.values())
    assert {"per-token.md", "coefficients.md"} <= {file.name for file in (tmp_path / "tables").iterdir()}
    assert [table.row_count for table in report_tables(whole)] == [5] * 3


def shown(report: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The report of these objectives alone, which is drawn faster."""
    cosines = {name: {other: report["cosines"][name][other] for other in names} for name in names}
    bins = [row for row in report["bins"] if row["objective"] in names]
    return {**report, "objectives": {n: report["objectives"][n] for n in names}, "cosines": cosines, "bins": bins}


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (None, "–"),
        ({"value": None, "ci_low": None, "ci_high": None}, "–"),
        ({"value": 1234.5, "ci_low": -0.001, "ci_high": None}, "1,234 [−0.001, ∞]"),
        ({"value": 1.0, "ci_low": 1.0, "ci_high": 1.0}, "1"),
        ({"value": 0.5, "ci_low": None, "ci_high": None}, "0.5"),
    ],
)
def test_estimates_are_written_with_their_intervals(found: Any, text: str) -> None:
    assert estimate(found) == text


def test_a_folder_without_an_analysis_is_refused(tmp_path: Path) -> None:
    (tmp_path / "variance.json").write_text("{}")
    with pytest.raises(UserError, match="was not written by rlzoo variance"):
        write_report(tmp_path)


def test_a_chart_leaves_out_what_noise_hides_and_needs_some() -> None:
    def entry(cosine: float | None) -> dict[str, Any]:
        shown = {"value": cosine, "ci_low": -1.0, "ci_high": 1.0}
        ratio = {"value": None if cosine is None else 2.0, "ci_low": 0.0, "ci_high": None}
        return {
            "data_noise": {"cosine_to_sft": shown, "norm_ratio_to_sft": ratio},
            "coefficients": {"ess_fraction": 1.0},
        }

    objectives = {f"objective-{i}": entry(i / 10) for i in range(plots.FEWEST_ON_CHART)}
    drawn = plots.chart({"objectives": {**objectives, "drowned": entry(None)}})
    assert drawn is not None and all(f">{name}<" in drawn.svg for name in objectives) and "drowned" not in drawn.svg
    objectives.popitem()
    assert plots.chart({"objectives": {**objectives, "drowned": entry(None)}}) is None


@pytest.mark.slow
def test_what_noise_hides_is_named_with_a_bound_and_no_number(report: dict[str, Any]) -> None:
    names = hidden(report)
    assert {"grpo", "sft"} <= set(names)
    whole = {**report, "experiment": "x", "model": "m", "created": "now", "settings": {}, "versions": {}, "failed": {}}
    text = " ".join(str(block) for block in contents(whole))
    assert f"Noise hides the gradient of {', '.join(names)}" in text
    cosine, back = report["cosines"]["grpo"]["sft"], report["cosines"]["sft"]["grpo"]
    assert cosine["value"] is cosine["ci_low"] is cosine["ci_high"] is None
    assert back == cosine | {"reason": "noise hides the gradient that it is compared with: use more rows"}
    assert NOISE_COLUMNS["cosine to SFT"](report["objectives"]["grpo"]) == "–"
    bounds = {name: report["objectives"][name]["data_noise"]["noise_scale"]["ci_low"] for name in names}
    for name, low in bounds.items():
        entry = report["objectives"][name]
        shown = NOISE_COLUMNS["noise scale (prompts)"](entry)
        assert shown == "–" if low is None else shown.startswith("> ") and low > 0
        assert entry["data_noise"]["grad_norm_sq"]["value"] is not None
    assert bounds["grpo"] is None and bounds["sft"] > 1  # nine prompts, and thirty
