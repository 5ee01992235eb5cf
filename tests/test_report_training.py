"""The report on the course of training: curves against costs, rows still rising at the end, and clipping."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comparisons import small

from rlzoo.bases.ratios import clipped_gradient, ratio_metrics
from rlzoo.comparison import resolve
from rlzoo.comparison.report import clipping, endings, plots, report_table, tables
from rlzoo.comparison.report.schema import FinishedRun, Results, parse_results
from rlzoo.config import load_experiment
from rlzoo.document import Paragraph, Table
from rlzoo.errors import UserError

RIGHT = {"k": 1, "avg_at_k": 0.5, "greedy": 0.5, "pass_at_k": 0.5}


def point(step: int, by_problem: Any, cost: float | None = None, **more: Any) -> dict[str, Any]:
    costs = {} if cost is None else {"gradient_tokens": 10 * cost, "flops": 1000 * cost}
    return (
        {"step": step, "metrics": {"sums": {"avg_at_k": np.mean(by_problem), "by_problem": [*by_problem]}}}
        | costs
        | more
    )


def cell(algorithm: str, seed: int, curve: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"algorithm": algorithm, "seed": seed, "metrics": {"sums": RIGHT}, "curve": [*curve], **more}


def results_of(*cells: dict[str, Any], **more: Any) -> Results:
    data = {"experiment": "x", "created": "now", "base": {"sums": RIGHT}, "base_curve": point(0, [0.25] * 4, 0)}
    return parse_results({**data, "cells": [*cells], "summary": [], **more})


def run_of(results: Results) -> FinishedRun:
    return FinishedRun(results, None)  # these sections read no outcomes


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, none of which is made into SVG, which takes longer than all the rest."""
    drawn: list[Any] = []

    def drawing(figure: Any) -> str:
        drawn.append(figure)
        return ""

    monkeypatch.setattr(plots, "Drawing", drawing)
    monkeypatch.setattr(clipping, "Drawing", drawing)
    return drawn


def test_curves_are_drawn_against_costs_that_start_with_the_shared_buffer(figures: list[Any]) -> None:
    dear = [point(step, [0.1 * step] * 4, 50 * step) for step in (2, 4)]
    cells = [cell("cheap", seed, [point(2, [0.5] * 4, 2 + seed), point(4, [0.75] * 4, 4)]) for seed in (0, 1)]
    results = results_of(*cells, cell("dear", 0, dear, start={"gradient_tokens": 0, "flops": 7e3}))
    steps, mean, *_ = plots.curves_of(results, "sums", "avg_at_k")["cheap"]
    assert steps.tolist() == [0, 2, 4] and mean.tolist() == [0.25, 0.5, 0.75]
    found = plots.curves_of(results, "sums", "avg_at_k", "flops")
    assert list(found) == ["dear"], "the other has no record of what it cost at the start"
    assert found["dear"][0].tolist() == [7e3, 1e5, 2e5]
    started = [one | {"start": {"gradient_tokens": 0, "flops": 0}} for one in cells]
    results = results_of(*started, cell("dear", 0, dear, start={"gradient_tokens": 0, "flops": 7e3}))
    assert plots.curves_of(results, "sums", "avg_at_k", "flops")["cheap"][0].tolist() == [0, 2500, 4000]
    plots.learning_curves(results, "sums")
    by_label = {axes.get_xlabel(): axes for axes in figures[-1].axes}
    assert list(by_label) == ["optimizer step", "gradient tokens", "FLOPs"]
    assert [axes.get_xscale() for axes in by_label.values()] == ["linear", "log", "log"], (
        "they differ by a factor of 50"
    )
    assert by_label["FLOPs"].lines[0].get_xdata().tolist() == [2500, 4000], "there is no 0 on a logarithmic axis"


