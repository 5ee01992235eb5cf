"""Training in stages: the warm-up that all cells share, and rows that train one after another."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import forked, inline_pool, small
from test_compare import numbers, outcomes, quietly
from test_report import synthetic_run

from rlzoo import cli
from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.problems import demonstrations, load_problems
from rlzoo.cli.settings import changes_of
from rlzoo.comparison import one_cell, resolve, runner, warm_up
from rlzoo.comparison.forecast import forecast
from rlzoo.comparison.one_stage import weights_of
from rlzoo.comparison.outcomes import compare_to
from rlzoo.comparison.plan import FirstStages, first_stages
from rlzoo.comparison.planning import planned
from rlzoo.comparison.report.contents import contents
from rlzoo.comparison.report.schema import parse_results, read_run
from rlzoo.comparison.report.stages import before_and_after, start
from rlzoo.comparison.report.tables import percent, points
from rlzoo.config import Experiment, VarianceSettings
from rlzoo.document import Heading, Paragraph, Table
from rlzoo.errors import UserError
from rlzoo.objective import get_objective
from rlzoo.policy import load_policy
from rlzoo.policy.loading import load_shape, load_tokenizer, save_policy
from rlzoo.policy.sequences import length
from rlzoo.training import Trainer, train
from rlzoo.variance import run as variance
from rlzoo.variance.run import run_variance

WARM: dict[str, Any] = {
    "objective": "sft", "training": {"steps": 3, "batch_size": 4, "learning_rate": 1e-3}, "seed": 5,
}  # fmt: skip
ROWS: dict[str, Any] = {"sft": {}, "dpo": {"training": {"steps": 1}}}


def warmed(**changes: Any) -> Experiment:
    return small(ROWS, warm_up={**WARM, **changes})


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base model of `warmed`, trained without it."""
    experiment, folder = small(ROWS), tmp_path_factory.mktemp("warm")
    policy = load_policy("embedded")
    rows = demonstrations(policy.tokenizer, load_problems(experiment.train), None)
    settings = experiment.training.model_copy(update=WARM["training"])
    train(policy, get_objective("sft"), OfflineBuffer.from_trajectories(rows), settings, WARM["seed"])
    save_policy(policy, folder / "model")
    return str(folder / "model")


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Interrupt, or kill, training after this number of batches, once; returns the steps that are done."""

    real = Trainer._between_batches

    def stop(after: int, kill: bool = False) -> list[int]:
        done = list[int]()

        def between(self: Trainer) -> None:
            real(self)
            done.append(self.step)
            if len(done) == after and kill:
                assert self.checkpoints is not None
                self.checkpoints.wait()
                signal.raise_signal(signal.SIGKILL)
            if len(done) == after:
                raise KeyboardInterrupt

        monkeypatch.setattr(Trainer, "_between_batches", between)
        return done

    return stop


# The warm-up


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_every_cell_starts_from_the_models_warm_up(by_hand: str, tmp_path: Path) -> None:
    """Cells, buffer, reference and base are those of the model that was trained by hand."""
    with_it, without = quietly(warmed(), tmp_path / "with"), quietly(small(ROWS, model=by_hand), tmp_path / "without")
    differing = {key for key, value in numbers(with_it).items() if value != numbers(without)[key]}
    assert differing == {"config", "warm_up"}
    assert outcomes(tmp_path / "with").equals(outcomes(tmp_path / "without"))
    assert with_it["config"]["model"] == "embedded" and with_it["config"]["warm_up"]["seed"] == 5
    assert without["warm_up"] is None and with_it["warm_up"]["steps"] == 3 and len(with_it["warm_up"]["training"]) == 3
    assert with_it["warm_up"]["costs"]["gradient_tokens"] > 0
    assert "embedded after a warm-up that all cells share: 3 steps of sft" in start(parse_results(with_it))
    assert start(parse_results(without)) == "Every algorithm started from the base model."
    assert not (tmp_path / "with" / ".state").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_warm_up_that_was_stopped_resumes_and_is_trained_once(
    tmp_path: Path, stopping: Callable[[int], list[int]]
) -> None:
    experiment = small(ROWS, warm_up=WARM, training__checkpoint_seconds=0)
    whole = quietly(experiment, tmp_path / "whole")
    done = stopping(2)
    with pytest.raises(KeyboardInterrupt):
        quietly(experiment, tmp_path / "out")
    again = stopping(2)
    with pytest.raises(KeyboardInterrupt):  # in the first step of the first cell
        quietly(experiment, tmp_path / "out")
    assert (done, again) == ([1, 2], [3, 1])
    last = stopping(99)
    found = quietly(experiment, tmp_path / "out")
    assert last == [2, 1], "sft and dpo; nothing of the warm-up"
    assert numbers(found) == numbers(whole)
    assert outcomes(tmp_path / "out").equals(outcomes(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.usefixtures("copied")
def test_processes_share_a_warm_up(tmp_path: Path, by_hand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlzoo.comparison.runner.write_report", lambda *_: None)
    found = quietly(warmed(), tmp_path / "with", workers=2)
    monkeypatch.setattr("rlzoo.comparison.runner.pool", inline_pool)
    assert found["failed"] == []
    assert numbers(found)["cells"] == numbers(quietly(small(ROWS, model=by_hand), tmp_path / "without"))["cells"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"objective": "dft"}),
        ({"objective": "power"}, {"objective": "power", "options": {"alpha": 0.5}}),
        ({}, {"train": {"source": "world:facts/validation", "limit": 6}}),
        ({}, {"training": {**WARM["training"], "learning_rate": 1e-4}}),
        ({}, {"seed": 6}),
    ],
    ids=["objective", "options", "train", "training", "seed"],
)
def test_what_a_warm_up_does_is_a_setting(first: dict[str, Any], second: dict[str, Any], tmp_path: Path) -> None:
    made = []
    for name, changes in (("first", first), ("second", second), ("again", second)):
        found = warm_up.warm_up(warmed(**changes), tmp_path / name, None, lambda share, detail: None)
        weights = load_policy(warm_up.after_warm_up(warmed(), tmp_path / name).model).model.state_dict()
        made.append((found["training"], torch.cat([value.flatten() for value in weights.values()])))
    (one, before), (other, after), (same, again) = made
    assert one != other == same and not torch.equal(before, after) and torch.equal(after, again)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "adapters"])
def test_a_warm_up_trains_all_weights_unless_it_has_adapters_of_its_own(lora: Any, tmp_path: Path) -> None:
    training = {**WARM["training"], **({} if lora is None else {"lora": lora})}
    experiment = small(ROWS, warm_up={"objective": "sft", "training": training}, training__lora={"rank": 2})
    warm_up.warm_up(experiment, tmp_path, None, lambda share, detail: None)
    after = warm_up.after_warm_up(experiment, tmp_path)
    assert after.warm_up is None and after.training.lora is not None
    found, base = (dict(load_policy(name).named_parameters()) for name in (after.model, "embedded"))
    changed = {name.rpartition(".")[0].rpartition(".")[2] for name in base if not torch.equal(found[name], base[name])}
    assert ("embed_tokens" in changed) is (lora is None) and "q_proj" in changed


def test_a_warm_up_cuts_long_rows_and_tells_how_far_its_epochs_have_come(tmp_path: Path) -> None:
    problems, told = load_problems(small(ROWS).train), list[tuple[float, str]]()
    rows = demonstrations(load_tokenizer("embedded"), problems)
    limit, lengths = 1 + max(len(row.prompt_ids) for row in rows), list(map(length, rows))
    experiment = warmed(training={"epochs": 1, "batch_size": len(rows) // 2, "max_length": limit})
    found = warm_up.warm_up(experiment, tmp_path, None, lambda share, detail: told.append((share, detail)))
    assert told[-1] == (1.0, "step 2/2")
    assert found["costs"]["gradient_tokens"] == sum(min(own, limit) for own in lengths) < sum(lengths)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": "grpo"}, "warm_up.objective: 'grpo' learns from samples, and a warm-up from demonstrations"),
        ({"objective": "sftt"}, "warm_up: unknown objective 'sftt'"),
        ({"options": {"clip": 1}}, "warm_up: unknown option of objective 'sft' 'clip'"),
        ({"training": {"stepz": 1}}, "warm_up: unknown setting in warm_up.training 'stepz': did you mean 'steps'?"),
        ({"training": {"dtype": "bfloat16"}}, "warm_up: training.dtype: bfloat16 rounds away small updates"),
        ({"train": {"source": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"train": {"source": "FILE"}}, "warm_up.train: its problems have no worked solutions"),
    ],
    ids=str,
)
def test_a_warm_up_that_cannot_be(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "1+1=?", "answer": "2"}))
    if changes.get("train") == {"source": "FILE"}:
        changes = {"train": {"source": str(tmp_path / "p.jsonl")}}
    with pytest.raises(UserError) as caught:
        resolve.check(warmed(**changes))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_no_short_name_makes_a_warm_up() -> None:
    """``--set seed=1`` would have been short for the only setting of that name."""
    for key in ("seed", "objective"):
        with pytest.raises(UserError, match=f"--set {key}: unknown setting"):
            changes_of([f"{key}=1"], Experiment)
    assert changes_of(["warm_up.seed=1"], Experiment) == {"warm_up.seed": 1}


@pytest.mark.slow
def test_a_plan_counts_the_warm_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = warmed(objective="iw-sft")
    found, plain = (forecast(one, load_shape("embedded")) for one in (experiment, small(ROWS)))
    made = warm_up.warm_up(experiment, tmp_path, None, lambda share, detail: None)["costs"]
    assert plain.warm_up is None and found.warm_up is not None
    assert found.warm_up.gradient_tokens == pytest.approx(made["gradient_tokens"], rel=0.1)
    assert found.flops - plain.flops == found.warm_up.flops == pytest.approx(made["flops"], rel=0.1)
    arguments = [
        "plan",
        "facts",
        "--gpu",
        "h100",
        "--limit",
        "4",
        "--set",
        "warm_up={objective: sft, training: {steps: 2}}",
    ]
    assert cli.main(arguments) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "warm-up 1" in told and "in total, including the warm-up, the shared buffer" in told
    assert planned(experiment, workers=1)["lengths"]["assumed"], "its samples are not those of the model before it"


@pytest.mark.slow
def test_an_analysis_is_of_the_model_after_its_warm_up(
    by_hand: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many demonstrations in the warm-up as without the cut to what an analysis needs."""
    monkeypatch.setattr(variance, "pool", inline_pool)
    settings = VarianceSettings(rows=1, draws=0, every=0)
    found = run_variance(warmed(), tmp_path / "with", settings)
    other = run_variance(small(ROWS, model=by_hand), tmp_path / "without", settings)
    assert found["warm_up"]["steps"] == 3 and found["model"] == "embedded" and other["warm_up"] is None
    for part in ("objectives", "skipped", "cosines"):
        assert found[part] == other[part]
    assert "embedded after a warm-up of 3 steps of sft" in (tmp_path / "with" / "report.md").read_text()


