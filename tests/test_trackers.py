"""What experiment trackers receive. Fakes record wandb and trackio, which is also tested itself where installed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from comparisons import small
from rich.console import Console

from rlzoo import compare, get_objective, load_policy
from rlzoo.buffers import OfflineBuffer, from_trl
from rlzoo.cli import main
from rlzoo.config import Training
from rlzoo.errors import UserError
from rlzoo.training import Trainer, train

ROWS = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": "4"}]
ALL = ("tensorboard", "trackio", "wandb")


@dataclass
class Recorded:
    """A run of a tracker, as it is kept."""

    about: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    closed_at: int | None = None
    """The step up to which nothing more is taken, once the run has ended."""
    open: bool = True

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Like wandb's: a run that goes on ignores steps that it has."""
        assert self.open
        if self.closed_at is None or step > self.closed_at:
            self.steps.setdefault(step, {}).update(values)

    def finish(self) -> None:
        self.closed_at, self.open = max(self.steps, default=None), False


@dataclass
class Recorder:
    """All runs of a tracker, by what it finds them again by."""

    key: str
    runs: dict[str, Recorded] = field(default_factory=dict)

    def module(self, name: str) -> ModuleType:
        made: Any = ModuleType(name)
        made.__spec__ = ModuleSpec(name, None)

        def init(project: str, **about: Any) -> Recorded:
            assert project == "rlzoo" and about["resume"] == "allow"
            run = self.runs.setdefault(about[self.key], Recorded(about))
            run.open = True
            if "config" in about:  # trackio's, which replaces what it had
                run.config = dict(about["config"])
            made.config = Config(run)
            return run

        made.init = init
        return made  # type: ignore[no-any-return]

    def named(self, name: str) -> Recorded:
        (found,) = (run for run in self.runs.values() if run.about["name"].split()[0] == name)
        assert not found.open
        return found


@dataclass
class Config:
    run: Recorded

    def update(self, values: Mapping[str, Any], allow_val_change: bool) -> None:
        assert self.run.config in ({}, values), "it is stored once"
        self.run.config.update(values)


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    found = {"wandb": Recorder("id"), "trackio": Recorder("name")}
    for name, recorder in found.items():
        monkeypatch.setitem(sys.modules, name, recorder.module(name))
    there = [*tracking._available_trackers, LoggerType.WANDB, LoggerType.TRACKIO]
    monkeypatch.setattr(tracking, "_available_trackers", there)
    return found