def test_a_curve_ends_where_its_first_seed_ended() -> None:
    short, long = [point(2, [0.5] * 4)], [point(2, [1.0] * 4), point(4, [1.0] * 4)]
    steps, mean, low, high = plots.curves_of(results_of(cell("a", 0, short), cell("a", 1, long)), "sums", "avg_at_k")[
        "a"
    ]
    assert (steps.tolist(), mean.tolist(), low.tolist(), high.tolist()) == (
        [0, 2],
        [0.25, 0.75],
        [0.25, 0.5],
        [0.25, 1.0],
    )


def steps_of(losses: Sequence[float], logps: Sequence[float]) -> dict[str, Any]:
    return {
        "training": [{"step": i, "loss": a, "logp": b} for i, (a, b) in enumerate(zip(losses, logps, strict=True), 1)]
    }


@pytest.mark.slow
def test_the_loss_is_drawn_beside_the_perplexity_of_rows_that_learn_from_the_same_batches(figures: list[Any]) -> None:
    cells = [
        cell("sft", 0, [], **steps_of([2, 1], [-2, -1])),
        cell("sft", 1, [], **steps_of([4, 3, 9], [-4, -3, -9])),
        cell("dft", 0, [], **steps_of([0.2, -0.1], [-2, -3])),
        cell("dft", 1, [], **steps_of([0.4, 0.3], [-4, -5])),
        cell("rft", 0, [], **steps_of([1.9, 1], [-1.9, -1])),
        cell("rft", 1, [], **steps_of([4, 1], [-4, -1])),
        cell("dpo", 0, [], training=[{"step": 1, "loss": 0.7}]),
    ]
    found = plots.loss_curves(results_of(*cells), "sft")
    assert {name: curves.tolist() for name, curves in found.items()} == {
        "sft": [[3, 2], [3, 2]],
        "dft": [pytest.approx([0.3, 0.1]), [3, 4]],
    }, "means over seeds while all have steps; seed 0 of rft started from another batch"
    assert [[entry.text for entry in row] for row in tables.loss_table(found).rows] == [
        ["sft", "3", "2", "3", "2"],
        ["dft", "0.3", "0.1", "3", "4"],
    ]
    assert plots.training_loss(results_of(*cells), "sft") is not None
    loss, perplexity = figures[-1].axes
    assert [line.get_label() for line in loss.lines] == ["sft", "dft"]
    assert perplexity.lines[1].get_ydata() == pytest.approx(np.exp([3, 4])) and loss.get_yscale() == "log"
    assert plots.training_loss(results_of(*cells[:2], cells[-1]), "sft") is None, "there is nothing to compare"


