"""Every setting and every option of the command line changes what it says: one that nobody tests fails here.

A setting is shown by a test of this file (`shows`), or by one of another file (`ELSEWHERE`).
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pydantic
import pytest
import torch
import yaml
from comparisons import inline_pool, small
from rich.console import Console

from rlzoo import cli
from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.problems import load_problems
from rlzoo.cli import app, settings
from rlzoo.cli.settings import TrainSettings, check_validation
from rlzoo.comparison import one_cell, resolve, runner, shared_buffer
from rlzoo.comparison.plan import cells
from rlzoo.config import (
    EvaluationSettings,
    Experiment,
    ProblemSource,
    Rollouts,
    Sampling,
    Training,
    VarianceSettings,
    load_experiment,
)
from rlzoo.config import settings as config
from rlzoo.config.validation import Strict
from rlzoo.errors import UserError
from rlzoo.objective import get_objective
from rlzoo.policy import Policy, load_policy
from rlzoo.policy.adapters import adapters
from rlzoo.policy.encoding import encode_prompt
from rlzoo.policy.loading import load_for
from rlzoo.reward import Reward, get_reward
from rlzoo.reward.isolation import Limits
from rlzoo.rollout import Sample, Sampler, TransformersSampler, VLLMSampler, VLLMServerSampler, sampler_of
from rlzoo.training import Trainer, train
from rlzoo.training.batches import BufferSource
from rlzoo.types import Trajectory
from rlzoo.variance.analyzer import analyze_variance

MakePolicy = Callable[..., Policy]
Test = TypeVar("Test", bound=Callable[..., Any])
SHOWN: dict[str, str] = {}
"""Settings that tests of this file show, by name."""
OPTIONS = "test_training_options.py"
REFUSED = "test_chat_refused.py"
STAGES = "test_stages.py"
ELSEWHERE = {
    "Rollouts.top_p": "test_rollout.py::test_first_tokens_follow_the_models_distribution",
    "Rollouts.per_seed": "test_compare.py::test_each_seed_may_have_samples_of_its_own",
    "ProblemSource.bad_rows": "test_bad_rows.py::test_problems_that_cannot_be_read_or_encoded_are_dropped",
    "ProblemSource.special_tokens": f"{REFUSED}::test_problems_that_spell_special_tokens_are_refused_or_counted",
    "TableSource.source": "test_bad_rows.py::test_compare_records_what_it_dropped_of_every_set",
    "TableSource.bad_rows": "test_bad_rows.py::test_compare_records_what_it_dropped_of_every_set",
    "Training.behaviour": "test_buffers_layouts.py::test_samples_without_behaviour_log_probs",
    "Training.special_tokens": f"{REFUSED}::test_tables_that_spell_special_tokens_are_refused_or_counted",
    "Training.turns": "test_masks.py::test_the_setting_reaches_training",
    "--curves": "test_curves.py::test_the_command",
    "--host": "test_serve.py::test_it_serves_until_it_is_interrupted",
    "--port": "test_serve.py::test_it_serves_until_it_is_interrupted",
    "--open": "test_serve.py::test_the_address_is_opened_in_a_browser_if_there_is_one",
    "--reuse": "test_compare.py::test_a_comparison_with_more_rows_or_seeds_takes_the_cells_that_another_has",
    "--public": "test_cards.py::test_a_trained_model_is_pushed",
    "--push-to-hub": "test_cards.py::test_a_trained_model_is_pushed",
    "--max-completion-tokens": "test_importing.py::test_verl",
    "--token-classes": "test_variance_classes.py::test_the_command_measures_classes_of_a_file",
    "--class-gradients": "test_variance_classes.py::test_the_command_measures_classes_of_a_file",
    "--bad-rows": "test_bad_rows.py::test_rollout_reports_and_records_what_it_dropped",
    "EvaluationSettings.k": "test_evaluation.py::test_k_is_the_number_of_samples_unless_it_is_given",
    "EvaluationSettings.metrics": "test_open_interface.py::test_a_plugins_metric_is_reported_after_kill_9",
    "ProblemSource.subset_seed": "test_problems.py::test_a_subset_is_drawn_by_its_seed_from_the_whole_table",
    "Benchmark.suite": "test_paper.py::test_suites_are_named_alone_in_a_list_or_with_changes",
    "Benchmark.reward": "test_compare.py::test_a_benchmark_may_have_a_reward_of_its_own",
    "Benchmark.max_new_tokens": "test_retention.py::test_the_bases_text_is_scored_under_every_policy",
    "Experiment.retention": "test_retention.py::test_retention_is_apart_from_benchmarks",
    "EvaluationSettings.correct_at": "test_evaluation.py::test_the_threshold_of_correctness_is_a_setting",
    "EvaluationSettings.until_flat": "test_budgets.py::test_a_cell_ends_when_its_validation_curve_is_flat",
    "Training.budget": "test_budgets.py::test_training_ends_after_the_step_that_reaches_the_budget",
    "Budget.gradient_tokens": "test_budgets.py::test_training_ends_after_the_step_that_reaches_the_budget",
    "Budget.tokens": "test_budgets.py::test_training_ends_after_the_step_that_reaches_the_budget",
    "Budget.flops": "test_budgets.py::test_training_ends_after_the_step_that_reaches_the_budget",
    "Training.learning_rate": "test_training.py::test_the_schedule_warms_up_and_follows_a_cosine",
    "Training.warmup_ratio": "test_training.py::test_the_schedule_warms_up_and_follows_a_cosine",
    "Training.max_gradient_norm": "test_training_runs.py::test_weight_decay_and_clipping_reach_the_optimizer",
    "Training.importance_cap": f"{OPTIONS}::test_truncated_importance_weights_what_another_engine_sampled",
    "Training.lora": f"{OPTIONS}::test_lora_trains_the_adapters_alone",
    "Lora.load_in_4bit": "test_qlora.py::test_weights_take_less_memory_and_give_nearly_the_same_log_probs",
    "Training.compile": "test_compiled.py::test_gradients_are_those_of_plain_layers_and_no_shape_compiles_anew",
    "Training.packing": "test_packing.py::test_objectives_of_every_kind_train_the_same_weights",
    "Training.gradient_checkpointing": f"{OPTIONS}::test_recomputed_activations_change_nothing_but_the_work",
    "Training.device": "test_defaults.py::test_the_device_that_is_meant",
    "Training.deterministic": "test_defaults.py::test_determinism_is_for_gpus",
    "Training.on_nonfinite": "test_checkpoints.py::test_a_step_that_is_not_finite_can_be_skipped_and_is_counted",
    "Training.trackers": f"{OPTIONS}::test_a_tracker_gets_every_step",
    "Algorithm.learning_rates": "test_compare.py::test_the_learning_rate_is_chosen_on_validation",
    "Algorithm.mode": "test_compare.py::test_online_samples_the_policy_in_training",
    "Algorithm.learns_from": "test_compare.py::test_a_row_may_learn_from_the_bases_own_correct_samples",
    "Algorithm.online_counterpart": "test_report_training.py::test_rows_with_an_online_counterpart_say_where_it_is",
    "Algorithm.training": "test_config.py::test_a_row_has_its_own_training",
    "Experiment.model": "test_compare.py::test_a_trained_folder_is_a_base_like_any_other",
    "Algorithm.stages": f"{STAGES}::test_each_stage_starts_from_the_one_before",
    "Experiment.warm_up": f"{STAGES}::test_every_cell_starts_from_the_models_warm_up",
    **dict.fromkeys(
        [f"WarmUp.{name}" for name in ("objective", "options", "train", "training", "seed")],
        f"{STAGES}::test_what_a_warm_up_does_is_a_setting",
    ),
    "Experiment.validation": "test_compare.py::test_the_learning_rate_is_chosen_on_validation",
    "Experiment.baseline": "test_compare.py::test_the_report_can_be_written_again",
    **dict.fromkeys(
        (f"Reported.{field}" for field in ("source", "model", "metric", "results", "notes")),
        "test_report.py::test_published_results_stand_beside_the_measured_ones",
    ),
    "Experiment.reported": "test_report.py::test_published_results_stand_beside_the_measured_ones",
    "VarianceSettings.rows": "test_variance.py::test_an_experiment_is_cut_to_what_the_rows_are_worth",
    "VarianceSettings.draws": "test_variance.py::test_exact_and_sampled_variances_agree",
    "VarianceSettings.every": "test_variance.py::test_the_command_with_an_objective_from_a_file",
    "VarianceSettings.probe_rows": "test_variance.py::test_the_probe_measures_every_k_steps_and_changes_nothing",
    "VarianceSettings.token_classes": "test_variance_classes.py::test_the_command_measures_classes_of_a_file",
    "VarianceSettings.class_gradients": "test_variance_classes.py::test_the_command_measures_classes_of_a_file",
    "VarianceSettings.seed": "test_variance.py::test_the_same_seed_gives_the_same_report",
    "--trust-remote-code": "test_cli.py::test_the_code_of_a_model_is_run_by_its_flag_alone",
    "--option": "test_cli.py::test_rollout_train_evaluate",
    "--out": "test_cli.py::test_rollout_train_evaluate",
    "--json": "test_cli.py::test_list_as_json",
    "--version": "test_cli.py::test_version",
    "--show-completion": "test_cli.py::test_completion_is_installed_for_the_shell",
    "--install-completion": "test_cli.py::test_completion_is_installed_for_the_shell",
    "--markdown": "test_catalogue.py::test_the_page_is_in_step_with_the_classes",
    "--folder": "test_scaffold.py",
    "--quick": "test_doctor.py::test_a_missing_package_and_an_old_one",
    "--baseline": "test_compare.py::test_the_report_can_be_written_again",
    "--executor": "test_ray.py::test_a_node_that_dies_half_way_costs_nothing_but_time",
    "--address": "test_ray.py::test_there_is_no_cluster",
    "--format": "test_studies.py::test_a_run_becomes_a_study",
    "--to": "test_studies.py::test_a_run_becomes_a_study",
    "--gpu": "test_planning.py::test_a_model_of_any_size_is_planned_without_its_weights",
    "--pilot": "test_planning.py::test_a_pilot_tells_what_more_seeds_would_detect",
    "--dry-run": "test_paper.py::test_every_experiment_resolves_without_weights_or_a_connection",
    "--twin": "test_paper.py::test_the_command_line_runs_a_twin",
    "--buffer": "test_variance.py::test_the_command_with_an_objective_from_a_file",
    "--workers": "test_compare.py::test_processes_change_no_number",
    "--rows": "test_variance.py::test_the_command_with_an_objective_from_a_file",
    "--draws": "test_variance.py::test_the_command_with_an_objective_from_a_file",
    "--every": "test_variance.py::test_the_command_with_an_objective_from_a_file",
    "--probe-rows": "test_variance.py::test_the_command_with_an_objective_from_a_file",
}
MODELS: Sequence[type[pydantic.BaseModel]] = [
    *(kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, Strict)),
    TrainSettings,
    VarianceSettings,
]
ABSTRACT = {"Strict", "Sampling"}
"""Whose settings count as those of the classes that inherit them."""


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``main`` changes sys.path and a signal handler, which is right for a command and not for a test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def shows(*settings: str) -> Callable[[Test], Test]:
    """Decorator: this test shows that these settings have an effect."""

    def mark(test: Test) -> Test:
        SHOWN.update(dict.fromkeys(settings, test.__name__))
        return test

    return mark


def options() -> dict[str, list[str]]:
    """The options of each command, and under "" those of ``rlzoo`` itself."""
    group = app.group()
    return {
        name: [parameter.opts[0] for parameter in command.params if parameter.param_type_name == "option"]
        for name, command in {"": group, **group.commands}.items()
    }


def read_from(function: str, *arguments: str) -> Any:
    """What a function of `rlzoo.cli.settings` makes of a command line, whose command goes no further."""

    class FoundError(Exception):
        pass

    real = getattr(settings, function)

    def found(*given: Any, **more: Any) -> Any:
        raise FoundError(real(*given, **more))

    run = app.parsed(arguments)
    assert run is not None
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FoundError) as caught:
        patch.setattr(settings, function, found)
        run()
    return caught.value.args[0]


def experiment_of(*arguments: str) -> Experiment:
    """The experiment that a command line asks for."""
    found: Experiment = read_from("experiment_of", *arguments)
    return found


def test_every_setting_and_option_has_a_test() -> None:
    there = {
        f"{model.__name__}.{field}"
        for model in MODELS
        if model.__name__ not in ABSTRACT
        for field in model.model_fields
        if field in vars(model)["__annotations__"] or any(base.__name__ in ABSTRACT for base in model.__bases__)
    }
    there |= {option for some in options().values() for option in some}
    tested = set(SHOWN) | set(ELSEWHERE)
    assert there - tested == set(), "settings without a test of their effect: add one here, or name it in ELSEWHERE"
    assert tested - there == set(), "tests of settings that are gone"


@pytest.mark.parametrize("place", sorted(set(ELSEWHERE.values())))
def test_the_tests_elsewhere_are_there(place: str) -> None:
    file, _, name = place.partition("::")
    assert f"def {name}" in (Path(__file__).parent / file).read_text(encoding="utf-8")


# Problem sets


@pytest.fixture
def table(tmp_path: Path) -> str:
    rows = [
        {"q": f"{i}+{i}=?", "prompt": f"{i}", "gold": str(2 * i), "work": f"#### {2 * i}", "good": i} for i in (1, 2)
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.mark.slow
@shows(
    "ProblemSource.source", "ProblemSource.prompt", "ProblemSource.solution", "ProblemSource.quality",
    "ProblemSource.columns", "ProblemSource.chat", "ProblemSource.system", "ProblemSource.limit",
)  # fmt: skip
@pytest.mark.parametrize("built_in", [False, True])
def test_a_problem_source(built_in: bool, table: str) -> None:
    """A built-in task's row has the columns prompt, answer and terms."""
    names = (
        {"q": "prompt", "gold": "answer", "work": "answer", "good": "terms"}
        if built_in
        else {n: n for n in ("q", "gold", "work", "good")}
    )
    source = {"source": "world:arithmetic/train" if built_in else table}
    plain = load_problems(ProblemSource(**source))

    def one(**changes: Any) -> Any:
        return load_problems(ProblemSource(**source, **changes))[0]

    assert len(plain) > 1 and len(load_problems(ProblemSource(**source, limit=1))) == 1
    assert one(prompt=f"Say {{{names['q']}}}").prompt == f"Say {one(prompt=names['q']).prompt}"
    assert one(columns={"solution": names["gold"]}).columns["solution"] == plain[0].columns[names["gold"]]
    assert one(solution=names["work"]).solutions == (plain[0].columns[names["work"]],)
    assert one(quality=names["good"]).quality == plain[0].columns[names["good"]] and plain[0].quality is None
    turns = [{"role": "user", "content": plain[0].prompt}]
    assert one(chat=True).prompt == turns
    assert one(chat=True, system="Add.").prompt == [{"role": "system", "content": "Add."}, *turns]