def events(folder: Path) -> dict[int, dict[str, float]]:
    """The scalars in tensorboard's files, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, dict[str, float]] = {}
    read = EventAccumulator(str(folder / "rlzoo"))
    read.Reload()
    for name in read.Tags()["scalars"]:
        for event in read.Scalars(name):
            found.setdefault(event.step, {})[name] = event.value
    return found


@pytest.mark.slow
def test_every_metric_of_training_reaches_every_tracker(tmp_path: Path, recorders: dict[str, Recorder]) -> None:
    table, out = tmp_path / "sums.jsonl", tmp_path / "my-dft"
    table.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = ["--buffer", str(table), "--steps", "2", "--batch-size", "2", "--out", str(out)]
    assert main(["train", "dft", *options, "--set", f"training.trackers=[{','.join(ALL)}]"]) == 0
    summary = json.loads((out / "training.json").read_text())
    told = {name: recorder.named("my-dft").steps for name, recorder in recorders.items()}
    told["tensorboard"] = events(out / "logs" / "my-dft")
    for name, steps in told.items():
        assert set(steps) == {1, 2}, name
        for row in summary["steps"]:
            metrics = {key: value for key, value in row.items() if key != "step"}
            received = {key: value for key, value in steps[row["step"]].items() if not key.startswith("costs/")}
            assert received == pytest.approx(metrics, rel=1e-6), name
        costs = {key.removeprefix("costs/"): v for key, v in steps[2].items() if key.startswith("costs/")}
        assert costs == pytest.approx(summary["costs"], rel=1e-6), name
        assert steps[1]["costs/flops"] < steps[2]["costs/flops"]
    config = recorders["wandb"].named("my-dft").config
    assert config["objective"] == "dft" and config["model"] == "embedded" and config["learning_rate"] == 5e-5
    assert config["options.truncated"] == "keep"
    assert recorders["wandb"].named("my-dft").about["group"] == "my-dft"


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_every_result_of_a_comparison_reaches_the_trackers(tmp_path: Path, recorders: dict[str, Recorder]) -> None:
    algorithms: dict[str, Any] = {"sft": {"learning_rates": [1e-3, 1e-2]}, "dft": {}}
    experiment = small(algorithms, training__trackers=["trackio", "wandb"])
    results = compare(experiment, tmp_path / "study", console=Console(quiet=True))
    for recorder in recorders.values():
        for cell in results["cells"]:
            run = recorder.named(f"{cell['algorithm']}-lr{cell['learning_rate']:g}-seed0")
            assert run.about["group"] == "study"
            assert run.config["objective"] == cell["algorithm"] and run.config["batch_size"] == 8
            assert run.steps[1]["loss"] == cell["training"][0]["loss"] and "loss" in run.steps[2]
            received = {key: value for one in run.steps.values() for key, value in one.items()}
            assert received["curve/facts/avg_at_k"] == cell["curve"][-1]["metrics"]["facts"]["avg_at_k"]
            for metric, value in cell["metrics"]["facts"].items():
                assert received[f"evaluation/facts/{metric}"] == value
            assert received["costs/gradient_tokens"] == cell["costs"]["gradient_tokens"]
        for rate, validation in results["learning_rates"]["sft"].items():
            run = recorder.named(f"sft-lr{rate}-seed0")
            assert validation in [one.get("validation/avg_at_k") for one in run.steps.values()]
        base = recorder.named("base").steps
        assert base[0]["evaluation/facts/avg_at_k"] == results["base"]["facts"]["avg_at_k"]


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_what_trackio_itself_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="what trackio keeps is read with trackio 0.43")
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage

    def kept(logs: Path) -> tuple[dict[int, dict[str, float]], dict[str, Any]]:
        """The metrics by step, and the configuration, of the run of a training."""
        name = f"{logs.name} {json.loads((logs / 'tracked-as.json').read_text())['id']}"
        (run,) = (run for run in trackio.Api().runs("rlzoo") if run.name == name)
        steps: dict[int, dict[str, float]] = {}
        for row in storage.get_logs("rlzoo", name):
            steps.setdefault(row["step"], {}).update({k: v for k, v in row.items() if isinstance(v, float | int)})
        return steps, run.config

    table, out = tmp_path / "sums.jsonl", tmp_path / "my-dft"
    table.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = ["--buffer", str(table), "--steps", "3", "--batch-size", "2", "--out", str(out)]
    assert main(["train", "dft", *options, "--set", "training.trackers=[trackio]"]) == 0
    assert "Trackio" not in capsys.readouterr().out
    steps, config = kept(out / "logs" / "my-dft")
    assert set(steps) == {1, 2, 3}
    for row in json.loads((out / "training.json").read_text())["steps"]:
        assert {key: steps[row["step"]][key] for key in row} == pytest.approx(row)
    assert config["objective"] == "dft" and config["_Group"] == "my-dft"

    experiment = small({"sft": {}}, training__trackers=["trackio"])
    results = compare(experiment, tmp_path / "study", console=Console(quiet=True))
    (cell,) = results["cells"]
    (logs,) = (tmp_path / "study" / "logs").glob("sft-*")
    steps, config = kept(logs)
    assert steps[1]["loss"] == pytest.approx(cell["training"][0]["loss"])
    found = {key: value for one in steps.values() for key, value in one.items()}
    for metric, value in cell["metrics"]["facts"].items():
        assert found[f"evaluation/facts/{metric}"] == pytest.approx(value)
    assert config["objective"] == "sft" and config["batch_size"] == 8, "results are a second part of the run"


@pytest.mark.slow
def test_a_run_that_resumes_goes_on_in_its_tracked_run(tmp_path: Path, recorders: dict[str, Recorder]) -> None:
    buffer = from_trl(ROWS, load_policy("embedded").tokenizer)
    settings = Training(steps=3, batch_size=2, checkpoint_seconds=0, trackers=("trackio", "wandb"))

    def run(folder: Path, stops_at: int | None = None) -> None:
        def stop(trainer: Trainer, step: int) -> None:
            trainer.log({"extra": float(step)})
            if step == stops_at:
                raise KeyboardInterrupt

        sft, checkpoints = get_objective("sft"), tmp_path / f"{folder.name} checkpoints"
        train(load_policy("embedded"), sft, buffer, settings, 0, [stop], folder, checkpoints)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "one", stops_at=2)
    run(tmp_path / "one")
    run(tmp_path / "two")
    for recorder in recorders.values():
        assert len(recorder.runs) == 2
        for name in ("one", "two"):
            steps = recorder.named(name).steps
            assert [steps[step]["extra"] for step in sorted(steps)] == [1.0, 2.0, 3.0]
            assert all(math.isfinite(one["loss"]) for one in steps.values())


def test_a_tracker_that_writes_files_needs_a_folder() -> None:
    policy, settings = load_policy("embedded"), Training(steps=1, batch_size=2, trackers=("tensorboard",))
    buffer: OfflineBuffer = from_trl(ROWS, policy.tokenizer)
    with pytest.raises(UserError, match="give the training a folder"):
        train(policy, get_objective("sft"), buffer, settings)