def test_accuracy_is_drawn_against_the_held_out_likelihood(figures: list[Any]) -> None:
    def summary(name: str, mean: float) -> dict[str, Any]:
        row = {"algorithm": name, "benchmark": "sums", "metric": "avg_at_k", "seeds": 1}
        return row | {"mean": mean, "ci_low": mean - 0.1, "ci_high": mean + 0.1}

    names = [f"a{i}" for i in range(8)]
    measured = {name: {"sums": RIGHT | {"log_likelihood": -1.0 - i}} for i, name in enumerate(names)}
    results = results_of(
        *({**cell(name, 0, []), "metrics": measured[name]} for name in names),
        summary=[summary(name, 0.1 * i) for i, name in enumerate(names)],
    )
    assert plots.likelihoods(results, "sums") is not None
    points = [line for line in figures[-1].axes[0].lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in points] == names, "the base has no likelihood here"
    assert [line.get_xdata()[0] for line in points] == [-1.0 - i for i in range(8)]
    assert [line.get_ydata()[0] for line in points] == pytest.approx([10 * i for i in range(8)])
    looks = {(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line in points}
    assert len(looks) == 8, "no two algorithms look the same"
    assert plots.likelihoods(results_of(cell("a", 0, [])), "sums") is None


def rises(gains: Sequence[float]) -> list[dict[str, Any]]:
    """Cells of an algorithm whose last point exceeds the one before by these gains on four problems, about."""
    before = np.array([0.2, 0.4, 0.2, 0.4])
    wobble = np.array([0.01, -0.01, 0.02, -0.02])
    more: dict[str, Any] = {"ended": "steps", "training": [{"step": 1}] * 4}
    return [
        cell("a", seed, [point(2, before), point(4, before + gain + wobble)], **more) for seed, gain in enumerate(gains)
    ]


def test_a_row_that_still_rises_is_named() -> None:
    rising, level = results_of(*rises([0.3, 0.31, 0.29])), results_of(*rises([0.3, -0.3, 0.0]))
    (rise,) = endings.last_rises(rising).values()
    assert rise.mean == pytest.approx(0.3) and 0 < rise.low < 0.3 < rise.high
    assert endings.still_rising(rising) == ["a"] and endings.still_rising(level) == []
    blocks = list(endings.endings(run_of(rising), "a"))
    warning, table = blocks[1], blocks[2]
    assert isinstance(warning, Paragraph) and warning.text.startswith("a was still rising at the end of training")
    assert warning.text == endings.rising_at_the_end(rising) and endings.rising_at_the_end(level) is None
    assert isinstance(table, Table) and [entry.text for entry in table.rows[0]][:3] == ["a", "4", "steps"]
    assert table.rows[0][4] == ("still rising", True)
    assert "No curve rises by more than its noise" in str(list(endings.endings(run_of(level), "a"))[1])
    assert list(endings.endings(run_of(results_of(cell("a", 0, []))), "a")) == []


def test_the_rise_is_that_over_the_last_quarter() -> None:
    level = [0.2, 0.4, 0.2, 0.4]
    steps = {10: 0.0, 20: 0.1, 31: 0.3, 35: 0.3, 40: 0.3}
    cells = [
        cell("a", seed, [point(step, [value + gain for value in level]) for step, gain in steps.items()])
        for seed in (0, 1)
    ]
    assert endings.last_rises(results_of(*cells))["a"].mean == pytest.approx(0.2)
    only = [cell("a", seed, [point(40, [0.5] * 4)]) for seed in (0, 1)]
    assert endings.last_rises(results_of(*only))["a"].mean == 0.25, "from the base"


def test_the_rise_is_that_on_validation_where_it_is_measured() -> None:
    told = [rises([0.3, 0.31, 0.29])[seed] for seed in range(3)]
    for one in told:
        one["curve"] = [{**p, "validation": {"avg_at_k": 0.5, "by_problem": [0.5, 0.25, 0.75]}} for p in one["curve"]]
    assert endings.last_rises(results_of(*told))["a"].mean == 0
    told[0]["ended"] = "flat"
    table = list(endings.endings(run_of(results_of(*told)), "a"))[2]
    assert isinstance(table, Table) and table.rows[0][2].text == "flat (1), steps (2)"


def test_old_results_have_a_rise_over_their_seeds_alone() -> None:
    def old(step: int, value: float) -> dict[str, Any]:
        return {"step": step, "metrics": {"sums": {"avg_at_k": value}}}

    cells = [cell("a", seed, [old(2, 0.2), old(4, 0.5 + 0.01 * seed)]) for seed in range(3)]
    rise = endings.last_rises(results_of(*cells))["a"]
    # Student's quantile with 2 degrees of freedom is 4.303: 0.31 ± 4.303 · 0.01/√3
    assert (rise.mean, rise.high - rise.mean) == pytest.approx((0.31, 4.3027 * 0.01 / 3**0.5), rel=1e-3)
    assert endings.last_rises(results_of(cells[0])) == {}, "a single number has no noise to compare with"


def test_what_clipping_takes_from_the_gradient() -> None:
    logp = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    ratio = torch.tensor([[1.5, 1.0, 0.5]], dtype=torch.float64)
    advantage = torch.tensor([[2.0, 2.0, 2.0]], dtype=torch.float64)
    values, _, clipped = clipped_gradient(ratio, advantage, 0.2, 0.2)
    found = {name: value[0].tolist() for name, value in ratio_metrics(logp, ratio, advantage, values, clipped).items()}
    assert found == {
        "ratio": [1.5, 1.0, 0.5],
        "ratio_deviation": [0.5, 0.0, 0.5],
        "clipped": [1.0, 0.0, 0.0],
        "signal": pytest.approx([3 * 0.5, 2 * 0.75, 1 * 0.75]),
        "signal_clipped": pytest.approx([3 * 0.5, 0.0, 0.0]),
    }


def clipping_of(mode: str, **metrics: tuple[float, float]) -> list[Any]:
    """The section for a row whose metrics go from one value to another in eight steps."""
    training = [{"step": i + 1} | {k: a + (b - a) * i / 7 for k, (a, b) in metrics.items()} for i in range(8)]
    summary = [
        {"algorithm": "grpo", "benchmark": "sums", "metric": "avg_at_k", "mean": 0.51}
        | {"ci_low": 0.4, "ci_high": 0.6, "seeds": 1}
    ]
    config = {"algorithms": {"grpo": {"mode": mode}}}
    results = results_of(cell("grpo", 0, [], training=training), summary=summary, config=config)
    return list(clipping.clipping(run_of(results), "grpo"))


def test_the_report_says_what_clipping_leaves(figures: list[Any]) -> None:
    told = clipping_of(
        "offline",
        clipped=(0.0, 0.14),
        signal=(2.0, 2.0),
        signal_clipped=(0.0, 1.4),
        ratio_deviation=(0.0, 0.7),
        zero_advantage=(0.25, 0.25),
        kl=(0.0, 0.07),
    )
    sentence = told[2].text
    # the quarters are steps 1, 2 and 7, 8 of 0 … 0.14: means 0.01 and 0.13, and half of 0.1 … 1.3
    assert sentence == (
        "grpo learns from the fixed buffer: 1.0 % of its tokens are clipped in the first quarter of training, 13.0 % "
        "in the last, and with them 65.0 % of the gradient, where ratios deviate from 1 by 0.65 on average; 25.0 % of "
        "its groups have zero advantage. It ends +1.0 points from the base model on sums."
    )
    row = [entry.text for entry in told[3].rows[0]]
    assert row == ["grpo", "offline", "1.0 → 13.0", "5.0 → 65.0", "0.65", "0.065", "25.0"]
    titles = ["tokens clipped, %", "gradient clipped, %", "mean |ρ − 1|", "zero advantage, %"]
    assert [axes.get_title(loc="left") for axes in figures[-1].axes] == titles
    assert figures[-1].axes[1].lines[0].get_ydata() == pytest.approx([10 * i for i in range(8)])
    online = clipping_of("online", **{"part/clipped": (0.0, 0.0)})
    assert online[2].text.startswith("grpo samples every batch anew: 0.0 % of its tokens")
    assert [entry.text for entry in online[3].rows[0]][3:] == ["– → –", "–", "–", "–"]
    assert clipping_of("offline", loss=(1.0, 0.5)) == []


def test_rows_with_an_online_counterpart_say_where_it_is(tmp_path: Path) -> None:
    experiment = load_experiment("arithmetic")
    resolve.check(experiment)
    results = results_of(cell("grpo", 0, []), config=json.loads(experiment.model_dump_json()))
    note = tables.online_counterparts(results)
    assert (
        note is not None and "grpo as grpo-online of own-samples" in note and "ppo as ppo-online of own-samples" in note
    )
    assert str(report_table(results)[0].caption) == note
    assert tables.online_counterparts(results_of(cell("grpo", 0, []))) is None
    for reference, told in (
        ("own-samples", "is not of the form experiment/row"),
        ("own-sample/grpo-online", "did you mean"),
        ("own-samples/grpo-onlin", "did you mean 'grpo-online'"),
        ("own-samples/ppo-online", "ppo-online of own-samples does not train grpo online"),
        ("arithmetic/grpo", "grpo of arithmetic does not train grpo online"),
    ):
        with pytest.raises(UserError, match=rf"^algorithms\.grpo\.online_counterpart: .*{told}"):
            resolve.check(small({"grpo": {"online_counterpart": reference}}))