@shows("ProblemSource.split")
def test_the_split_of_a_data_set_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, configuration: str | None, split: str, **_: Any) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"prompt": f"of {name}, {split}"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for split in ("train", "test[:10]"):
        (problem,) = load_problems(ProblemSource(source="someone/something", split=split))
        assert problem.prompt == f"of someone/something, {split}" and problem.id == f"{split}-0"


@pytest.mark.slow
@shows("TableSource.split", "TableSource.columns", "--split", "--column")
def test_a_table_to_train_on(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for split, answer in (("train", "1"), ("test", "12")):
        row = {"prompt": "1+1=", "answer": answer, "completion": "123"}
        (tmp_path / "shards" / f"{split}-00000-of-00001.jsonl").write_text(json.dumps(row) + "\n")

    def learned(*options: str) -> int:
        """The characters of the completion that is learned from."""
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        command = ["train", "sft", "--buffer", str(tmp_path / "shards"), "--steps", "1", "--set", "batch_size=1"]
        assert cli.main([*command, "--out", str(out), *options]) == 0
        return int(json.loads((out / "training.json").read_text())["costs"]["gradient_tokens"]) - len("1+1=") - 1

    assert learned("--split", "train") == 3
    assert learned("--split", "train", "--column", "completion=answer") == 1
    assert learned("--split", "test", "--column", "completion=answer") == 2


# Sampling

PROMPTS = [[20], [21, 22], [23]]


@pytest.fixture
def policy(make_policy: MakePolicy) -> Policy:
    return make_policy("gpt2", dtype=torch.float32)


def ids(policy: Policy, settings: Sampling, greedy: bool = False) -> list[list[list[int]]]:
    return [[one.ids for one in row] for row in TransformersSampler(policy).sample(PROMPTS, settings, 0, greedy)]


@shows(
    *(f"{kind}.{field}" for kind in ("Rollouts", "EvaluationSettings") for field in ("samples", "max_new_tokens")),
    *(f"{kind}.{field}" for kind in ("Rollouts", "EvaluationSettings") for field in ("temperature", "batch_size")),
    "EvaluationSettings.top_p",
)
@pytest.mark.parametrize("kind", [Rollouts, EvaluationSettings])
def test_sampling(kind: type[Sampling], policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = kind(samples=3, max_new_tokens=6)
    sampled, greedy = ids(policy, plain), ids(policy, plain, greedy=True)
    assert {len(row) for row in sampled} == {3} and max(len(one) for row in sampled for one in row) == 6
    assert {len(row) for row in ids(policy, kind(samples=5, max_new_tokens=6))} == {5}
    assert max(len(one) for row in ids(policy, kind(samples=3, max_new_tokens=2)) for one in row) == 2
    likeliest = [row * 3 for row in greedy]
    assert sampled != likeliest
    assert ids(policy, kind(samples=3, max_new_tokens=6, temperature=1e-4)) == likeliest
    assert ids(policy, kind(samples=3, max_new_tokens=6, top_p=1e-6)) == likeliest
    together: list[int] = []
    real = TransformersSampler._decoded

    def decoded(self: Any, prompts: Any, numbers: Any, copies: range, *rest: Any) -> Any:
        together.append(len(prompts) * len(copies))
        return real(self, prompts, numbers, copies, *rest)

    monkeypatch.setattr(TransformersSampler, "_decoded", decoded)
    for size, expected in ((256, [9]), (6, [6, 3]), (2, [2, 1] * 3)):
        together.clear()
        ids(policy, kind(samples=3, max_new_tokens=2, batch_size=size))
        assert together == expected


@shows(*(f"{kind}.{f}" for kind in ("Rollouts", "EvaluationSettings") for f in ("engine", "url", "engine_options")))
@pytest.mark.parametrize("kind", [Rollouts, EvaluationSettings])
def test_the_engine_that_samples(kind: type[Sampling], policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: Sampler, policy: Policy, **options: Any) -> None:
        built.append((type(self), options))

    built: list[tuple[type[Sampler], dict[str, Any]]] = []
    for server_or_not in (VLLMSampler, VLLMServerSampler):
        monkeypatch.setattr(server_or_not, "__init__", init)
    assert isinstance(sampler_of(policy, kind()), TransformersSampler)
    sampler_of(policy, kind(engine="vllm", engine_options={"max_model_len": 99}))
    sampler_of(policy, kind(engine="vllm", url="http://host"))
    assert built == [(VLLMSampler, {"max_model_len": 99}), (VLLMServerSampler, {"url": "http://host"})]


class FakeSampler(Sampler):
    """Says "0", "1", … at once, with log-probs of its own, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, Sampling, int]] = []

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        seed: int,
        greedy: bool = False,
        progress: Callable[[int], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        self.asked.append((len(prompts), settings, seed))
        copies = 1 if greedy else settings.samples
        return [[Sample([30 + n, 2], str(n), False, [-0.5, -0.25]) for n in range(copies)] for _ in prompts]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSampler:
    """In place of every sampler."""
    sampler = FakeSampler()
    monkeypatch.setattr(one_cell, "sampler_of", lambda policy, settings: sampler)
    monkeypatch.setattr(shared_buffer, "sampler_of", lambda policy, settings: sampler)
    monkeypatch.setattr("rlzoo.evaluation.evaluation.sampler_of", lambda policy, settings: sampler)
    monkeypatch.setattr(runner, "pool", inline_pool)
    return sampler


def filled(experiment: Experiment, folder: Path) -> OfflineBuffer:
    shared_buffer.fill_buffer(experiment, folder / "buffer", folder / "state", 0, lambda share, what: None)
    return OfflineBuffer.load(folder / "buffer")


@pytest.mark.slow
@shows("Rollouts.prompts", "Rollouts.behaviour", "Experiment.train")
def test_the_rollouts_of_the_shared_buffer(fake: FakeSampler, tmp_path: Path) -> None:
    engine = {"rollouts__engine": "vllm"}
    for behaviour, prompts in (("recompute", 6), ("sampler", 2)):
        experiment = small({"grpo": {}}, rollouts__behaviour=behaviour, rollouts__prompts=prompts, **engine)
        rows = [row for row in filled(experiment, tmp_path / behaviour) if row.source == "policy"]
        assert fake.asked[-1] == (prompts, experiment.rollouts, 0) and len(rows) == 4 * prompts
        assert all((row.behaviour_logp == [-0.5, -0.25]) is (behaviour == "sampler") for row in rows)
        assert [row.prompt for row in rows[::4]] == [p.prompt for p in load_problems(experiment.train)[:prompts]]
    with pytest.raises(UserError, match=r"rollouts\.behaviour: sampler needs an engine with its own log-probs"):
        resolve.check(small({"grpo": {}}, rollouts__behaviour="sampler"))


# Training

ROWS = [
    Trajectory("", "", [5, 6, 7 + i], [20 + i, 21, 22 + i % 3, 2], str(i), source="demonstration") for i in range(8)
]  # fmt: skip


def trained(policy: Policy, callback: Callable[[Trainer, int], None] | None = None, **settings: Any) -> Any:
    some = Training.model_validate({"steps": 4, "batch_size": 4, "learning_rate": 1e-2, **settings})
    callbacks = [] if callback is None else [callback]
    return train(policy, get_objective("sft"), OfflineBuffer.from_trajectories(ROWS), some, 0, callbacks)


@pytest.mark.slow
@shows(
    "Training.steps", "Training.batch_size", "Training.mini_batches", "Training.updates_per_batch",
    "Training.token_budget",
)  # fmt: skip
def test_what_a_step_of_training_takes(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    micro: list[int] = []
    real = BufferSource.draw

    def draw(self: BufferSource) -> Any:
        rows, units = real(self)
        drawn.append(len(rows))
        return rows, units

    def run(**settings: Any) -> tuple[int, list[int], int]:
        policy = make_policy("gpt2")
        policy.register_forward_pre_hook(lambda module, rows: micro.extend([1] * len(rows)))  # none: other work
        del drawn[:], micro[:]
        return len(trained(policy, **settings).steps), list(drawn), len(micro)

    monkeypatch.setattr(BufferSource, "draw", draw)
    assert run() == (4, [4] * 4, 4)
    assert run(steps=3) == (3, [4] * 3, 3)
    assert run(batch_size=8) == (4, [8] * 4, 4)
    assert run(updates_per_batch=2) == (4, [4] * 2, 4)
    assert run(updates_per_batch=3) == (4, [4] * 2, 4), "no more than `steps`"
    assert run(mini_batches=2) == (4, [4] * 2, 4)
    assert run(mini_batches=2, updates_per_batch=2) == (4, [4], 4)
    assert run(mini_batches=9) == (4, [4], 4), "no more than there are rows"
    assert run(token_budget=14) == (4, [4] * 4, 8), "two rows of 7 tokens in a micro-batch"


@pytest.mark.slow
@shows("Training.epochs")
def test_epochs_are_passes_over_what_is_learned_from(make_policy: MakePolicy) -> None:
    policy, rows = make_policy("gpt2"), len(ROWS)
    buffer = OfflineBuffer.from_trajectories(ROWS)

    def steps(of: object = buffer, **settings: Any) -> int:
        some = Training.model_validate({"epochs": 1, "batch_size": 3, "learning_rate": 1e-2, **settings})
        return len(train(policy, get_objective("sft"), of, some).steps)  # type: ignore[arg-type]

    assert steps() == math.ceil(rows / 3)
    assert steps(epochs=2.5) == math.ceil(2.5 * rows / 3)
    assert steps(updates_per_batch=2) == 2 * math.ceil(rows / 3)
    assert steps(updates_per_batch=2, mini_batches=3) == 6 * math.ceil(rows / 3)
    assert steps(batch_size=3 * rows) == 1
    source = BufferSource(buffer, buffer.view(get_objective("sft").learns_from), 4, 0)
    assert steps(source, batch_size=3) == math.ceil(rows / 4), "a source has batches of its own size"

    class Endless:
        def draw(self) -> Any:
            return ROWS[:2], [(0,), (1,)]

    assert steps(Endless(), epochs=None, steps=2) == 2
    with pytest.raises(UserError, match=r"training\.epochs needs a source that says how many batches it has"):
        steps(Endless())


def test_steps_and_epochs_exclude_each_other_and_the_later_counts() -> None:
    with pytest.raises(UserError, match="steps and epochs both say how long to train: give one of them"):
        load_experiment("facts", {"training": {"steps": 2, "epochs": 1}})
    one = load_experiment("facts", {"training.epochs": 1, "algorithms.sft.training": {"steps": 3}})
    assert (one.training.epochs, one.training_of("dft").epochs) == (1, 1)
    assert (one.training_of("sft").epochs, one.training_of("sft").steps) == (None, 3)
    assert load_experiment("facts", one.model_dump(mode="json")) == one, "it survives being written to a file"
    for arguments in (("--steps", "5"), ("--set", "training.steps=5")):
        found = experiment_of("compare", "paper/lora", *arguments)
        assert (found.training.steps, found.training.epochs) == (5, None)
    of_all = experiment_of("compare", "paper/offline-rl", "--twin", "--steps", "5")
    assert {(row.steps, row.epochs) for row in map(of_all.training_of, of_all.algorithms)} == {(5, None)}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_epochs_of_every_row_of_a_comparison(tmp_path: Path) -> None:
    """Six problems: as many demonstrations, and online two prompts with four samples per batch of eight."""
    rows = {"sft": {"learning_rates": [1e-4, 1e-3]}, "grpo": {"mode": "online"}}
    plain = {"seconds": None, "memory_gb": None}
    experiment = small(rows, training={"epochs": 2, "batch_size": 8}, scoring=plain, evaluation__curve_points=2)
    found = runner.compare(experiment, tmp_path / "out", console=Console(quiet=True))
    assert {cell["algorithm"]: len(cell["training"]) for cell in found["cells"]} == {"sft": 2, "grpo": 6}
    assert {cell["algorithm"]: [point["step"] for point in cell["curve"]] for cell in found["cells"]} == {
        "sft": [1, 2], "grpo": [3, 6],
    }  # fmt: skip
    assert found["config"]["training"]["epochs"] == 2 and "steps" not in found["config"]["training"]


@shows("Training.betas", "Training.weight_decay")
@pytest.mark.parametrize(
    "changes",
    [{}, {"betas": (0.5, 0.6)}, {"weight_decay": 0.3}, {"learning_rate": 1e-3}],
    ids=str,
)
def test_the_optimizer_is_adamw_with_its_settings(changes: dict[str, Any], make_policy: MakePolicy) -> None:
    """The same gradients, given to PyTorch's AdamW with the schedule by hand, end in the same weights."""
    policy = make_policy("gpt2")
    copies = [copy.deepcopy(p) for p in policy.parameters()]
    gradients: list[list[torch.Tensor]] = []

    def keep(trainer: Trainer, step: int) -> None:
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters()])

    trained(policy, keep, warmup_ratio=0.0, **changes)
    settings = Training.model_validate({"learning_rate": 1e-2, **changes})
    by_hand = torch.optim.AdamW(copies, betas=settings.betas, weight_decay=settings.weight_decay)
    for step, gradient_of in enumerate(gradients):
        for group in by_hand.param_groups:
            group["lr"] = settings.learning_rate * (1 + math.cos(math.pi * step / 4)) / 2
        for parameter, gradient in zip(copies, gradient_of, strict=True):
            parameter.grad = gradient
        by_hand.step()
    for found, expected in zip(policy.parameters(), copies, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@shows("Training.dtype")
def test_the_type_of_the_weights() -> None:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)):
        assert {p.dtype for p in load_policy("embedded", name).parameters()} == {dtype}
    mixed = load_policy("embedded", "bfloat16-mixed")
    assert {p.dtype for p in mixed.parameters()} == {torch.float32} and mixed.compute == torch.bfloat16
    for packing in ("packed", "padded"):
        settings = Training(dtype="bfloat16", device="cpu", packing=packing)
        loaded = load_for("embedded", settings)
        assert loaded.model.dtype == torch.bfloat16 and loaded.packs == (packing == "packed")


