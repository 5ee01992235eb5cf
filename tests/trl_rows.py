"""A tiny model and rows that TRL's trainers and rlzoo's own see alike, and the gradient of one step of either."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from rlzoo.config import Training
from rlzoo.objective import Objective
from rlzoo.policy import Policy, load_policy
from rlzoo.training import Trainer
from rlzoo.types import Trajectory

PROMPTS, COMPLETIONS = (3, 5, 2, 7, 4, 4, 1, 6), (6, 1, 9, 4, 2, 7, 3, 5)
Gradient = dict[str, Tensor]


@cache
def tokenizer() -> Any:
    return load_policy("embedded").tokenizer


def small_model(seed: int = 0) -> Any:
    """Far from uniform, so that ratios and weights differ from 1."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        pad_token_id=tokenizer().pad_token_id,
        eos_token_id=tokenizer().eos_token_id,
    )
    return LlamaForCausalLM(config)


def small_rows() -> list[Trajectory]:
    draw, size = torch.Generator().manual_seed(2), len(tokenizer())
    rows = []
    for number, lengths in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        prompt, completion = (torch.randint(4, size, (n,), generator=draw).tolist() for n in lengths)
        rows.append(Trajectory("", "", prompt, completion, str(number)))
    return rows


class Fixed:
    """A source that draws the same rows every time."""

    def __init__(self, rows: Sequence[Trajectory], units: Sequence[tuple[int, ...]] | None = None) -> None:
        self.rows, self.given = list(rows), units

    def draw(self) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
        return self.rows, list(self.given or [(number,) for number in range(len(self.rows))])


def own_gradient(
    model: Any, objective: Objective, source: Fixed, reference: Any = None, token_budget: int = 40
) -> Gradient:
    """The gradient of a step of rlzoo's trainer, in several micro-batches."""
    policy, found = Policy(copy.deepcopy(model), tokenizer()), Gradient()
    initial = None if reference is None else Policy(copy.deepcopy(reference).eval(), tokenizer())
    settings = Training(steps=1, batch_size=len(source.rows), max_gradient_norm=1e9, token_budget=token_budget)

    def keep(trainer: Trainer, step: int) -> None:
        found.update(
            (name, p.grad.clone()) for name, p in trainer.policy.model.named_parameters() if p.grad is not None
        )

    Trainer(policy, objective, source, settings, callbacks=[keep], reference=initial).run()
    return found


def step_arguments(folder: Path, batch_size: int, accumulation: int, **more: Any) -> dict[str, Any]:
    """Arguments of a transformers trainer that takes one step."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "learning_rate": 1.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **more,
    }


class Keep(TrainerCallback):  # type: ignore[misc]
    """Keeps the gradient of the last optimizer step, and the model before it."""

    def __init__(self) -> None:
        self.gradient = Gradient()
        self.model: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.model = small_model()
        self.model.load_state_dict(model.state_dict())


def last_step(trainer: Any) -> Keep:
    """The last step of the trainer's run."""
    trainer.add_callback(keep := Keep())
    trainer.train()
    return keep


def step_gradient(trainer: Any) -> Gradient:
    """The gradient of the trainer's one step."""
    return last_step(trainer).gradient


def gap(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The difference of two gradients, relative to the wanted one."""
    assert wanted.keys() <= found.keys() and wanted
    off = sum(float((found[name] - wanted[name]).double().square().sum()) for name in wanted)
    size = sum(float(value.double().square().sum()) for value in wanted.values())
    assert size > 0
    return float((off / size) ** 0.5)
