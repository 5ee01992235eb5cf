"""A training step of rlzoo against TRL's trainers on the same rows, weights and numerics.

    python experiments/benchmarks/train_step.py --model models/SmolLM2-135M-Instruct --data gsm8k/train.jsonl

One optimizer step (AdamW, float32, no dropout) over the first ``--rows`` demonstrations, after one step on the first
``--warm-up`` of them that is not counted. Every engine runs in a process of its own, in turn, ``--repeats`` times;
medians are told:

- ``rlzoo``: micro-batches of rows of like length by token budget, the head on completion tokens alone;
- ``trl_padded``: `trl.SFTTrainer`, micro-batches of ``--trl-batch`` padded rows; for DPO and GRPO the losses of
  `trl.DPOTrainer` and `trl.GRPOTrainer`, with TRL's fused head, on padded micro-batches in a plain loop;
- ``trl_packed`` (SFT and DFT): the same with best-fit packing into blocks as long as rlzoo's token budget.

For DPO every second solution is the rejected one of the prompt before it; for GRPO four solutions in a row are samples
of one prompt, every second one right. Log-probs of reference and behaviour are known to both sides beforehand.

Real tokens a second count prompt and completion, padding left out. The GEMM fraction is 6 · parameters · tokens / time
over the speed of a float32 matrix product timed beside it. ``gradient_cosine`` is between rlzoo's gradient and that of
``trl_padded``: the same loss over the same completion tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from rlzoo import Policy, get_objective, load_policy
from rlzoo.buffers.problems import demonstrations, load_problems
from rlzoo.config import ProblemSource, Training
from rlzoo.jobs.memory import release_memory
from rlzoo.policy import Assembler
from rlzoo.policy.microbatches import score_rows
from rlzoo.training import Trainer
from rlzoo.training.costs import peak_memory_bytes, reset_peak_memory
from rlzoo.types import Trajectory

ENGINES = ("rlzoo", "trl_padded", "trl_packed")
OBJECTIVES = ("dft", "sft", "dpo", "grpo")
UNIT = {"dpo": 2, "grpo": 4}
"""Rows that share a prompt, of the objectives that need some."""
RATE = 1e-9
"""A step with next to no effect, so that the counted one starts from the same weights."""


def rows_of(policy: Policy, arguments: argparse.Namespace) -> list[Trajectory]:
    """The first demonstrations: GSM8K's rows in the model's chat template, or those of an embedded world."""
    if arguments.data.startswith("world:"):
        source = ProblemSource(source=arguments.data, limit=arguments.rows)
    else:
        source = ProblemSource(
            source=arguments.data, prompt="{question}", solution="answer", chat=True, limit=arguments.rows
        )
    return demonstrations(policy.tokenizer, load_problems(source), 1024)[: arguments.rows]


def together(policy: Policy, rows: list[Trajectory], size: int) -> list[Trajectory]:
    """The same completions as samples, ``size`` of one prompt, the first and every second one after it right."""
    prompts = [rows[i - i % size] for i in range(len(rows) - len(rows) % size)]
    pairs = [(prompt.prompt_ids, row.completion_ids) for prompt, row in zip(prompts, rows, strict=False)]
    return [
        replace(
            row, prompt=prompt.prompt, prompt_ids=prompt.prompt_ids, prompt_id=str(i // size), source="policy",
            reward=float(i % 2 == 0), behaviour_logp=logp, reference_logp=logp,
        )
        for i, (prompt, row, logp) in enumerate(zip(prompts, rows, score_rows(policy, pairs), strict=False))
    ]  # fmt: skip


class Whole:
    """Every row in every batch, ``size`` rows a unit."""

    def __init__(self, rows: list[Trajectory], size: int = 1) -> None:
        self.rows, self.size = rows, size

    def draw(self) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
        """All rows."""
        return self.rows, [tuple(range(i, i + self.size)) for i in range(0, len(self.rows), self.size)]


def rlzoo(policy: Policy, rows: list[Trajectory], objective: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of rlzoo's step; leaves the gradient in the policy."""
    settings = Training(steps=1, batch_size=len(rows), token_budget=arguments.token_budget, learning_rate=RATE)
    size = UNIT.get(objective, 1)
    Trainer(policy, get_objective(objective), Whole(rows[: arguments.warm_up], size), settings).run()
    trainer = Trainer(policy, get_objective(objective), Whole(rows, size), settings)
    release_memory()
    reset_peak_memory()
    started = time.perf_counter()
    trainer.run()
    return {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory_bytes()}