@shows("Training.checkpoint_seconds")
def test_when_checkpoints_are_written(make_policy: MakePolicy, tmp_path: Path) -> None:
    buffer = OfflineBuffer.from_trajectories(ROWS)
    for seconds, expected in ((0.0, 2), (300.0, 0), (None, 0)):
        settings, folder = Training(steps=2, batch_size=4, checkpoint_seconds=seconds), tmp_path / str(seconds)
        train(make_policy("gpt2"), get_objective("sft"), buffer, settings, checkpoints=folder)
        assert len(list(folder.glob("step-*.safetensors"))) == expected


@pytest.mark.slow
@shows("Training.max_completion_tokens")
def test_long_demonstrations_are_cut(fake: FakeSampler, tmp_path: Path) -> None:
    lengths = {}
    for most in (2048, 2):
        experiment = small({"sft": {}}, training__max_completion_tokens=most)
        rows = list(filled(experiment, tmp_path / str(most)))
        lengths[most] = max(len(row.completion_ids) for row in rows)
        assert any(row.truncated for row in rows) is (most == 2)
    assert lengths[2048] > lengths[2] == 2


@pytest.mark.slow
@shows("Training.max_length")
def test_long_rows_are_cut_with_their_prompts(fake: FakeSampler, tmp_path: Path) -> None:
    plain = list(filled(small({"sft": {}}), tmp_path / "plain"))
    limit = max(len(row.prompt_ids) for row in plain) + 2
    saved = OfflineBuffer.from_trajectories(plain)
    saved.save(tmp_path / "saved")
    for given in ({}, {"demonstrations": str(tmp_path / "saved")}):
        cut = list(filled(small({"sft": {}}, training__max_length=limit, **given), tmp_path / f"cut-{len(given)}"))
        for row, whole in zip(cut, plain, strict=True):
            room = limit - len(row.prompt_ids)
            assert row.completion_ids == whole.completion_ids[:room]
            assert row.truncated == (len(whole.completion_ids) > room)
        assert any(row.truncated for row in cut)


