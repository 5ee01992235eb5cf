"""What the variance analyzer costs: against ordinary backward passes, a training step, and torch.func.

    python experiments/benchmarks/variance_cost.py --model models/SmolLM2-135M-Instruct --data gsm8k/train.jsonl

Seven objectives on 16 problems: the solutions as demonstrations, and the same 16 solutions as samples of a policy, two
per prompt, one of them rewarded, so that there are right samples, pairs and groups. Each part runs in a process of its
own, the parts in turn, the whole ``--repeats`` times; ratios are of the medians. float32, no dropout, one machine.
Times are in seconds, memory is the peak of the process, in bytes:

- ``ordinary``: one forward pass over all rows, and one backward pass per objective over the rows that it uses;
- ``analyzer``: `rlzoo.analyze_variance` with its defaults, Monte Carlo and all;
- ``step``: one AdamW step of SFT on the 16 demonstrations, for its peak memory;
- ``torch_func``: vmap(grad), the norm of every row and the mean kept, for each objective; ``meter``: the same by rlzoo.

torch.func holds a gradient per row: ``--func-rows`` are taken together, fewer than all where memory forbids that.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from rlzoo import OfflineBuffer, Policy, analyze_variance, get_objective, load_policy
from rlzoo.buffers.problems import demonstrations
from rlzoo.config import Training
from rlzoo.experiments.benchmarks.parts import run_part
from rlzoo.experiments.benchmarks.steps import problems_of
from rlzoo.jobs.memory import release_memory
from rlzoo.policy import Assembler, MicroBatches, Models, Sequences
from rlzoo.policy.microbatches import log_probs, token_batches
from rlzoo.training import train
from rlzoo.training.costs import peak_memory_bytes, reset_peak_memory
from rlzoo.types import Trajectory
from rlzoo.variance.gradients import GradientMeter
from rlzoo.variance.over_data import default_held, portions
from rlzoo.variance.scoring import score
from rlzoo.variance.subjects import subjects_of, weights_of
from rlzoo.variance.tasks import Task

OBJECTIVES = ("sft", "dft", "iw-sft", "rft", "dpo", "ppo", "grpo")
Tasks = dict[str, Task]


def rows_of(policy: Policy, arguments: argparse.Namespace) -> OfflineBuffer:
    """The demonstrations, and the same texts as samples."""
    problems = problems_of(arguments.data, arguments.rows)
    experts = demonstrations(policy.tokenizer, problems, 1024)[: arguments.rows]
    logp = log_probs(policy, [(row.prompt_ids, row.completion_ids) for row in experts], arguments.token_budget)
    samples = []
    for index, row in enumerate(experts):
        prompt = experts[index - index % 2]
        samples.append(
            replace(
                row, prompt=prompt.prompt, prompt_ids=prompt.prompt_ids, prompt_id=f"sampled-{index // 2}",
                source="policy", reward=float(index % 2 == 0), behaviour_logp=logp[index],
            )
        )  # fmt: skip
    return OfflineBuffer.from_trajectories([*experts, *samples])


def tasks_of(policy: Policy, buffer: OfflineBuffer, arguments: argparse.Namespace) -> tuple[list[Trajectory], Tasks]:
    """The rows that are used, and what each objective's gradient is made of."""
    named = {name: get_objective(name) for name in OBJECTIVES}
    picked, subjects, _ = subjects_of(named, buffer, arguments.rows, 0, None)
    rows = [buffer[i] for i in picked]
    statistics = list(dict.fromkeys(one for o in named.values() for one in o.requires if one.is_statistic))
    models = Models(policy, {None: policy})
    assembler = Assembler(policy, models, MicroBatches(arguments.token_budget), remember=True)
    scored = score(assembler, rows, statistics, {}, 0, 0)
    return rows, {name: weights_of(assembler, subjects[name], scored).task for name in named}


