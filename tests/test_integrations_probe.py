"""The variance of gradients in the log of another library's trainer, which trains as if nobody measured."""

from __future__ import annotations

import copy
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trl_rows import small_model, small_rows, step_arguments, tokenizer

trl = pytest.importorskip("trl", reason="objectives in TRL's trainers are tested with TRL 1.16")

from datasets import Dataset  # noqa: E402 - only once trl is known to be there
from transformers import TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from rlzoo import OfflineBuffer  # noqa: E402
from rlzoo.errors import UserError  # noqa: E402
from rlzoo.integrations import VarianceCallback, with_objective  # noqa: E402
from rlzoo.integrations.probe import unchanged  # noqa: E402


class Tracker(TrainerCallback):  # type: ignore[misc]
    """What trackers receive."""

    def __init__(self) -> None:
        self.seen = set[str]()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.update(logs)


def trainer_of(folder: Path) -> Any:
    rows = small_rows()
    ids = [[*row.prompt_ids, *row.completion_ids] for row in rows]
    labels = [[-100] * len(row.prompt_ids) + row.completion_ids for row in rows]
    args = SFTConfig(**step_arguments(folder, 2, 1, max_steps=4, learning_rate=0.05, logging_steps=4, seed=3))
    return with_objective(SFTTrainer, "dft")(
        model=small_model(),
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}),
        processing_class=tokenizer(),
    )


@pytest.mark.slow
def test_the_probe_logs_through_the_trainer_and_changes_nothing(tmp_path: Path) -> None:
    plain = trainer_of(tmp_path)
    plain.train()
    watched = trainer_of(tmp_path)
    callback = VarianceCallback(watched, ["sft", "dft"], OfflineBuffer.from_trajectories(small_rows()), every=2)
    watched.add_callback(callback)
    watched.add_callback(tracker := Tracker())
    watched.train()
    for (name, parameter), other in zip(plain.model.named_parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert {"variance/sft/snr", "variance/dft/ess_fraction", "objective/logp"} <= tracker.seen
    measured = [entry for entry in watched.state.log_history if "variance/dft/trace_cov" in entry]
    assert [entry["step"] for entry in measured] == [2, 4]
    assert all(entry[f"variance/{name}/grad_norm_sq/ci_high"] > 0 for entry in measured for name in ("sft", "dft"))
    assert [(row["step"], row["objective"]) for row in callback.records] == [
        (2, "sft"),
        (2, "dft"),
        (4, "sft"),
        (4, "dft"),
    ]
    regular = [entry for entry in watched.state.log_history if "loss" in entry]
    assert regular == [{**entry, "step": 4} for entry in regular] and "objective/logp" in regular[0]
    ours, theirs = (next(e for e in one.state.log_history if "loss" in e)["loss"] for one in (watched, plain))
    assert ours == theirs


def test_a_model_is_as_it_was() -> None:
    model = small_model()
    model.train()
    model.model.layers[0].eval()
    frozen = model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    gradient = model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    drawn = []
    for measures in (False, True):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        if measures:
            with unchanged(model):
                torch.rand(3), random.random(), np.random.rand()
                model.eval().requires_grad_(True)
                model.lm_head.weight.grad = None
                model.config._attn_implementation = "rlzoo"
        drawn.append((float(torch.rand(1)), random.random(), float(np.random.rand())))
    assert drawn[0] == drawn[1]
    assert modes == [module.training for module in model.modules()] and not frozen.requires_grad
    assert model.lm_head.weight.grad is gradient and model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_buffer_without_the_references_log_probs_is_refused_before_training(tmp_path: Path) -> None:
    buffer = OfflineBuffer.from_trajectories(small_rows())
    with pytest.raises(UserError, match="the probe's buffer has no reference log-probs: add them with"):
        VarianceCallback(None, ["iw-sft"], buffer)
    with pytest.raises(UserError, match="cannot measure every 0 steps"):
        VarianceCallback(None, ["dft"], buffer, every=0)


@pytest.mark.parametrize("split", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_split_weights_are_refused_before_training(split: str) -> None:
    trainer = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=False, model=small_model())
    buffer = OfflineBuffer.from_trajectories(small_rows())
    VarianceCallback(trainer, ["dft"], buffer)
    setattr(trainer, split, True)
    with pytest.raises(UserError, match=r"needs whole weights in each process.*rlzoo variance --buffer"):
        VarianceCallback(trainer, ["dft"], buffer)


@pytest.mark.slow
def test_the_page_trains_with_two_changed_lines_and_a_probe(tmp_path: Path) -> None:
    """The examples of docs/integrations.md that need nothing but TRL."""
    plain, page = trainer_of(tmp_path), Path(__file__).parent.parent / "docs" / "integrations.md"
    names: dict[str, Any] = {
        "model": small_model(),
        "args": plain.args,
        "dataset": plain.train_dataset,
        "tokenizer": tokenizer(),
        "buffer": OfflineBuffer.from_trajectories(small_rows()),
    }
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for block in (block for block in blocks if "verl" not in block and "slime" not in block):
        exec(block, names)
    assert names["trainer"].state.global_step == 4 and callable(names["loss"])
    assert names["SimPOTrainer"].exported.objective.beta == 2.5
    assert any(isinstance(one, VarianceCallback) for one in names["trainer"].callback_handler.callbacks)