@shows("Training.chat_template")
def test_a_chat_template_in_place_of_the_tokenizers() -> None:
    template = "{% for m in messages %}{{ m.role[0] + ':' + m.content + ' ' }}{% endfor %}"
    turns = [{"role": "user", "content": "1+1"}]
    assert load_for("embedded", Training()).tokenizer.chat_template is None
    policy = load_for("embedded", Training(chat_template=template))
    assert encode_prompt(policy.tokenizer, turns)[0] == "u:1+1 a:"


@shows("Lora.rank", "Lora.alpha", "Lora.target_modules")
def test_adapters_have_their_settings(make_policy: MakePolicy) -> None:
    policy = make_policy("llama", dtype=torch.float32)
    trained(policy, steps=1, lora={"rank": 3, "alpha": 6.0, "target_modules": ["q_proj"]})
    layers = adapters(policy.model)
    assert {name.rsplit(".", 1)[1] for name in layers} == {"q_proj"}
    for layer in layers.values():
        assert layer.lora_A["default"].weight.shape[0] == 3 and layer.scaling["default"] == 2.0


def test_a_cap_on_weights_of_another_engine_says_where_there_is_none(make_policy: MakePolicy) -> None:
    record = trained(make_policy("gpt2"), importance_cap=2.0)
    assert record.events == [
        "importance_cap has no effect on rows without sampler_logp, the log-probs of another engine"
    ]


