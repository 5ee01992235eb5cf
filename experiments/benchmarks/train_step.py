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

Tokens per second count prompt and completion, without padding. The GEMM fraction is 6 · parameters · tokens / time over
the speed of a float32 matrix product timed beside it. ``gradient_cosine`` is between rlzoo's gradient and that of
``trl_padded``: the same loss over the same completion tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlzoo import Policy, get_objective, load_policy
from rlzoo.buffers.problems import demonstrations
from rlzoo.config import Training
from rlzoo.experiments.benchmarks.parts import medians, run_part
from rlzoo.experiments.benchmarks.steps import (
    RATE,
    UNIT,
    Watch,
    gemm_speed,
    problems_of,
    together,
    tokens_of,
    trl_loss_steps,
    trl_sft_steps,
    with_trl_head,
)
from rlzoo.training import Trainer
from rlzoo.types import Trajectory

ENGINES = ("rlzoo", "trl_padded", "trl_packed")
OBJECTIVES = ("dft", "sft", "dpo", "grpo")


def rows_of(policy: Policy, arguments: argparse.Namespace) -> list[Trajectory]:
    """The first demonstrations."""
    problems = problems_of(arguments.data, arguments.rows)
    return demonstrations(policy.tokenizer, problems, 1024)[: arguments.rows]


class Whole:
    """Every row in every batch, ``size`` rows per unit."""

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
    watch = Watch()
    watch.begin()
    trainer.run()
    watch.end()
    return costs_of(watch)


def trl(policy: Policy, rows: list[Trajectory], objective: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same of TRL: its SFTTrainer, or the loss of its trainer for this objective in a plain loop."""

    def run(some: list[Trajectory], watch: Watch) -> None:
        batch = arguments.trl_batch
        if objective in UNIT:
            trl_loss_steps(policy, some, objective, watch, batch=batch)
        else:
            packed, length = arguments.part == "trl_packed", arguments.token_budget
            trl_sft_steps(policy, some, objective, watch, batch=batch, length=length, packed=packed)

    if objective in UNIT:
        with_trl_head(policy)
    watch = Watch(partial(save_gradient, policy, arguments.gradient) if arguments.gradient else None)
    run(rows[: arguments.warm_up], Watch())
    run(rows, watch)
    return costs_of(watch)


def costs_of(watch: Watch) -> dict[str, Any]:
    """What the last step took."""
    return {
        "seconds": watch.seconds[-1],
        "cpu_seconds": watch.cpu_seconds[-1],
        "peak_memory_bytes": watch.peaks[-1],
    }


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


def one(arguments: argparse.Namespace) -> dict[str, Any]:
    """One engine's step, in this process."""
    torch.set_num_threads(arguments.threads)
    policy = load_policy(arguments.model)
    rows = rows_of(policy, arguments)
    parameters = sum(p.numel() for p in policy.model.parameters())
    before = gemm_speed() if arguments.gemm else 0.0
    size = UNIT.get(arguments.objectives, 1)
    if size > 1:
        rows = together(policy, rows, size)
    run = rlzoo if arguments.part == "rlzoo" else trl
    found = run(policy, rows, arguments.objectives, arguments)
    if arguments.gradient and arguments.part == "rlzoo":
        save_gradient(policy, arguments.gradient)
    per_second = tokens_of(rows) / found["seconds"]
    return {
        "tokens_per_second": per_second,
        "tokens_per_cpu_second": tokens_of(rows) / found["cpu_seconds"],
        "peak_memory_bytes": found["peak_memory_bytes"],
        **({"gemm_fraction": 6 * parameters * per_second / max(before, gemm_speed())} if arguments.gemm else {}),
    }


def main() -> None:
    """Run every engine on every objective, in turn, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="world:arithmetic/train", help="a file in GSM8K's format, or a built-in task")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--objectives", default=",".join(OBJECTIVES), help="comma-separated: dft, sft, dpo, grpo")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated")
    parser.add_argument("--token-budget", type=int, default=1024)
    parser.add_argument("--trl-batch", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=4, help="rows of the step that is not counted")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--gemm", action=argparse.BooleanOptionalAction, default=True, help="time matrix products as well"
    )
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
                    own = ["--objectives", objective, "--gradient", f"{folder}/{engine}"]
                    runs[engine].append(run_part(__file__, engine, *sys.argv[1:], *own))
                    if not arguments.json:
                        print(objective, engine, runs[engine][-1], flush=True)
            results[objective] = {engine: medians(some) for engine, some in runs.items()}
            if {"rlzoo", "trl_padded"} <= set(engines):
                results[objective]["gradient_cosine"] = cosine(f"{folder}/rlzoo", f"{folder}/trl_padded")
    print(json.dumps(results, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