def ordinary(policy: Policy, buffer: OfflineBuffer, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a forward pass over all rows, and of each objective's backward pass."""
    rows, tasks = tasks_of(policy, buffer, arguments)
    forward = 0.0
    backward = {}
    policy.train(False)
    for name, task in tasks.items():
        policy.zero_grad(set_to_none=True)
        backward[name] = 0.0
        used = [row for unit in task.units for row in unit]
        for batch in batches([rows[i] for i in used], arguments.token_budget):
            index = [used[i] for i in batch]
            sequences = collate(policy, [rows[i] for i in index])
            loss = (policy(sequences).logp * task.weight[index, : sequences.mask.shape[1]]).sum()
            started = time.perf_counter()
            torch.autograd.backward(loss)
            backward[name] += time.perf_counter() - started
    for batch in batches(rows, arguments.token_budget):
        sequences = collate(policy, [rows[i] for i in batch])
        started = time.perf_counter()
        policy(sequences)
        forward += time.perf_counter() - started
    return {"forward_seconds": forward, "backward_seconds": backward}


def batches(rows: list[Trajectory], token_budget: int) -> list[list[int]]:
    """Micro-batches as training makes them."""
    lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
    return list(token_batches([(i,) for i in range(len(rows))], lengths, token_budget))


def collate(policy: Policy, rows: list[Trajectory]) -> Sequences:
    """Rows as model input."""
    return Sequences.collate([r.prompt_ids for r in rows], [r.completion_ids for r in rows], policy.device)


def analyzer(policy: Policy, buffer: OfflineBuffer, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of the analysis."""
    return measured(
        lambda: analyze_variance(
            policy, OBJECTIVES, buffer, rows=arguments.rows, token_budget=arguments.token_budget, draws=arguments.draws
        )
    )


def step(policy: Policy, buffer: OfflineBuffer, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of a training step."""
    settings = Training(steps=1, batch_size=arguments.rows, token_budget=arguments.token_budget, learning_rate=1e-9)
    return measured(lambda: train(policy, get_objective("sft"), buffer, settings))


def meter(policy: Policy, buffer: OfflineBuffer, arguments: argparse.Namespace) -> dict[str, Any]:
    """The squared gradient norm of every row and the mean gradient of all objectives, by rlzoo."""
    rows, tasks = tasks_of(policy, buffer, arguments)
    singles = {n: replace(t, units=[(row,) for unit in t.units for row in unit]) for n, t in tasks.items()}
    made = GradientMeter(policy)

    def run() -> None:
        for names in portions(OBJECTIVES, None, default_held(policy.parameters(), len(OBJECTIVES))):
            made.measure(rows, {name: singles[name] for name in names}, arguments.token_budget)

    return measured(run)


def torch_func(policy: Policy, buffer: OfflineBuffer, arguments: argparse.Namespace) -> dict[str, Any]:
    """The same by torch.func: one gradient per row, over padded rows of like length."""
    from torch.func import functional_call, grad, vmap

    rows, tasks = tasks_of(policy, buffer, arguments)
    policy.model.eval()
    parameters = {name: p.detach() for name, p in policy.model.named_parameters()}

    def loss(p: dict[str, torch.Tensor], ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = functional_call(policy.model, p, (ids[None],), {"use_cache": False}).logits[0]
        logp = logits.gather(1, ids.roll(-1)[:, None])[:, 0] - logits.logsumexp(1)
        total: torch.Tensor = (logp * weight).sum()
        return total

    def run() -> None:
        for task in tasks.values():
            mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
            squares = []
            used = sorted((row for unit in task.units for row in unit), key=lambda i: len(rows[i].completion_ids))
            for start in range(0, len(used), arguments.func_rows):
                index = used[start : start + arguments.func_rows]
                sequences = collate(policy, [rows[i] for i in index])
                weight = torch.zeros(sequences.ids.shape)
                weight[sequences.predicts] = task.weight[index, : sequences.mask.shape[1]][sequences.mask]
                found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, sequences.ids, weight)
                squares.append(sum(g.flatten(1).square().sum(1) for g in found.values()))
                for name, g in found.items():
                    mean[name] += g.sum(0)

    return measured(run)


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """Seconds and peak memory of the work."""
    release_memory()
    reset_peak_memory()
    started = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory_bytes()}


PARTS: dict[str, Callable[[Policy, OfflineBuffer, argparse.Namespace], dict[str, Any]]] = {
    "ordinary": ordinary,
    "analyzer": analyzer,
    "step": step,
    "torch_func": torch_func,
    "meter": meter,
}


def main() -> None:
    """Run every part in processes of their own, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="world:arithmetic/train", help="a file in GSM8K's format, or a built-in task")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--draws", type=int, default=4096)
    parser.add_argument("--token-budget", type=int, default=1024)
    parser.add_argument("--func-rows", type=int, default=16, help="rows that torch.func takes together")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        torch.set_num_threads(arguments.threads)
        policy = load_policy(arguments.model)
        buffer = rows_of(policy, arguments)
        print(json.dumps(PARTS[arguments.part](policy, buffer, arguments)))
        return
    runs: dict[str, list[Any]] = {part: [] for part in PARTS}
    for _ in range(arguments.repeats):
        for part in PARTS:
            runs[part].append(run_part(__file__, part, *sys.argv[1:]))
            if not arguments.json:
                print(part, runs[part][-1], flush=True)
    seconds, memory = (
        {part: median(run[key] for run in some) for part, some in runs.items() if part != "ordinary"}
        for key in ("seconds", "peak_memory_bytes")
    )
    forward = median(run["forward_seconds"] for run in runs["ordinary"])
    backward = median(sum(run["backward_seconds"].values()) for run in runs["ordinary"])
    found = {
        "seconds": {**seconds, "ordinary_forward": forward, "ordinary_backwards": backward},
        "peak_memory_bytes": memory,
        "time_over_ordinary": seconds["analyzer"] / (forward + 2 * backward),
        "memory_over_step": memory["analyzer"] / memory["step"],
        "torch_func_over_meter": seconds["torch_func"] / seconds["meter"],
    }
    print(json.dumps(found, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
