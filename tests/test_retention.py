"""Retention: what fine-tuning costs on problems from before it, measured on what the base model itself says."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from comparisons import inline_pool, small
from rich.console import Console

from rlzoo import rollout
from rlzoo.buffers.problems import encode_problems, load_problems
from rlzoo.comparison import base_text, resolve, runner, studies
from rlzoo.comparison.forecast import forecast
from rlzoo.comparison.outcomes import compare_to, result_matrices, summarise
from rlzoo.comparison.report import report_table, write_report
from rlzoo.comparison.report.contents import contents
from rlzoo.comparison.report.retention import retention_table
from rlzoo.comparison.report.schema import parse_results, read_run
from rlzoo.comparison.retention import CHANGE, KL, LIKELIHOOD, per_token, summarise_retention
from rlzoo.config import Experiment
from rlzoo.document.exports import export
from rlzoo.errors import UserError
from rlzoo.policy import Policy, load_policy, log_probs
from rlzoo.policy.loading import load_shape
from rlzoo.rollout import TransformersSampler

SETS = {
    "sums": {"source": "world:arithmetic/test", "limit": 3, "max_new_tokens": 24},
    "plain": {"source": "world:facts/unseen", "limit": 2, "reward": "none"},
}
METRICS = {"avg_at_k", "greedy", "pass_at_k"}


def with_sets(algorithms: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    return small(algorithms or {"sft": {"learning_rates": [1e-2]}}, **{"retention": SETS, "seeds": [0, 1], **changes})


def quietly(experiment: Experiment, out: Path) -> dict[str, Any]:
    return runner.compare(experiment, out, 1, console=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("retention") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "pool", inline_pool)
        return out, quietly(with_sets(), out)


@pytest.mark.slow
def test_the_bases_text_is_scored_under_every_policy(finished: tuple[Path, dict[str, Any]]) -> None:
    """The base's part is computed again here from its samples, that of a cell from the outcomes."""
    out, results = finished
    policy, experiment = load_policy("embedded"), with_sets()
    rows = pq.read_table(out / "outcomes.parquet").to_pylist()
    text = [row for row in rows if row["decoding"] == "base text"]
    for name, limit in (("sums", 24), ("plain", 8)):
        encoded = encode_problems(policy.tokenizer, load_problems(experiment.retention[name]))
        settings = experiment.evaluation.model_copy(update={"max_new_tokens": limit})
        sampled = TransformersSampler(policy).sample([one.ids for one in encoded], settings, 0)
        pairs = [(one.ids, sample.ids) for one, some in zip(encoded, sampled, strict=True) for sample in some]
        logp, tokens = sum(map(sum, log_probs(policy, pairs))), sum(len(ids) for _, ids in pairs)
        of = {
            (row["algorithm"], row["seed"]): [
                own for own in text if own["benchmark"] == name and own["seed"] == row["seed"]
            ]
            for row in text
        }
        assert set(of) == {("base", -1), ("sft", 0), ("sft", 1)}
        base = results["retention"]["base"][name]
        assert base[LIKELIHOOD] == pytest.approx(logp / tokens, rel=1e-4) and base[KL] == 0
        for own in of.values():
            assert [row["base_text_tokens"] for row in own] == [row["base_text_tokens"] for row in of["base", -1]]
            assert sum(row["base_text_tokens"] for row in own) == tokens
        for cell in results["cells"]:
            own = sum(row["base_text_logp"] for row in of["sft", cell["seed"]])
            assert cell["retention"][name][LIKELIHOOD] == pytest.approx(own / tokens)
            assert cell["retention"][name][KL] == pytest.approx((logp - own) / tokens, rel=1e-3)
            assert cell["retention"][name][KL] > 0


@pytest.mark.slow
def test_the_estimate_is_the_kl_divergence(tmp_path: Path) -> None:
    """For completions of one token, the divergence is a sum over the vocabulary."""
    base, policy = load_policy("embedded"), load_policy("embedded")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    experiment = with_sets(
        retention={"sums": {"source": "world:arithmetic/test", "limit": 2, "max_new_tokens": 1, "reward": "none"}},
        evaluation__samples=500, evaluation__k=1, evaluation__temperature=0.5, evaluation__top_p=0.9,
    )  # fmt: skip
    exact = []
    for one in encode_problems(base.tokenizer, load_problems(experiment.retention["sums"])):
        with torch.no_grad():
            own, other = (m.model(torch.tensor([one.ids])).logits[0, -1].log_softmax(-1) for m in (base, policy))
        exact.append(float((own.exp() * (own - other)).sum()))
    text = base_text.base_text(lambda: base, experiment, tmp_path)["sums"]
    found, _ = base_text.text_results(policy, text, 8192)
    assert found[KL] == pytest.approx(np.mean(exact), rel=0.15) and np.mean(exact) > 0.05


