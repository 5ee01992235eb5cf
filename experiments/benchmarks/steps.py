"""Rows and training steps that benchmarks measure, and the steps' counterparts in TRL."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from rlzoo import Policy, get_objective
from rlzoo.buffers.problems import Problem, load_problems
from rlzoo.config import ProblemSource
from rlzoo.jobs.memory import release_memory
from rlzoo.policy import Assembler
from rlzoo.policy.microbatches import log_probs
from rlzoo.training.costs import peak_memory_bytes, reset_peak_memory
from rlzoo.types import Trajectory

UNIT = {"dpo": 2, "grpo": 4}
"""Rows that share a prompt, of the objectives that need some."""
RATE = 1e-9
"""A step with next to no effect, so that the next one starts from the same weights."""
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "mixture": {"weights": {"sft": 0.1, "grpo": 0.9}},
    "opd": {"teacher": "embedded"},
}
"""Of objectives that have options without a default."""


def problems_of(data: str, limit: int) -> Sequence[Problem]:
    """The first problems of a file in GSM8K's format, as chats, or of a built-in task ``world:NAME/SPLIT``."""
    if data.startswith("world:"):
        return load_problems(ProblemSource(source=data, limit=limit))
    return load_problems(ProblemSource(source=data, prompt="{question}", solution="answer", chat=True, limit=limit))


def synchronise() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Watch:
    """Seconds, of the clock and of the CPU, and peak memory of each step of an engine."""

    on_gradient: Callable[[], None] | None = None
    """Called when the gradient of a step is whole; its time does not count."""
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    _started: float = 0.0
    _cpu_started: float = 0.0

    def begin(self) -> None:
        """A step begins."""
        if not torch.cuda.is_available():  # a GPU counts what is allocated; asking it for memory anew would take time
            release_memory()
        reset_peak_memory()
        synchronise()
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def gradient(self) -> None:
        """The gradient of the step is whole."""
        if self.on_gradient is not None:
            synchronise()
            paused, cpu_paused = time.perf_counter(), time.process_time()
            self.on_gradient()
            self._started += time.perf_counter() - paused
            self._cpu_started += time.process_time() - cpu_paused

    def end(self) -> None:
        """The step is done."""
        synchronise()
        self.seconds.append(time.perf_counter() - self._started)
        self.cpu_seconds.append(time.process_time() - self._cpu_started)
        self.peaks.append(peak_memory_bytes())


def gemm_speed(device: str = "cpu", dtype: torch.dtype = torch.float32, size: int = 2048, repeats: int = 6) -> float:
    """FLOP/s of a matrix product of random numbers: the best of some."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    at_once = 10 if device != "cpu" else 1
    best = 0.0
    for _ in range(repeats):
        synchronise()
        started = time.perf_counter()
        for _ in range(at_once):
            torch.mm(a, b)
        synchronise()
        best = max(best, at_once * 2 * size**3 / (time.perf_counter() - started))
    return best


def tokens_of(rows: list[Trajectory]) -> int:
    """Prompt and completion tokens."""
    return sum(len(row.prompt_ids) + len(row.completion_ids) for row in rows)


def together(policy: Policy, rows: list[Trajectory], size: int) -> list[Trajectory]:
    """The same completions as samples, ``size`` of one prompt, the first and every second one after it right."""
    prompts = [rows[i - i % size] for i in range(len(rows) - len(rows) % size)]
    pairs = [(prompt.prompt_ids, row.completion_ids) for prompt, row in zip(prompts, rows, strict=False)]
    return [
        replace(
            row, prompt=prompt.prompt, prompt_ids=prompt.prompt_ids, prompt_id=str(i // size), source="policy",
            reward=float(i % 2 == 0), behaviour_logp=logp, reference_logp=logp,
        )
        for i, (prompt, row, logp) in enumerate(zip(prompts, rows, log_probs(policy, pairs), strict=False))
    ]  # fmt: skip


def optimizer_of(policy: Policy) -> torch.optim.Optimizer:
    """AdamW as rlzoo's trainer has it."""
    return torch.optim.AdamW(policy.model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def plain_steps(
    policy: Policy,
    rows: list[Trajectory],
    batch: int,
    loss_of: Callable[[list[Trajectory]], torch.Tensor],
    watch: Watch,
    steps: int = 1,
) -> None:
    """A plain loop: AdamW steps on all rows, ``batch`` at a time, whose losses are added up."""
    optimizer = optimizer_of(policy)
    for _ in range(steps):
        watch.begin()
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(rows), batch):
            with torch.autocast(policy.device.type, policy.compute, enabled=policy.compute is not None):
                loss = loss_of(rows[start : start + batch])
            torch.autograd.backward(loss)
        watch.gradient()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        watch.end()


