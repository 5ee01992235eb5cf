"""TRL's trainers on several processes have the gradient of rlzoo's own trainer on all of their rows."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ranks import copies
from trl_rows import (
    Fixed,
    Gradient,
    gap,
    own_gradient,
    small_model,
    small_rows,
    step_arguments,
    step_gradient,
    tokenizer,
)

pytest.importorskip("trl", reason="objectives in TRL's trainers are tested with TRL 1.16")

from datasets import Dataset
from test_integrations_probe import trainer_of
from test_integrations_trl import (
    CHOSEN,
    REJECTED,
    pairs_of_texts,
    rows_of_samples,
    share_of_fives,
    trajectories,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from rlzoo import OfflineBuffer
from rlzoo.integrations import VarianceCallback, with_objective
from rlzoo.objective import get_objective
from rlzoo.policy import Policy
from rlzoo.variance import VarianceProbe

PROCESSES = 2
OF_PAIRS, OF_GROUPS = ("dpo", "orpo"), ("grpo", "dapo")
OPTIONS: dict[str, dict[str, Any]] = {"kto": {"beta": 0.02}, "grpo": {"kl_coefficient": 0.1}}
LABELS = [True] * 4 + [False] * 4


def of_trainer(name: str, folder: Path) -> tuple[Gradient, dict[str, Any]]:
    """This process's gradient of a step, and the samples that it has drawn."""
    model, reference, kept = small_model(0), small_model(1), dict[str, Any]()
    options: dict[str, Any] = {"model": model, "processing_class": tokenizer()}
    if name in OF_PAIRS:
        kind: Any = DPOTrainer
        args = DPOConfig(**step_arguments(folder, 1, 2))
        options |= {"ref_model": reference, "train_dataset": pairs_of_texts()}
    elif name == "kto":
        kind, pairs = KTOTrainer, [*CHOSEN, *REJECTED]
        args = KTOConfig(**step_arguments(folder, 2, 2))
        columns = {"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs], "label": LABELS}
        # so that mismatched completions are likelier than before: where they are not, KTO's baseline is 0
        model, reference = reference, model
        options |= {"model": model, "ref_model": reference, "train_dataset": Dataset.from_dict(columns)}
    else:
        model.config._name_or_path = str(folder / "model")  # where TRL loads the reference from

        class Watched(GRPOTrainer):  # type: ignore[misc]
            def _generate_and_score_completions(self, inputs: Any) -> Any:
                kept.update(super()._generate_and_score_completions(inputs))
                return dict(kept)

        kind = Watched
        args = GRPOConfig(
            **step_arguments(folder, 2, 2), num_generations=4, max_completion_length=6, temperature=0.8,
            beta=0.1 if name == "grpo" else 0.0,
        )  # fmt: skip
        prompts = Dataset.from_dict({"prompt": ["1+1=", "2+3="]})
        options |= {"reward_funcs": share_of_fives, "train_dataset": prompts}
    trainer = with_objective(kind, name, **OPTIONS.get(name, {}))(args=args, **options)
    assert trainer.accelerator.num_processes == PROCESSES
    return step_gradient(trainer), kept


def of_process(number: int, folder: Path) -> str:
    """Write what `of_trainer` finds in one of the processes."""
    found = {}
    for name in (*OF_PAIRS, "kto", *OF_GROUPS):
        torch.manual_seed(number)
        found[name] = of_trainer(name, folder)
    torch.save(found, folder / f"{number}.pt")
    return "well"


@pytest.mark.slow
def test_trainers_on_two_processes_have_the_gradient_of_all_rows(tmp_path: Path) -> None:
    model, reference = small_model(0), small_model(1)
    reference.save_pretrained(tmp_path / "model")
    assert copies(partial(of_process, folder=tmp_path), PROCESSES) == ["well"] * PROCESSES
    of_all = [torch.load(tmp_path / f"{number}.pt", weights_only=False) for number in range(PROCESSES)]
    chosen, rejected = trajectories(CHOSEN), trajectories(REJECTED)
    pairs = [row for pair in zip(chosen, rejected, strict=True) for row in pair]
    judged = [replace(row, reward=float(own)) for row, own in zip([*chosen, *rejected], LABELS, strict=True)]
    for name in (*OF_PAIRS, "kto", *OF_GROUPS):
        if name in OF_PAIRS:
            source = Fixed(pairs, [(n, n + 1) for n in range(0, 8, 2)])
        elif name == "kto":
            source = Fixed(judged)
        else:
            samples = [row for found in of_all for row in rows_of_samples(found[name][1], model)]
            assert len({row.prompt_id for row in samples}) == PROCESSES
            source = Fixed(samples, [tuple(range(4)), tuple(range(4, 8))])
        models = (reference, model) if name == "kto" else (model, reference)
        wanted = own_gradient(models[0], get_objective(name, **OPTIONS.get(name, {})), source, models[1])
        for found in of_all:
            assert gap(found[name][0], wanted) < 1e-5, name


def watched(number: int, folder: Path) -> str:
    """Write the weights that one of the processes trains, without and with a probe, and what the probe records."""
    trainers = trainer_of(folder), trainer_of(folder)
    callback = VarianceCallback(trainers[1], ["sft", "dft"], OfflineBuffer.from_trajectories(small_rows()), every=2)
    trainers[1].add_callback(callback)
    for trainer in trainers:
        trainer.train()
    weights = [trainer.model.state_dict() for trainer in trainers]
    torch.save((weights, callback.records, trainers[1].state.log_history), folder / f"{number}.pt")
    return "well"


@pytest.mark.slow
def test_a_probe_on_two_processes_measures_what_one_does(tmp_path: Path) -> None:
    assert copies(partial(watched, folder=tmp_path), PROCESSES) == ["well"] * PROCESSES
    (weights, records, log), (_, others, _) = (
        torch.load(tmp_path / f"{number}.pt", weights_only=False) for number in range(PROCESSES)
    )
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items()), "it changes nothing"
    assert records == others and [record["step"] for record in records] == [2, 2, 4, 4]
    assert [entry["step"] for entry in log if "variance/dft/snr" in entry] == [2, 4]
    model = small_model()
    model.load_state_dict(weights[1])
    objectives = {name: get_objective(name) for name in ("sft", "dft")}
    probe = VarianceProbe(OfflineBuffer.from_trajectories(small_rows()), every=1)
    alone = probe.measured(Policy(model, tokenizer()), objectives)
    for record in records[-2:]:
        expected = alone[record["objective"]]
        for name in ("mean", "ess_fraction", "median_p"):
            assert record[name] == pytest.approx(expected[name], rel=1e-5)
        for name in ("trace_cov", "grad_norm_sq"):
            assert record[name]["value"] == pytest.approx(expected[name]["value"], rel=1e-4)
