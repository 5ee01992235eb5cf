"""Experiment files and what is laid over them: dotted keys, nearest names, per-algorithm settings, round trips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlzoo.comparison.plan import Cell, cells, chosen_cells, lost_cells
from rlzoo.config import Experiment, Training, list_experiments, load_experiment, read_yaml, validated
from rlzoo.errors import UserError


def refused(changes: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        load_experiment("facts", changes)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", sorted(list_experiments()))
def test_what_ships_loads_and_describes_itself(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    assert experiment.description
    assert experiment.baseline in experiment.algorithms
    assert len(cells(experiment)) >= len(experiment.algorithms) * len(experiment.seeds)


def test_an_experiment_survives_a_round_trip(tmp_path: Path) -> None:
    first = load_experiment("arithmetic", {"algorithms.dpo.options.beta": 0.3, "evaluation.k": 2})
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump(first.model_dump(mode="json"), sort_keys=False))
    assert load_experiment(str(path)) == first
    assert list(load_experiment(str(path)).algorithms) == list(first.algorithms)  # their order is the report's


def test_a_file_without_a_name_is_called_after_itself(tmp_path: Path) -> None:
    data = load_experiment("facts").model_dump(mode="json")
    del data["name"]
    (tmp_path / "mine.yml").write_text(yaml.safe_dump(data))
    assert load_experiment(str(tmp_path / "mine.yml")).name == "mine"


def test_dotted_keys_reach_any_depth_and_leave_the_rest() -> None:
    plain = load_experiment("facts")
    changed = load_experiment(
        "facts",
        {
            "training.steps": 7,
            "algorithms.grpo.mode": "online",
            "algorithms.dpo.options.beta": 0.5,
            "algorithms.mine": {"objective": "sft"},
            "benchmarks.facts.limit": 3,
        },
    )
    assert changed.training == plain.training.model_copy(update={"steps": 7})
    assert changed.algorithms["grpo"].mode == "online"
    assert changed.algorithms["grpo"].learning_rates == plain.algorithms["grpo"].learning_rates
    assert changed.algorithms["dpo"].options == {**plain.algorithms["dpo"].options, "beta": 0.5}
    assert changed.algorithms["mine"].objective == "sft"
    assert (changed.benchmarks["facts"].limit, changed.benchmarks["unseen-facts"].limit) == (3, None)
    assert load_experiment("facts") == plain  # nothing was changed in place


def test_a_row_has_its_own_training() -> None:
    changes: dict[str, Any] = {
        "training": {"steps": 10, "learning_rate": 1e-3},
        "algorithms": {"sft": {"training": {"updates_per_batch": 2}}, "dft": {"training": {"learning_rate": 1e-2}}},
    }
    experiment = load_experiment("facts", {**changes, "baseline": "sft"})
    assert experiment.training_of("sft") == Training(steps=10, learning_rate=1e-3, updates_per_batch=2)
    assert experiment.learning_rates_of("sft") == (1e-3,)
    assert experiment.learning_rates_of("dft") == (1e-2,)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("behaviour", "current"), ("max_completion_tokens", 5), ("special_tokens", "allow"), ("turns", "all")],
)
def test_a_row_cannot_change_the_buffer_that_it_shares(setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{setting} of 'sft' would change the buffer that all rows share"):
        load_experiment("facts", {"algorithms.sft.training": {setting: value}})
    of_all = {f"training.{setting}": value, "algorithms.sft.training": {setting: value}}
    assert getattr(load_experiment("facts", of_all).training_of("sft"), setting) == value


def test_an_unknown_setting_of_a_row_names_the_nearest() -> None:
    experiment = load_experiment("facts", {"algorithms.sft.training": {"stepz": 1}})
    with pytest.raises(UserError, match=r"unknown setting in sft\.training 'stepz': did you mean 'steps'\?"):
        experiment.training_of("sft")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"modle": "x"}, "unknown setting in facts.yaml 'modle': did you mean 'model'?"),
        ({"training.stepz": 1}, "unknown setting of training in facts.yaml 'stepz': did you mean 'steps'?"),
        ({"benchmarks.facts.sorce": "x"}, "of benchmarks.facts in facts.yaml 'sorce': did you mean 'source'?"),
        ({"algorithms.sft.option": {}}, "of algorithms.sft in facts.yaml 'option': did you mean 'options'?"),
        ({"validation.splits": "x"}, "of validation in facts.yaml 'splits': did you mean 'split'?"),
        ({"training.steps": "many"}, "facts.yaml: training.steps = 'many': Input should be a valid integer"),
        ({"training.steps": 1.5}, "training.steps = 1.5: Input should be a valid integer"),
        ({"training": 3}, "facts.yaml: training = 3: "),
        ({"training.dtype": "float8"}, "training.dtype = 'float8': Input should be 'auto', "),
        ({"training.learning_rate": float("inf")}, "learning_rate = inf: Input should be a finite number"),
        ({"training.learning_rate": float("nan")}, "learning_rate = nan: Input should be "),
        ({"algorithms.sft.mode": "on"}, "algorithms.sft.mode = 'on': Input should be 'offline' or 'online'"),
        ({"algorithms": {}}, "facts.yaml: algorithms = {}: "),
        ({"seeds": []}, "facts.yaml: seeds = []: "),
        ({"seeds": [0, 1, 0]}, "facts.yaml: seeds repeat: [0, 1, 0]"),
        ({"seeds": [-1]}, "seeds.0 = -1: "),  # the base model's pseudo-seed
        ({"evaluation.k": 99}, "evaluation: k = 99 needs at least 99 samples"),
        ({"evaluation.top_p": 0}, "evaluation.top_p = 0: "),
        ({"algorithms.sft.learning_rates": [1e-4, 1e-4]}, "learning rates of 'sft' repeat: [0.0001, 0.0001]"),
        ({"algorithms.sft.learning_rates": [1, 2], "validation": None}, "needs a validation problem set"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], told: str) -> None:
    assert told in refused(changes)


def test_a_key_that_is_there_twice_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("model: embedded\ntraining:\n  steps: 4\n  batch_size: 8\n  steps: 5\n")
    with pytest.raises(UserError, match=r"twice\.yaml: line 5: not valid YAML: it has the key 'steps' more than once"):
        read_yaml(file)
    file.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n")
    assert read_yaml(file)["b"] == {"x": 3, "y": 2}, "what is laid over an anchor's keys is no repetition"


def test_a_file_extends_another_as_set_would(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(
        "extends: facts\ndescription: A base.\ntraining.steps: 7\ntwin: {training.steps: 2, seeds: [5]}\n"
    )
    own = tmp_path / "sub" / "own.yaml"
    own.write_text("extends: ../base.yaml\nalgorithms: {sft: {}}\nretention: {}\ntwin: {training.steps: 1}\n")
    plain, made = load_experiment("facts"), load_experiment(str(own))
    assert made.training == plain.training.model_copy(update={"steps": 7})
    assert list(made.algorithms) == ["sft"] and made.benchmarks == plain.benchmarks
    assert (made.name, made.description) == ("own", ""), "a description is that of one file"
    twin = load_experiment(str(own), {"training.batch_size": 3}, twin=True)
    assert (twin.name, twin.training.steps, twin.training.batch_size, twin.seeds) == ("own-twin", 1, 3, (5,))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("extends: fatcs", r"own\.yaml: extends: unknown experiment 'fatcs': did you mean 'facts'\?"),
        ("extends: missing.yaml", r"own\.yaml: extends: experiment file '.*missing\.yaml' cannot be read"),
        ("extends: own.yaml", r"own\.yaml: extends: this file extends itself through 'own\.yaml'"),
        ("extends: [facts]", r"own\.yaml: extends = \['facts'\]: give the name or the file of an experiment"),
        ("extends: facts\ntwin: 3", r"own\.yaml: twin = 3: give a mapping of settings"),
        ("extends: facts\ntraining.stepz: 3", r"own\.yaml 'stepz': did you mean 'steps'\?"),
    ],
)
def test_a_file_that_cannot_extend_another_says_why(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=told) as error:
        load_experiment(str(tmp_path / "own.yaml"))
    assert "\n" not in str(error.value)


def test_a_file_of_nearly_that_name_is_proposed(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("extends: facts")
    with pytest.raises(UserError, match=rf"cannot be read: No such .*; did you mean '{tmp_path / 'own.yaml'}'\?$"):
        load_experiment(str(tmp_path / "own.yml"))
    with pytest.raises(UserError, match=r"cannot be read: No such file or directory$"):
        load_experiment(str(tmp_path / "something-else.yaml"))


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(UserError, match=r"^here: model is missing: give it, as it has no default$"):
        validated(Experiment, {"name": "x"}, "here")


# The grid


def test_the_grid_has_every_cell_once_with_a_name_of_its_own() -> None:
    rows = {"a/b": {"objective": "sft", "learning_rates": [1e-4, 1.2e-4]}, "a_b": {"objective": "sft"}}
    changes: dict[str, Any] = {"algorithms": rows, "seeds": [4, 2], "training.learning_rate": 1e-4, "baseline": "a_b"}
    grid = cells(load_experiment("facts", changes))
    assert grid == [
        Cell(name, seed, rate) for seed in (4, 2) for name, rate in (("a/b", 1e-4), ("a/b", 1.2e-4), ("a_b", 1e-4))
    ]
    assert len({cell.id for cell in grid}) == len(grid)
    assert not any("/" in cell.id for cell in grid)


def test_the_best_rate_on_validation_is_chosen_from_what_ran() -> None:
    changes: dict[str, Any] = {
        "algorithms": {"rft": {}, "sft": {"learning_rates": [1e-4, 1e-3]}, "dft": {"learning_rates": [1e-4]}},
        "seeds": [0, 1],
        "baseline": "sft",
    }
    experiment = load_experiment("facts", changes)
    scores = {("sft", 0, 1e-4): 0.2, ("sft", 1, 1e-4): 0.4, ("sft", 0, 1e-3): 0.9, ("sft", 1, 1e-3): 0.0}
    runs: dict[str, dict[str, Any]] = {Cell(*key).id: {"validation": score} for key, score in scores.items()}
    runs[Cell("dft", 1, 1e-4).id] = {"metrics": {}}  # its other seed failed, and so did all of rft
    chosen, tried = chosen_cells(experiment, runs)
    assert chosen == [Cell("sft", 0, 1e-3), Cell("sft", 1, 1e-3), Cell("dft", 1, 1e-4)]
    assert tried == {"sft": {"0.0001": pytest.approx(0.3), "0.001": pytest.approx(0.45)}}
    assert lost_cells(experiment, runs) == [Cell("sft", 0, 1e-4), Cell("sft", 1, 1e-4)]
    del runs[Cell("sft", 0, 1e-4).id]
    assert lost_cells(experiment, runs) == [], "the other rate is ahead, and may fall behind"


def test_a_rate_that_failed_on_a_seed_cannot_be_chosen() -> None:
    changes: dict[str, Any] = {
        "algorithms": {"sft": {"learning_rates": [1e-4, 1e-3]}},
        "seeds": [0, 1],
        "baseline": "sft",
    }
    scores = {(0, 1e-4): 0.2, (1, 1e-4): 0.4, (0, 1e-3): 0.9}  # 1e-3 was lucky on the seed that it survived
    runs = {Cell("sft", *key).id: {"validation": score} for key, score in scores.items()}
    chosen, tried = chosen_cells(load_experiment("facts", changes), runs)
    assert chosen == [Cell("sft", 0, 1e-4), Cell("sft", 1, 1e-4)]
    assert tried == {"sft": {"0.0001": pytest.approx(0.3), "0.001": pytest.approx(0.9)}}
    assert lost_cells(load_experiment("facts", changes), runs) == [], "when it is tried again it may be chosen"
