"""The variance of objectives' gradients in the course of a run of transformers' Trainer or of TRL's trainers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from rlzoo.buffers import Buffer
from rlzoo.config import TokenBudget
from rlzoo.errors import UserError
from rlzoo.integrations.frozen import causal_lm
from rlzoo.jobs.ranks import is_sharded
from rlzoo.objective import Objective
from rlzoo.policy import Policy
from rlzoo.types import WhichView
from rlzoo.variance.probe import VarianceProbe
from rlzoo.variance.subjects import named_objectives


class VarianceCallback(TrainerCallback):  # type: ignore[misc]
    """Measures the gradients of objectives on rows of a buffer every ``every`` steps, and logs the result.

    The numbers of `VarianceProbe` reach the trainer's log, and thus every tracker that it reports to, as
    ``variance/OBJECTIVE/NUMBER``: ``trace_cov`` tr Σ, ``grad_norm_sq`` ‖G‖², ``snr`` their ratio, with the ends of
    their 95 % intervals (``/ci_low``, ``/ci_high``) where they exist. ``records`` keeps them all. The model's
    gradients, mode, attention function and random numbers are as before. The trainer need not train any of the
    objectives. Of several processes, all measure the same rows and have the same ``records``; the main one logs.

    Raises UserError for ``every`` below 1, for weights that are split over processes, and before training for a buffer
    that lacks log-probs of a frozen reference.
    """

    def __init__(
        self,
        trainer: Trainer,
        objectives: Sequence[str | Objective] | Mapping[str, Objective],
        buffer: Buffer,
        every: int = 50,
        rows: int = 64,
        seed: int = 0,
        token_budget: TokenBudget = 2048,
        learns_from: WhichView | None = None,
    ) -> None:
        """``objectives`` are names, objectives, or a mapping of names of your own to them; the other arguments are
        those of `VarianceProbe`."""
        self.trainer, self.objectives = trainer, named_objectives(objectives)
        self.probe = VarianceProbe(buffer, every, rows, seed, token_budget, learns_from)
        self.records: list[dict[str, Any]] = []
        self.probe.check(*self.objectives.values())
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or is_sharded(trainer.model):
            raise UserError(
                "VarianceCallback needs whole weights in each process, which FSDP, DeepSpeed and tensor parallelism "
                "do not leave: save checkpoints, and measure them with rlzoo variance --buffer BUFFER --model FOLDER"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Measure if the step is due."""
        if state.global_step % self.probe.every == 0:
            self.measure(state.global_step)

    def measure(self, step: int) -> None:
        """Measure the trainer's model in its current state, and log the result."""
        model = causal_lm(self.trainer.model)
        tokenizer = getattr(self.trainer.processing_class, "tokenizer", self.trainer.processing_class)
        compute = torch.bfloat16 if self.trainer.args.bf16 else torch.float16 if self.trainer.args.fp16 else None
        with unchanged(model):
            found = self.probe.measured(Policy(model, tokenizer, compute=compute), self.objectives)
        numbers: dict[str, float] = {}
        for name, record in found.items():
            self.records.append({"step": step, "objective": name, **record})
            numbers |= {f"variance/{name}/{key}": value for key, value in _numbers(record).items()}
        if not found:
            raise UserError("VarianceCallback: none of the objectives can be measured on the buffer")
        due = self.trainer.control.should_log
        Trainer.log(self.trainer, numbers)  # TRL's own would move its metrics into this entry
        self.trainer.control.should_log = due  # an entry counts as the step's regular one, which may still be due


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record; those of an estimate with its interval under its name."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            parts = {f"{key}/{end}": value.get(end) for end in ("ci_low", "ci_high")}
            found |= {name: float(x) for name, x in {key: value.get("value"), **parts}.items() if x is not None}
        elif isinstance(value, (int, float)):
            found[key] = float(value)
    return found


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """In this context, analyses may use a model, whose gradients, modes, configuration and random numbers are restored
    at its end."""
    modes = {module: module.training for module in model.modules()}
    trained = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    text: Any = model.config
    configs = {id(config): config for config in (text, text.get_text_config())}.values()
    attention = [(config, config._attn_implementation) for config in configs]
    devices = [parameter.device for parameter in trained if parameter.device.type == "cuda"][:1]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, training in modes.items():
            module.training = training
        for parameter, (requires_grad, gradient) in trained.items():
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for config, name in attention:
            config._attn_implementation = name