def test_the_interval_of_a_ratio() -> None:
    """Sums 2 and 6 over 1 and 3 tokens: each problem has 2 per token, so their spread is that of seeds alone."""
    tokens = np.array([1.0, 3.0])
    assert per_token(np.array([[2.0, 6.0]]), tokens) == pytest.approx(np.array([[2.0, 2.0]]))
    found = per_token(np.array([[2.0, 4.0], [3.0, 3.0]]), tokens)  # 12 over 8 tokens; deviations 0.5, -0.5, 1.5, -1.5
    assert found == pytest.approx(np.array([[1.75, 1.25], [2.25, 0.75]])) and found.mean() == 12 / 8
    lengths = np.arange(1.0, 9.0)
    draws = np.random.default_rng(0).normal(0.5, 0.1, (3, 8)) * lengths
    assert per_token(draws, lengths).mean(1) == pytest.approx(draws.sum(1) / lengths.sum())


@pytest.mark.slow
def test_retention_is_apart_from_benchmarks(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """No number of a comparison changes, whatever is retained."""
    out, results = finished
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "pool", inline_pool)
        patch.setattr(runner, "write_report", lambda *_: None)
        plain = quietly(with_sets(retention={}), tmp_path / "plain")
    assert "retention" not in plain and not any("retention" in cell for cell in plain["cells"])
    for key in ("base", "base_curve", "summary", "base_summary", "mean_over_benchmarks", "metrics"):
        assert results[key] == plain[key], key
    for cell, other in zip(results["cells"], plain["cells"], strict=True):
        assert all(cell[key] == other[key] for key in ("metrics", "training"))
        timeless = [[{**point, "seconds": 0.0} for point in one["curve"]] for one in (cell, other)]
        assert timeless[0] == timeless[1]
    with_them, without = (pq.read_table(folder / "outcomes.parquet") for folder in (out, tmp_path / "plain"))
    assert without.column_names == with_them.column_names and len(with_them) > len(without)
    assert with_them.filter(~np.array(with_them["retention"])).equals(without)
    k = {"facts": 2}
    for function in (summarise, result_matrices, lambda table, k: compare_to(table, "base", k)):
        assert str(function(with_them, k)) == str(function(without, k))
    of = {(row["benchmark"], row["algorithm"], row["metric"]) for row in results["retention"]["summary"]}
    text = {(name, "base", LIKELIHOOD) for name in SETS} | {(name, "sft", m) for name in SETS for m in (LIKELIHOOD, KL)}
    assert of == text | {("sums", "base", m) for m in METRICS} | {("sums", "sft", m) for m in (*METRICS, CHANGE)}