def trl_sft_steps(
    policy: Policy,
    rows: list[Trajectory],
    objective: str,
    watch: Watch,
    *,
    batch: int,
    length: int,
    packed: bool = False,
    by_length: bool = False,
    steps: int = 1,
) -> None:
    """Steps of TRL's SFTTrainer on all rows: padded, rows of like length together if ``by_length``, or ``packed``.

    Packed blocks have ``length`` tokens, of which no row has more.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Watching(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.begin()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            watch.gradient()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.end()

    table = Dataset.from_list(
        [
            {
                "input_ids": row.prompt_ids + row.completion_ids,
                "completion_mask": [0] * len(row.prompt_ids) + [1] * len(row.completion_ids),
            }
            for row in rows
        ]
    )
    batch = 1 if packed else min(batch, len(rows))
    sampling: dict[str, Any] = {"train_sampling_strategy": "group_by_length" if by_length else "random"}
    if "train_sampling_strategy" not in SFTConfig.__dataclass_fields__:  # transformers 5.0
        sampling = {"group_by_length": by_length}
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, loss_type="dft" if objective == "dft" else "nll", completion_only_loss=True,
            **sampling, max_length=length, packing=packed, per_device_train_batch_size=batch,
            gradient_accumulation_steps=len(rows), max_steps=steps, learning_rate=RATE, weight_decay=0.01,
            adam_beta2=0.95, bf16=policy.compute is not None, use_cpu=policy.device.type == "cpu", report_to=[],
            gradient_checkpointing=False, save_strategy="no", optim="adamw_torch_fused", disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(policy.model, config, train_dataset=table, processing_class=policy.tokenizer)
        blocks = len(trainer.train_dataset)
        trainer.args.gradient_accumulation_steps = -(-blocks // batch)
        trainer.accelerator.gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainer.add_callback(Watching())
        trainer.train()


def with_trl_head(policy: Policy) -> None:
    """Give the model the fused head that TRL's DPO and GRPO trainers use; once."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(policy.model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    policy.model.train()


def trl_loss_steps(
    policy: Policy, rows: list[Trajectory], objective: str, watch: Watch, *, batch: int, steps: int = 1
) -> None:
    """The same with the loss of TRL's DPOTrainer or GRPOTrainer, run unbound, after `with_trl_head`."""
    loss = {"dpo": dpo_loss, "grpo": grpo_loss}[objective]
    plain_steps(policy, rows, batch, lambda some: loss(policy, some) * (len(some) / len(rows)), watch, steps)


def dpo_loss(policy: Policy, rows: list[Trajectory]) -> torch.Tensor:
    """TRL's sigmoid loss on pairs: the chosen rows first, padded on the right."""
    from trl import DPOTrainer

    ordered = rows[::2] + rows[1::2]
    ids = [torch.tensor(row.prompt_ids + row.completion_ids) for row in ordered]
    mask = [torch.tensor([0] * len(row.prompt_ids) + [1] * len(row.completion_ids)) for row in ordered]
    reference = torch.tensor([sum(row.reference_logp or []) for row in ordered], device=policy.device)
    this = trl_self(
        policy, args=SimpleNamespace(gradient_checkpointing_kwargs=None), ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], beta=0.1, use_weighting=False,
        ref_model=None,
    )  # fmt: skip
    inputs = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "completion_mask": pad_sequence(mask, batch_first=True),
        "ref_chosen_logps": reference[: len(rows) // 2],
        "ref_rejected_logps": reference[len(rows) // 2 :],
    }
    loss: torch.Tensor = DPOTrainer._compute_loss(this, policy.model, on(policy, inputs), return_outputs=False)
    return loss


def grpo_loss(policy: Policy, rows: list[Trajectory]) -> torch.Tensor:
    """TRL's clipped loss with k3 KL on groups: prompts padded on the left, completions on the right."""
    from trl import GRPOTrainer

    objective: Any = get_objective("grpo")
    units = [tuple(range(i, i + UNIT["grpo"])) for i in range(0, len(rows), UNIT["grpo"])]
    batch = objective.prepare(Assembler(policy).assemble(rows, units, objective))
    assert batch.advantage is not None
    prompts, completions = ([torch.tensor(ids) for ids in side] for side in zip(
        *((row.prompt_ids, row.completion_ids) for row in rows), strict=True
    ))  # fmt: skip
    this = trl_self(
        policy, args=SimpleNamespace(use_bias_correction_kl=False, delta=None, report_to=[]), top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level="token", use_vllm=False, loss_type="grpo",
        beta=objective.kl_coefficient, epsilon_low=objective.clip, epsilon_high=objective.clip,
        _entropy_bonus_enabled=False,
    )  # fmt: skip
    this._get_per_token_logps_and_entropies = partial(GRPOTrainer._get_per_token_logps_and_entropies, this)
    left = partial(pad_sequence, batch_first=True, padding_side="left")
    inputs = {
        "prompt_ids": left(prompts),
        "prompt_mask": left([torch.ones_like(row) for row in prompts]),
        "completion_ids": pad_sequence(completions, batch_first=True),
        "completion_mask": pad_sequence([torch.ones_like(row) for row in completions], batch_first=True),
        "advantages": batch.advantage[:, 0],
        "old_per_token_logps": batch.behaviour_logp,
        "ref_per_token_logps": batch.reference_logp,
    }
    loss: torch.Tensor = GRPOTrainer._compute_loss(this, policy.model, on(policy, inputs))
    return loss


def on(policy: Policy, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same on the policy's device."""
    return {name: value.to(policy.device) for name, value in inputs.items()}


def trl_self(policy: Policy, **attributes: Any) -> SimpleNamespace:
    """What TRL's losses read of ``self``, in one process that logs nothing."""

    def same(values: Any, **_: Any) -> Any:
        return values

    accelerator = SimpleNamespace(
        gather=same, gather_for_metrics=same, reduce=same, autocast=nullcontext, device=policy.device,
        parallelism_config=None, num_processes=1, is_main_process=True,
    )  # fmt: skip
    return SimpleNamespace(
        model=policy.model, accelerator=accelerator, state=SimpleNamespace(global_step=0), aux_loss_enabled=False,
        current_gradient_accumulation_steps=1, _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1, **attributes,
    )  # fmt: skip