# Experiments


@shows(
    "Scoring.seconds", "Scoring.memory_gb", "Scoring.on_error", "Scoring.processes", "Experiment.scoring",
    "Experiment.reward",
)  # fmt: skip
def test_how_the_reward_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def called(*arguments: Any) -> Reward:
        asked.append(arguments)
        return get_reward("exact-match")

    monkeypatch.setattr("rlzoo.comparison.resolve.isolated", called)
    data = load_experiment("facts").model_dump(mode="json")
    text = "{seconds: 7, memory_gb: null, processes: 3, on_error: null}"  # as documented
    data |= {"scoring": yaml.safe_load(text), "reward": "format"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    resolve.reward_of(load_experiment(str(tmp_path / "mine.yaml")))
    assert asked == [("format", Limits(7.0, None), "null", 3)]
    for value in ("null", "fail"):
        assert experiment_of("compare", "facts", "--set", f"scoring.on_error={value}").scoring.on_error == value
    again = load_experiment(str(tmp_path / "mine.yaml")).model_dump(mode="json")
    assert Experiment.model_validate(yaml.safe_load(yaml.safe_dump(again))).scoring.on_error == "null"


@pytest.mark.slow
@shows(
    "EvaluationSettings.curve_points", "EvaluationSettings.curve_problems", "EvaluationSettings.curve_samples",
    "Experiment.name", "Experiment.description", "Experiment.benchmarks", "Experiment.rollouts",
    "Experiment.evaluation", "Experiment.training", "Experiment.algorithms", "Experiment.seeds",
)  # fmt: skip
def test_an_experiment(fake: FakeSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evaluation = {"samples": 3, "curve_points": 2, "curve_problems": 2, "curve_samples": 5, "max_new_tokens": 9}
    benchmarks = {"a": {"source": "world:facts/test", "limit": 4}, "b": {"source": "world:facts/unseen", "limit": 3}}
    experiment = small(
        {"sft": {}, "mine": {"objective": "dft"}}, name="called-so", description="Said so.", seeds=[5],
        benchmarks=benchmarks, evaluation=evaluation, training__steps=4,
    )  # fmt: skip
    assert runner.where(experiment).name.startswith("called-so-")
    results = runner.compare(experiment, tmp_path / "out", 1, console=Console(file=io.StringIO()))
    assert results["experiment"] == "called-so" and "Said so." in (tmp_path / "out" / "report.md").read_text()
    assert [(cell["algorithm"], cell["seed"]) for cell in results["cells"]] == [("sft", 5), ("mine", 5)]
    assert [list(cell["metrics"]) for cell in results["cells"]] == [["a", "b"]] * 2
    assert [len(cell["training"]) for cell in results["cells"]] == [4, 4]
    assert [[point["step"] for point in cell["curve"]] for cell in results["cells"]] == [[2, 4]] * 2
    whole = [(size, s, seed) for size, s, seed in fake.asked if s == experiment.evaluation]
    assert whole == [(n, experiment.evaluation, seed) for seed in (0, 5, 5) for n in (4, 4, 3, 3)]
    curve = [(size, s.samples) for size, s, _ in fake.asked if s != experiment.evaluation]
    assert curve == [(2, 5)] * 2 * (1 + 2 * 2), "both benchmarks, of the base and at two points of two cells"
    without = small({"sft": {}}, evaluation={**evaluation, "curve_points": 0}, benchmarks=benchmarks)
    assert runner.compare(without, tmp_path / "none", 1, console=Console(file=io.StringIO()))["cells"][0]["curve"] == []


@shows("Experiment.demonstrations")
def test_demonstrations_of_a_table(fake: FakeSampler, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": "1+1=?", "completion": "#### 2"}))
    experiment = small({"sft": {}}, demonstrations=str(tmp_path / "mine.jsonl"))
    (row,) = filled(experiment, tmp_path)
    assert (row.prompt, row.completion) == ("1+1=?", "#### 2")


@shows("Algorithm.objective", "Algorithm.options")
def test_the_objective_of_a_row() -> None:
    experiment = small({"mine": {"objective": "grpo", "options": {"clip": 0.3}}, "grpo": {}})
    assert resolve.objective_of(experiment, "mine") == get_objective("grpo", clip=0.3)
    assert resolve.objective_of(experiment, "grpo") == get_objective("grpo")


# The command line


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {key: v for k, part in value.items() for key, v in flat(part, f"{name}.{k}" if name else k).items()}
    return {name: value}


def changed(command: str, *arguments: str, experiment: str = "facts") -> dict[str, Any]:
    """The settings that options of a command change."""
    found, plain = (experiment_of(command, experiment, *some, *_needed(command)) for some in (arguments, ()))
    before, after = flat(plain.model_dump(mode="json")), flat(found.model_dump(mode="json"))
    return {key: value for key, value in after.items() if before.get(key, "nothing") != value}


def _needed(command: str) -> list[str]:
    return ["--out", "x"] if command == "rollout" else []


TESTS = dict.fromkeys(
    ("benchmarks.facts.limit", "benchmarks.unseen-facts.limit", "retention.chain-sums.limit", "validation.limit"), 7
)
TRAINING = {"train.limit": 7, "rollouts.prompts": 7}
CHANGES: dict[tuple[str, ...], dict[str, Any]] = {
    ("--model", "other"): {"model": "other"},
    ("--reward", "format"): {"reward": "format"},
    ("--data", "mine.jsonl"): {"train.source": "mine.jsonl"},
    ("--test-data", "t.csv"): {"benchmarks.facts.source": "t.csv"},
    ("--limit", "7"): TRAINING | TESTS,
    ("--train-limit", "7"): TRAINING,
    ("--test-limit", "7"): TESTS,
    ("--steps", "3"): {"training.steps": 3},
    ("--batch-size", "6"): {"training.batch_size": 6},
    ("--samples", "9"): {"evaluation.samples": 9},
    ("--rollout-samples", "9"): {"rollouts.samples": 9},
    ("--k", "2"): {"evaluation.k": 2},
    ("--k", "2,1"): {"evaluation.k": [2, 1]},
    ("--set", "rollouts.temperature=0.8"): {"rollouts.temperature": 0.8},
    ("--set", "per_seed=true"): {"rollouts.per_seed": True},
    ("--set", "training.lora={}"): {
        "training.lora.rank": 8,
        "training.lora.alpha": 16.0,
        "training.lora.target_modules": "all-linear",
        "training.lora.load_in_4bit": False,
    },
    ("--seeds", "4,2"): {"seeds": [4, 2]},
    ("--algorithms", "sft,power"): {"algorithms.power.objective": "power", "algorithms.power.learning_rates": []},
    ("--objectives", "sft,power"): {"algorithms.power.objective": "power", "algorithms.power.learning_rates": []},
}


@shows(*(option for option, _ in CHANGES))
@pytest.mark.parametrize("arguments", CHANGES, ids=" ".join)
def test_an_option_changes_its_settings_and_no_others(arguments: tuple[str, str]) -> None:
    taking = [
        command
        for command, some in options().items()
        if arguments[0] in some and "--set" in some and command not in ("train", "rescore")  # of a buffer
    ]
    assert taking
    for command in taking:
        found = changed(command, *arguments)
        expected = CHANGES[arguments]
        assert {key: value for key, value in found.items() if key in expected} == expected
        assert {key for key in found if key not in expected and not key.startswith("algorithms.power.")} == set()


@pytest.mark.slow
def test_options_together() -> None:
    both = changed("compare", "--limit", "9", "--test-limit", "7")
    assert both == {"train.limit": 9, "rollouts.prompts": 9} | TESTS
    both = changed("compare", "--train-limit", "7", "--limit", "9")
    assert both == TRAINING | dict.fromkeys(TESTS, 9), "whatever their order"
    one = changed("compare", "--limit", "7", "--set", "benchmarks.facts.limit=3", "--set", "train.limit=5")
    assert one == TRAINING | TESTS | {"benchmarks.facts.limit": 3, "train.limit": 5}
    new = changed(
        "compare", "--limit", "7", "--set", "benchmarks.more.source=world:facts/test", experiment="arithmetic"
    )
    assert new["benchmarks.more.limit"] == new["benchmarks.chain-sums.limit"] == 7
    own = changed(
        "compare", "--seeds", "1", "--learning-rates", "2e-3", "--steps", "3", "--set", "seeds=[2]",
        "--set", "algorithms.sft.learning_rates=[1e-5]", "--set", "algorithms.sft.training.steps=4",
    )  # fmt: skip
    assert (own["seeds"], own["algorithms.sft.learning_rates"], own["algorithms.dft.learning_rates"]) == (
        [2], [1e-5], [2e-3],
    )  # fmt: skip
    assert own["algorithms.sft.training.steps"] == 4 and own["training.steps"] == 3
    row = changed("compare", "--batch-size", "6", experiment="own-samples")
    assert row["training.batch_size"] == 6
    experiment = experiment_of("compare", "own-samples", "--batch-size", "6")
    assert {experiment.training_of(name).batch_size for name in experiment.algorithms} == {6}


@shows("--column")
def test_columns_of_ones_own_data() -> None:
    columns = ["--column", "prompt={q} Please.", "--column", "solution=worked", "--column", "answer=label"]
    own = {"prompt": "{q} Please.", "solution": "worked", "columns.answer": "label"}
    train = {"train.source": "d.jsonl", **{f"train.{key}": value for key, value in own.items()}}
    assert changed("rollout", "--data", "d.jsonl", *columns) == train
    tests = {f"benchmarks.facts.{key}": value for key, value in {"source": "t.jsonl", **own}.items()}
    assert changed("evaluate", "--test-data", "t.jsonl", *columns) == tests
    both = ["--data", "d.jsonl", "--test-data", "t.jsonl", *columns, "--set", "train.prompt=p"]
    assert changed("compare", *both) == {**train, **tests, "train.prompt": "p"}


def test_columns_of_ones_own_validation_problems() -> None:
    columns = ["--data", "d.jsonl", "--column", "prompt=q", "--column", "answer=label"]
    found = changed("compare", *columns, "--set", "validation.source=v.jsonl")
    own = {key: value for key, value in found.items() if key.startswith("validation.")}
    assert own == {"validation.source": "v.jsonl", "validation.prompt": "q", "validation.columns.answer": "label"}
    check_validation(experiment_of("compare", "own-samples", *columns, "--set", "validation.source=v.jsonl"), "d.jsonl")
    check_validation(experiment_of("compare", "facts", *columns), "d.jsonl")  # one rate per row: nothing to choose


def test_benchmarks_with_the_same_problems_are_one() -> None:
    def names(*arguments: str) -> list[str]:
        return list(experiment_of("compare", "facts", *arguments).benchmarks)

    assert names() == names("--test-data", "t.jsonl", "--set", "benchmarks.unseen-facts.max_new_tokens=4")
    assert names("--test-data", "t.jsonl") == ["facts"] != names()


@shows("--learning-rates")
def test_learning_rates_are_those_of_every_row() -> None:
    experiment = experiment_of("compare", "facts", "--learning-rates", "1e-4,1e-3", "--seeds", "0")
    assert {cell.learning_rate for cell in cells(experiment)} == {1e-4, 1e-3}
    assert len(cells(experiment)) == 2 * len(experiment.algorithms)


TRAIN = ("train", "grpo", "--buffer", "b", "--out", "o")
TRAIN_CHANGES: dict[tuple[str, ...], dict[str, Any]] = {
    ("--steps", "3"): {"training.steps": 3},
    ("--batch-size", "6"): {"training.batch_size": 6},
    ("--learning-rate", "1e-3"): {"training.learning_rate": 1e-3},
    ("--set", "training.learning_rate=1e-3"): {"training.learning_rate": 1e-3},
    ("--set", "learning_rate=1e-3"): {"training.learning_rate": 1e-3},
    ("--option", "clip=0.3"): {"options.clip": 0.3},
    ("--set", "options.clip=0.3"): {"options.clip": 0.3},
    ("--option", "clip=0.3", "--set", "options.clip=0.1"): {"options.clip": 0.1},
    ("--steps", "3", "--set", "training.steps=4"): {"training.steps": 4},
    ("--seed", "5"): {"seed": 5},
    ("--set", "seed=5"): {"seed": 5},
    ("--model", "other"): {"model": "other"},
    ("--set", "objective=dpo"): {"objective": "dpo"},
    ("--bad-rows", "drop"): {"buffer.bad_rows": "drop"},
    ("--set", "split=test"): {"buffer.split": "test"},
    ("--column", "reward=score"): {"buffer.columns.reward": "score"},
    ("--set", "buffer.columns.reward=score"): {"buffer.columns.reward": "score"},
}


@shows(*(f"TrainSettings.{name}" for name in TrainSettings.model_fields))
@pytest.mark.parametrize("arguments", TRAIN_CHANGES, ids=" ".join)
def test_any_setting_of_a_training(arguments: tuple[str, ...]) -> None:
    found, plain = (
        flat(read_from("train_settings", *TRAIN, *some).model_dump(mode="json")) for some in (arguments, ())
    )
    assert {key: value for key, value in found.items() if plain.get(key, "nothing") != value} == TRAIN_CHANGES[
        arguments
    ]


def test_the_defaults_of_the_measurement() -> None:
    """Its help shows them, and is not to import what needs torch."""
    run = app.parsed(["variance"])
    assert run is not None
    defaults = VarianceSettings().model_dump()
    assert {name: run.keywords[name] for name in defaults} == defaults
    in_python = inspect.signature(analyze_variance).parameters
    assert all(in_python[name].default == defaults[name] for name in ("rows", "draws", "seed"))


@shows("--threads")
@pytest.mark.parametrize(
    "command", [["train", "sft", "--buffer", "b", "--out", "o"], ["rollout", "--out", "o"], ["evaluate"]]
)
def test_threads(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "9")
    before, seen = torch.get_num_threads(), []

    def stop(*_: Any, **__: Any) -> Any:
        seen.append((torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]))
        raise UserError("far enough")

    monkeypatch.setattr("rlzoo.jobs.pool.silence", stop)  # what each command does before it reads a model
    try:
        torch.set_num_threads(1)
        for threads in ([], ["--threads", "3"]):
            assert cli.main([*command, *threads]) == 2
        assert seen == [(1, "9"), (3, "3")]
        assert cli.main([*command, "--threads", "0"]) == 2 and len(seen) == 2
        assert "--threads: 0 is too few: give a whole number of at least 1" in capsys.readouterr().err
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@shows("--learning-rate", "--seed")
def test_the_options_of_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    OfflineBuffer.from_trajectories(ROWS).save(tmp_path / "buffer")
    rows = {}
    for name, more in (("plain", []), ("rate", ["--learning-rate", "0.5"]), ("seed", ["--seed", "3"])):
        arguments = ["train", "sft", "--buffer", "buffer", "--steps", "2", "--set", "batch_size=2", "--out", name]
        assert cli.main([*arguments, *more]) == 0
        rows[name] = json.loads((tmp_path / name / "training.json").read_text())["steps"]
    peaks = {name: max(row["learning_rate"] for row in steps) for name, steps in rows.items()}
    assert peaks == {"plain": 5e-5, "rate": 0.5, "seed": 5e-5}
    assert rows["rate"][0]["loss"] == rows["plain"][0]["loss"] != rows["seed"][0]["loss"]