@pytest.mark.slow
def test_the_summary_follows_from_outcomes(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished
    table = pq.read_table(out / "outcomes.parquet")
    again = summarise_retention(table, 2)
    assert again == results["retention"]["summary"]
    plain = summarise_retention(table.filter(np.array(table["benchmark"]) == "plain"), 2)
    assert plain == [row for row in again if row["benchmark"] == "plain"] and len(plain) == 3
    assert summarise_retention(table.filter(np.array(table["benchmark"]) == "facts"), 2) == []
    rows = {(row["algorithm"], row["benchmark"], row["metric"]): row for row in again}
    cells = [cell["retention"] for cell in results["cells"]]
    for name, metric in (("sums", KL), ("plain", KL), ("sums", LIKELIHOOD), ("sums", "avg_at_k")):
        row = rows["sft", name, metric]
        assert row["mean"] == pytest.approx(np.mean([cell[name][metric] for cell in cells])), (name, metric)
        assert row["ci_low"] < row["mean"] < row["ci_high"] and row["seeds"] == 2
    base = rows["base", "sums", "avg_at_k"]["mean"]
    assert rows["sft", "sums", CHANGE]["mean"] == pytest.approx(rows["sft", "sums", "avg_at_k"]["mean"] - base)


@pytest.mark.slow
def test_the_report_has_a_section_and_a_figure(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, results = finished
    section = (out / "report.md").read_text().partition("## Retention")[2].partition("\n## ")[0]
    rows = {(row["algorithm"], row["benchmark"], row["metric"]): row for row in results["retention"]["summary"]}
    shown = rows["sft", "sums", KL]
    kl = f"{shown['mean']:.3f} [{shown['ci_low']:.3f}, {shown['ci_high']:.3f}]".replace("-", "−")
    assert kl in section and "| algorithm | KL from base (nats per token) | seeds |" in section
    table = retention_table(parse_results(results), "sums")
    assert table.header == ["algorithm", "avg@3 (%)", "difference from base (points)", *table.header[3:]]
    assert [row[0].text for row in table.rows] == ["base", "sft"] and table.rows[0][2].text == "–"
    shown = {str(table.title): table.columns for table in report_table(results)}
    for name in ("sums", "plain"):
        columns = shown[f"retention, {name}: mean and 95 % interval"]
        found = retention_table(parse_results(results), name)
        assert [[str(cell) for cell in column.cells] for column in columns] == [
            [row[place].text for row in found.rows] for place in range(len(found.header))
        ]
    drawn = (out / "figures" / "retention-0.svg").read_text()
    assert all(word in drawn for word in ("change in accuracy", "KL from the base", "gain on facts", ">sft<"))
    assert "change in accuracy" not in (out / "figures" / "retention-1.svg").read_text()
    for name in ("results.json", "outcomes.parquet"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    results = json.loads((out / "results.json").read_text())
    del results["retention"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_report(tmp_path)
    assert "## Retention" not in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_a_study_keeps_retention(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, results = finished
    study = read_run(studies.save_study(out, tmp_path))
    assert study.results.retention == read_run(out).results.retention is not None
    assert [cell.retention for cell in study.results.cells] == [cell["retention"] for cell in results["cells"]]
    files = export(contents(study, None), tmp_path / "tables", "csv")
    assert {"retention-sums.csv", "retention-plain.csv"} <= {file.name for file in files}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_the_text_is_sampled_once_and_survives_an_interruption(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, scored, real = list[str](), list[int](), base_text.text_results
    sampler_of = rollout.sampler_of

    def counted(policy: Policy, settings: Any) -> Any:
        drawn.append(f"{settings.max_new_tokens}")
        return sampler_of(policy, settings)

    def stopping(*arguments: Any) -> Any:
        scored.append(1)
        if len(scored) == 4:  # within the second seed's cell
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(base_text, "sampler_of", counted)
    monkeypatch.setattr(base_text, "text_results", stopping)
    with pytest.raises(KeyboardInterrupt):
        quietly(with_sets(), tmp_path / "out")
    assert drawn == ["24", "8"]
    (damaged,) = (tmp_path / "out" / ".state").glob("*sums*.result")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError, match="the base's text for 'sums' cannot be read: repeat the command"):
        base_text.saved_text(with_sets(), tmp_path / "out" / ".state")
    results = quietly(with_sets(), tmp_path / "out")
    assert drawn == ["24", "8", "24"], "only what was damaged"
    assert results["retention"] == finished[1]["retention"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"retention": {"facts": SETS["sums"]}},
            "'facts' is the name of a benchmark and of a retention set: rename one",
        ),
        (
            {"benchmarks": {"facts": {"source": "world:facts/test", "reward": "none"}}},
            "the benchmark 'facts' needs a reward: only a retention set can have none",
        ),
        ({"retention": {"mean over benchmarks": SETS["sums"]}}, "retention.mean over benchmarks: this name stands for"),
        ({"retention": {"mine": {"source": "rows.jsonl"}}}, "needs the column 'answer'"),
        ({"retention": {"mine": {"source": "none.jsonl", "reward": "none"}}}, "none.jsonl"),
        ({"retention": {"mine": {"source": "rows.jsonl", "rewards": "none"}}}, "'rewards'"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(
    changes: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=?", "solution": "#### 2"}')
    with pytest.raises(UserError) as caught:
        resolve.check(small({"sft": {}}, model="none", **changes))
    assert told in str(caught.value) and "\n" not in str(caught.value)
    plain = {"mine": {"source": "rows.jsonl", "reward": "none"}}
    resolve.check(small({"sft": {}}, model="none", retention=plain))


def test_a_plan_counts_retention() -> None:
    shape, length = load_shape("embedded"), 5.0
    rows = {"sft": {}, "dft": {"learning_rates": [1e-3, 1e-2]}}
    with_them, without = (forecast(with_sets(rows, retention=sets), shape, length) for sets in (SETS, {}))
    passed = with_them.lengths.flops(shape, length)
    samples, completions = 3 * (3 + 1), (3 + 2) * 3  # of the scored set, with a greedy one; of the base's text
    for row, other, share in zip(with_them.rows, without.rows, (1, 1 / 2), strict=True):
        assert row.evaluated_tokens - other.evaluated_tokens == pytest.approx(share * samples * length)
        assert row.flops - other.flops == pytest.approx(share * completions * passed)
    assert with_them.shared_evaluated_tokens - without.shared_evaluated_tokens == (samples + completions) * length
    assert with_them.shared_flops - without.shared_flops == pytest.approx(completions * passed)


def test_options_that_limit_a_comparison_limit_retention() -> None:
    from rlzoo.cli.settings import experiment_of

    sets = [f"retention.{name}={json.dumps(one)}" for name, one in SETS.items()]
    assert {one.limit for one in experiment_of("facts", sets, limit=1).retention.values()} == {1}
    assert experiment_of("facts", [*sets, "retention.sums.limit=2"], limit=1).retention["sums"].limit == 2