def trl(policy: Policy, rows: list[Trajectory], objective: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same of TRL's SFTTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    packed = arguments.part == "trl_packed"
    found: dict[str, Any] = {}

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            release_memory()
            reset_peak_memory()
            found["started"] = time.perf_counter()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            if arguments.gradient:
                save_gradient(policy, arguments.gradient)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found["seconds"] = time.perf_counter() - found["started"]
            found["peak_memory_bytes"] = peak_memory_bytes()

    def run(some: list[Trajectory]) -> None:
        table = Dataset.from_list(
            [
                {
                    "input_ids": row.prompt_ids + row.completion_ids,
                    "completion_mask": [0] * len(row.prompt_ids) + [1] * len(row.completion_ids),
                }
                for row in some
            ]
        )
        batch = 1 if packed else min(arguments.trl_batch, len(some))
        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                output_dir=folder, loss_type="dft" if objective == "dft" else "nll", completion_only_loss=True,
                max_length=arguments.token_budget, packing=packed, per_device_train_batch_size=batch,
                gradient_accumulation_steps=len(some), max_steps=1, learning_rate=RATE, weight_decay=0.01,
                adam_beta2=0.95, bf16=False, use_cpu=not torch.cuda.is_available(), report_to=[],
                gradient_checkpointing=False, save_strategy="no", optim="adamw_torch_fused", disable_tqdm=True,
            )  # fmt: skip
            trainer = SFTTrainer(policy.model, config, train_dataset=table, processing_class=policy.tokenizer)
            blocks = len(trainer.train_dataset)
            trainer.args.gradient_accumulation_steps = -(-blocks // batch)
            trainer.accelerator.gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
            trainer.add_callback(Watch())
            trainer.train()

    gradient, arguments.gradient = arguments.gradient, None
    run(rows[: arguments.warm_up])
    arguments.gradient = gradient
    run(rows)
    return {key: found[key] for key in ("seconds", "peak_memory_bytes")}


def trl_loss(policy: Policy, rows: list[Trajectory], objective: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same with the loss of TRL's DPOTrainer or GRPOTrainer, run unbound, in a plain loop over padded batches."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(policy.model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    policy.model.train()
    optimizer = torch.optim.AdamW(policy.model.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)

    def step(some: list[Trajectory]) -> None:
        optimizer.zero_grad(set_to_none=True)
        batches = [some[i : i + arguments.trl_batch] for i in range(0, len(some), arguments.trl_batch)]
        for batch in batches:
            loss = {"dpo": dpo_loss, "grpo": grpo_loss}[objective](policy, batch)
            torch.autograd.backward(loss * (len(batch) / len(some)))
        if arguments.gradient:
            save_gradient(policy, arguments.gradient)
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()

    gradient, arguments.gradient = arguments.gradient, None
    step(rows[: arguments.warm_up])
    release_memory()
    reset_peak_memory()
    started = time.perf_counter()
    step(rows)
    found = {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory_bytes()}
    arguments.gradient = gradient
    if gradient:  # apart from the step that is timed
        step(rows)
    return found


def dpo_loss(policy: Policy, rows: list[Trajectory]) -> torch.Tensor:
    """TRL's sigmoid loss on pairs: the chosen rows first, padded on the right."""
    from trl import DPOTrainer

    ordered = rows[::2] + rows[1::2]
    ids = [torch.tensor(row.prompt_ids + row.completion_ids) for row in ordered]
    mask = [torch.tensor([0] * len(row.prompt_ids) + [1] * len(row.completion_ids)) for row in ordered]
    reference = torch.tensor([sum(row.reference_logp or []) for row in ordered])
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
    loss: torch.Tensor = DPOTrainer._compute_loss(this, policy.model, inputs, return_outputs=False)
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
    loss: torch.Tensor = GRPOTrainer._compute_loss(this, policy.model, inputs)
    return loss


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


def save_gradient(policy: Policy, file: str) -> None:
    """All gradients one after the other, in order of the parameters' names."""
    with Path(file).open("wb") as out:
        for _, parameter in sorted(policy.model.named_parameters()):
            assert parameter.grad is not None
            parameter.grad.detach().float().cpu().numpy().tofile(out)


def cosine(first: str, second: str) -> float:
    """Between two saved gradients, in float64, a part at a time."""
    a, b = (np.memmap(file, np.float32, "r") for file in (first, second))
    sums = np.zeros(3)
    for start in range(0, len(a), 2**22):
        x, y = (part[start : start + 2**22].astype(np.float64) for part in (a, b))
        sums += [x @ y, x @ x, y @ y]
    return float(sums[0] / np.sqrt(sums[1] * sums[2]))


def gemm_speed(size: int = 2048, repeats: int = 6) -> float:
    """FLOP/s of a float32 matrix product: the best of some."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = 0.0
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def one(arguments: argparse.Namespace) -> dict[str, Any]:
    """One engine's step, in this process."""
    torch.set_num_threads(arguments.threads)
    policy = load_policy(arguments.model)
    rows = rows_of(policy, arguments)
    tokens = sum(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    parameters = sum(p.numel() for p in policy.model.parameters())
    before = gemm_speed()
    size = UNIT.get(arguments.objectives, 1)
    if size > 1:
        rows = together(policy, rows, size)
        tokens = sum(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    run = rlzoo if arguments.part == "rlzoo" else trl if size == 1 else trl_loss
    found = run(policy, rows, arguments.objectives, arguments)
    if arguments.gradient and arguments.part == "rlzoo":
        save_gradient(policy, arguments.gradient)
    speed = max(before, gemm_speed())
    per_second = tokens / found["seconds"]
    return {
        "tokens_per_second": per_second,
        "peak_memory_bytes": found["peak_memory_bytes"],
        "gemm_fraction": 6 * parameters * per_second / speed,
    }


def main() -> None:
    """Run every engine on every objective, in turn, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="world:arithmetic/train", help="GSM8K rows, or an embedded world")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--objectives", default=",".join(OBJECTIVES), help="comma-separated: dft, sft, dpo, grpo")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated")
    parser.add_argument("--token-budget", type=int, default=1024)
    parser.add_argument("--trl-batch", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=4, help="rows of the step that is not counted")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--part", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--gradient", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(one(arguments)))
        return
    engines = arguments.engines.split(",")
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for objective in arguments.objectives.split(","):
            apt = [engine for engine in engines if engine != "trl_packed" or objective not in UNIT]
            runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in apt}
            for _ in range(arguments.repeats):
                for engine in apt:
                    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--part", engine]
                    command += ["--objectives", objective, "--gradient", f"{folder}/{engine}"]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        raise SystemExit(f"{engine} failed: {done.stderr.strip().splitlines()[-1]}")
                    runs[engine].append(json.loads(done.stdout.splitlines()[-1]))
                    if not arguments.json:
                        print(objective, engine, runs[engine][-1], flush=True)
            results[objective] = {
                engine: {key: median(run[key] for run in some) for key in some[0]} for engine, some in runs.items()
            }
            if {"rlzoo", "trl_padded"} <= set(engines):
                results[objective]["gradient_cosine"] = cosine(f"{folder}/rlzoo", f"{folder}/trl_padded")
    print(json.dumps(results, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