@pytest.mark.slow
def test_commands_that_run_the_base_model_warm_it_up(
    by_hand: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that is given is evaluated or sampled as it is."""
    shared = [f"--set=warm_up={json.dumps(WARM)}", "--set", "training.steps=2", "--limit", "6"]
    evaluation = ["evaluate", "facts", *shared, "--samples", "2", "--k", "2", "--json"]

    def evaluated(*more: str) -> Any:
        assert cli.main([*evaluation, *more]) == 0
        return json.loads(capsys.readouterr().out)

    assert evaluated() == evaluated("--model", by_hand) != evaluated("--model", "embedded")

    def sampled(name: str, *more: str) -> list[str]:
        out = tmp_path / name
        assert cli.main(["rollout", "facts", *shared, "--rollout-samples", "2", "--out", str(out), *more]) == 0
        return OfflineBuffer.load(out).column("completion")

    assert sampled("warm") == sampled("given", "--set", f"model={by_hand}") != sampled("plain", "--model", "embedded")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given", "plain", "warm"]


# Stages of a row

STAGED: dict[str, Any] = {
    "sft": {"training": {"learning_rate": 1e-3}},
    "dpo": {"training": {"steps": 1}},
    "grpo": {"mode": "online", "options": {"kl_coefficient": 0.1}, "training": {"steps": 1}},
    "sft-dpo": {"stages": ["sft", "dpo"]},
    "sft-dpo-grpo": {"stages": ["sft", "dpo", "grpo"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "adapters"])
@pytest.mark.usefixtures("undrawn")
def test_each_stage_starts_from_the_one_before(lora: Any, tmp_path: Path) -> None:
    results = quietly(small(STAGED, training__lora=lora), tmp_path / "out")
    assert results["failed"] == []
    cells = {cell["algorithm"]: cell for cell in results["cells"]}
    first, two, three = (cells[name]["training"] for name in ("sft", "sft-dpo", "sft-dpo-grpo"))
    assert [(row["step"], row["stage"]) for row in three] == [(1, 1), (2, 1), (3, 2), (4, 3)]
    assert [{**row, "stage": 1} for row in first] == two[:2] == three[:2], "as in the row of the first stage"
    assert two[2] == three[2]
    # the policy is its own reference at the start of a stage; under the base's stored log-probs it would not be
    assert two[2]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert two[2]["logp"] != cells["dpo"]["training"][0]["logp"]
    assert three[3]["kl"] == pytest.approx(0, abs=1e-6)
    assert [(point["step"], point["stage"]) for point in cells["sft-dpo-grpo"]["curve"]] == [(2, 1), (3, 2), (4, 3)]
    assert "stage" not in cells["sft"]["curve"][0] and "stage" not in first[0]
    for cost in ("gradient_tokens", "sampled_tokens", "flops"):
        sums = [cells[name]["costs"][cost] for name in ("sft", "dpo")]
        assert cells["sft-dpo"]["costs"][cost] == sum(sums)
        curve = [point[cost] for point in cells["sft-dpo-grpo"]["curve"]]
        assert curve == sorted(curve) and curve[-1] == cells["sft-dpo-grpo"]["costs"][cost]
    assert cells["sft-dpo"]["metrics"] != cells["sft"]["metrics"] or lora is not None


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_stage_that_reads_the_buffer_beside_fresh_samples_has_a_reference_of_its_own(tmp_path: Path) -> None:
    rows = {
        "sft": {"training": {"learning_rate": 1e-3}},
        "iw-sft": {},  # for which the buffer stores the base model's log-probs of the demonstrations
        "both": {"objective": "mixture", "mode": "online", "options": {"weights": {"iw-sft": 0.5, "grpo": 0.5}}},
        "sft-both": {"stages": ["sft", "both"]},
    }
    results = quietly(small(rows, training__steps=1), tmp_path / "out")
    cells = {cell["algorithm"]: cell for cell in results["cells"]}
    assert cells["both"]["training"][0]["iw-sft/weight"] == pytest.approx(1, abs=1e-6)
    assert cells["sft-both"]["training"][1]["iw-sft/weight"] == pytest.approx(1, abs=1e-6)
    single = cells["sft"]["costs"]["flops"] + cells["both"]["costs"]["flops"]
    assert cells["sft-both"]["costs"]["flops"] > single, "the log-probs that are computed anew"


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_samples_that_two_stages_learn_from_are_paid_once(tmp_path: Path) -> None:
    rows = {"rft": {}, "dpo": {}, "rft-dpo": {"stages": ["rft", "dpo"]}}
    results = quietly(small(rows, training__steps=1), tmp_path / "out")
    rft, dpo, both = (cell["costs"] for cell in results["cells"])
    sampled = results["buffer"]["sampled_tokens"]
    assert both["sampled_tokens"] == rft["sampled_tokens"] == dpo["sampled_tokens"] == sampled > 0
    assert max(rft["flops"], dpo["flops"]) < both["flops"] < rft["flops"] + dpo["flops"]
    assert both["gradient_tokens"] == rft["gradient_tokens"] + dpo["gradient_tokens"]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_comparison_that_was_stopped_in_a_stage_resumes_there(
    tmp_path: Path, stopping: Callable[..., list[int]]
) -> None:
    """Killed in one that several cells continue from, interrupted in the last of a cell, whose rate is tuned."""
    rows = {
        "sft": {"training": {"steps": 3}},
        "dpo": {"training": {"steps": 3}},
        "sft-dpo": {"stages": ["sft", "dpo"], "learning_rates": [1e-4, 1e-3]},
    }
    experiment = small(rows, training__checkpoint_seconds=0)
    whole = quietly(experiment, tmp_path / "whole")
    stopping(2, kill=True)
    assert forked(lambda: quietly(experiment, tmp_path / "out")).status == -signal.SIGKILL
    second = stopping(1 + 3 + 2)
    with pytest.raises(KeyboardInterrupt):
        quietly(experiment, tmp_path / "out")
    last = stopping(99)
    found = quietly(experiment, tmp_path / "out")
    assert [second, last] == [[3, 1, 2, 3, 1, 2], [3, 1, 2, 3]], "sft once, dpo, and sft-dpo at two rates"
    assert numbers(found) == numbers(whole) and set(found["learning_rates"]) == {"sft-dpo"}
    assert outcomes(tmp_path / "out").equals(outcomes(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_stages_that_several_rows_have_are_trained_once(tmp_path: Path, stopping: Callable[..., list[int]]) -> None:
    """Those of a row that ends where another goes on, too; each has the results that it has alone."""
    done = stopping(99)
    results = quietly(small(STAGED), tmp_path / "out")
    assert done == [1, 2, 1, 1, 1, 1], "sft and sft-dpo, then dpo, grpo, and grpo after both"
    cells = {cell["algorithm"]: cell for cell in numbers(results)["cells"]}
    for row in ("sft", "sft-dpo"):
        needed = {name: STAGED[name] for name in dict.fromkeys((*STAGED[row].get("stages", ()), row))}
        own = numbers(quietly(small(needed), tmp_path / row))["cells"][-1]
        assert own == cells[row], row


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_cells_whose_first_stage_failed_have_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = one_cell.run_first

    def broken(experiment: Experiment, first: FirstStages, *rest: Any) -> Any:
        if first.names == ("sft", "dpo"):
            raise OSError("no space")
        return run(experiment, first, *rest)

    monkeypatch.setattr(one_cell, "run_first", broken)
    results = quietly(small({**STAGED, "sft-grpo": {"stages": ["sft", "grpo"]}}), tmp_path / "out")
    told = {one["algorithm"]: one["error"] for one in results["failed"]}
    assert told.keys() == {"sft-dpo", "sft-dpo-grpo"}
    assert {text.partition(" (")[0] for text in told.values()} == {"stage sft+dpo-seed0: OSError: no space"}
    assert [cell["algorithm"] for cell in results["cells"]] == ["sft", "dpo", "grpo", "sft-grpo"]
    monkeypatch.setattr(one_cell, "run_first", run)
    again = quietly(small({**STAGED, "sft-grpo": {"stages": ["sft", "grpo"]}}), tmp_path / "out")
    assert again["failed"] == [] and len(again["cells"]) == 6


def test_weights_are_kept_as_long_as_a_cell_goes_on_from_them(tmp_path: Path) -> None:
    experiment = small(STAGED, seeds=[0, 1])
    folders = {(one.names, one.seed): weights_of(one, tmp_path) for one in first_stages(experiment)}
    assert len(folders) == 4 == len(set(folders.values()))
    for folder in folders.values():
        folder.mkdir(parents=True)
    done = dict[str, Any]()

    def kept(*rows: str) -> set[tuple[tuple[str, ...], int]]:
        done.update({f"{row}-lr{experiment.learning_rates_of(row)[0]:g}-seed0": {} for row in rows})
        runner._forget(experiment, done, tmp_path)
        return {key for key, folder in folders.items() if folder.exists()}

    assert kept("dpo", "sft-dpo") == folders.keys(), "sft reports its stage, and sft-dpo-grpo continues from both"
    assert kept("sft") == folders.keys()
    assert kept("sft-dpo-grpo") == {(("sft",), 1), (("sft", "dpo"), 1)}, "another seed's"


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_stages_have_the_steps_that_their_epochs_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the progress that rewards are told too: later stages do not count before they begin."""
    told, real = list[tuple[int, int]](), resolve.reward_of

    def noted(experiment: Experiment, step: int = 0, most: int = 0, **more: Any) -> Any:
        told.append((step, most))
        return real(experiment, step, most, **more)

    monkeypatch.setattr("rlzoo.comparison.one_cell.reward_of", noted)
    rows = {"sft": {}, "rft": {}, "sft-rft": {"stages": ["sft", "rft"]}}
    results = quietly(small(rows, training={"epochs": 2, "batch_size": 4}), tmp_path / "out")
    steps = {cell["algorithm"]: len(cell["training"]) for cell in results["cells"]}
    assert steps["sft"] == 3, "six demonstrations, twice"
    assert steps["sft-rft"] == steps["sft"] + steps["rft"]
    assert {pair for pair in told if pair[1]} == {(n, n) for n in steps.values()}, "each evaluation is at an end"


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_each_stage_has_its_own_budget(tmp_path: Path) -> None:
    rows = {
        "sft": {"training": {"budget": {"gradient_tokens": 1}, "steps": 4}},
        "dpo": {"training": {"budget": {"gradient_tokens": 400}, "steps": 9}},
        "sft-dpo": {"stages": ["sft", "dpo"]},
    }
    results = quietly(small(rows), tmp_path / "out")
    sft, dpo, both = results["cells"]
    assert len(sft["training"]) == 1 and 1 < len(dpo["training"]) < 9
    assert [row["stage"] for row in both["training"]] == [1] + [2] * len(dpo["training"])
    assert [cell["ended"] for cell in (sft, dpo, both)] == ["budget"] * 3
    assert both["training"][-1]["learning_rate"] == dpo["training"][-1]["learning_rate"], "along its own budget"


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_each_stage_ends_when_its_own_curve_is_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A curve that rises to step 4, and after it to step 12; with two flat points each has four more steps."""
    evaluation = {"samples": 2, "k": 1, "max_new_tokens": 4, "curve_points": 8, "curve_problems": 2, "until_flat": 2}
    rows = {"sft": {}, "dft": {}, "sft-dft": {"stages": ["sft", "dft"]}}

    def point(policy: Any, experiment: Any, step: int, *_: Any, **__: Any) -> dict[str, Any]:
        rises = min(step, 4 if step <= 8 else 12) / 16
        return {"step": step, "metrics": {}, "validation": {"avg_at_k": rises, "by_problem": [rises] * 2}}

    monkeypatch.setattr(one_cell, "curve_point", point)
    results = quietly(small(rows, evaluation=evaluation, training__steps=16), tmp_path / "out")
    found = {
        cell["algorithm"]: ([row.get("stage") for row in cell["training"]], cell["ended"]) for cell in results["cells"]
    }
    assert found["sft"] == ([None] * 8, "flat") and found["sft-dft"] == ([1] * 8 + [2] * 8, "flat")


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            {"a-b": {"stages": ["sft", "dqo"]}},
            "stages of 'a-b': unknown row 'dqo': did you mean 'dpo'? known: dpo, sft",
        ),
        ({"a-b": {"stages": ["sft"]}}, "stages of 'a-b': a single stage is the row 'sft' itself"),
        ({"a-b": {"stages": ["sft", "dpo"], "objective": "sft"}}, "'a-b' takes objective from the rows"),
        ({"a-b": {"stages": ["sft", "dpo"], "options": {"beta": 1}}}, "'a-b' takes options from the rows"),
        ({"a-b": {"stages": ["sft", "dpo"], "mode": "online"}}, "'a-b' takes mode from the rows"),
        ({"a-b": {"stages": ["sft", "dpo"], "learns_from": "correct"}}, "'a-b' takes learns_from from the rows"),
        ({"a-b": {"stages": ["sft", "dpo"], "training": {"steps": 1}}}, "'a-b' takes training from the rows"),
        (
            {"a-b": {"stages": ["sft", "dpo"]}, "b-c": {"stages": ["a-b", "dpo"]}},
            "stages of 'b-c': 'a-b' has stages of its own: name those",
        ),
        (
            {"tuned": {"objective": "sft", "learning_rates": [1e-4, 1e-3]}, "a-b": {"stages": ["tuned", "dpo"]}},
            "stages of 'a-b': 'tuned' has 2 learning rates, and only the last stage may be tuned",
        ),
    ],
    ids=str,
)
def test_stages_that_cannot_be(rows: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        small({"sft": {}, "dpo": {}, **rows})
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_weights_in_4_bits_cannot_pass_from_stage_to_stage() -> None:
    experiment = small({"sft": {}, "dpo": {}, "a-b": {"stages": ["sft", "dpo"]}}, training__lora={"load_in_4bit": True})
    with pytest.raises(UserError, match=r"^algorithms\.a-b: lora\.load_in_4bit would round the weights between stages"):
        resolve.check(experiment)


def test_the_rates_of_a_row_with_stages_are_those_of_its_last() -> None:
    rows = {"sft": {}, "dpo": {"learning_rates": [1e-5, 2e-5]}, "a-b": {"stages": ["sft", "dpo"]}}
    own = {**rows, "a-b": {"stages": ["sft", "dpo"], "learning_rates": [3e-5]}}
    assert small(rows).learning_rates_of("a-b") == (1e-5, 2e-5) and small(own).learning_rates_of("a-b") == (3e-5,)
    smaller = small(own).with_smaller_batches(2)
    assert smaller.training_of("a-b").token_budget == "auto/2" and smaller.algorithms["a-b"].training == {}


def test_a_plan_counts_all_stages() -> None:
    found = forecast(small(STAGED), load_shape("embedded"), 5.0)
    rows = {row.algorithm: row for row in found.rows}
    sft, dpo, grpo, both = (rows[name] for name in ("sft", "dpo", "grpo", "sft-dpo-grpo"))
    assert both.gradient_tokens == sum(row.gradient_tokens for row in (sft, dpo, grpo))
    assert both.sampled_tokens == grpo.sampled_tokens > 0 and both.cells == 1 and both.steps == 4
    references = both.flops - sum(row.flops for row in (sft, dpo, grpo))
    assert references > 0, "those of dpo are computed anew for its policy"
    second = rows["sft-dpo"].flops - sft.flops
    own, repeated = sum(row.flops for row in found.rows), 2 * sft.flops + second
    assert found.flops == pytest.approx(own + found.shared_flops - repeated), (
        "sft of three rows, and dpo after it of two"
    )
    whole = sft.evaluated_tokens
    assert both.evaluated_tokens == pytest.approx(whole + 2 * 2 * 2 * 5.0), (
        "two more curve points, 2 problems, 2 samples"
    )


@pytest.mark.slow
def test_an_analysis_leaves_rows_with_stages_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variance, "pool", inline_pool)
    rows = {"sft": {}, "dft": {}, "sft-dft": {"stages": ["sft", "dft"]}}
    found = run_variance(small(rows), tmp_path / "out", VarianceSettings(rows=4, draws=0, every=0))
    assert set(found["objectives"]) == {"sft", "dft"} and found["failed"] == {}
    assert found["skipped"]["sft-dft"].startswith("it has stages")
    assert "sft-dft" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_the_report_says_whether_later_stages_change_the_ranking(tmp_path: Path) -> None:
    skill = {"base": 0.2, "plain": 0.3, "weighted": 0.5, "plain-rl": 0.7, "weighted-rl": 0.55, "rl": 0.4}
    results = synthetic_run(tmp_path, skill)
    stages = {f"{name}-rl": {"stages": [name, "rl"]} for name in ("plain", "weighted")}
    without = [block for block in contents(read_run(tmp_path), None) if isinstance(block, Heading)]
    assert "Before and after" not in [block.text for block in without]
    results["config"] = {"algorithms": {**{name: {} for name in skill}, **stages}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    run = read_run(tmp_path)
    blocks = list(before_and_after(run, "plain"))
    assert [block.text for block in blocks if isinstance(block, Heading)] == [
        "Before and after", "rl: sums", "rl: longer sums", "rl: mean over benchmarks",
    ]  # fmt: skip
    ranking = next(block.text for block in blocks if isinstance(block, Paragraph) and "ranking is" in block.text)
    assert ranking == "By avg@4 on sums, the ranking is weighted > plain before and plain > weighted after."
    table = next(block for block in blocks if isinstance(block, Table))
    lines = [[entry.text for entry in row] for row in table.rows]
    assert [(line[0], line[1], line[5], line[6]) for line in lines[:2]] == [
        ("avg@4", "plain", "2", "1"), ("avg@4", "weighted", "1", "2"),
    ]  # fmt: skip
    differences = {
        (row["metric"], row["benchmark"]): row
        for row in compare_to(run.outcomes, "plain", run.results.k)
        if row["algorithm"] == "plain-rl"
    }
    expected = differences["avg_at_k", "sums"]
    assert lines[0][4].startswith(f"{points(expected['difference'])} [{points(expected['ci_low'])}, ")
    for row, place in (("plain", 2), ("plain-rl", 3)):
        summary = run.results.row(row, "sums", "avg_at_k")
        assert summary is not None and lines[0][place] == percent(summary.mean)
