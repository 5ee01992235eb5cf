"""What an optimizer step of every objective costs, relative to one of SFT on the same rows.

    python experiments/benchmarks/step_cost.py --out experiments/results/step-cost.json

All built-in objectives, with their defaults, train the embedded model on the same ``--rows`` rows: for some they are
demonstrations, for others pairs, or groups of eight samples of a prompt. Each measures ``--steps`` steps after one that
is not counted, in processor seconds of one thread. There are ``--rounds`` rounds, every second one in reverse order; a
step of SFT is measured before every fourth objective and at the end, and the ratio is to the mean of those before and
after. The result has the median and the quartiles of a round's ratios.

A step is all of `Trainer.run`: the batch, passes without a graph (of snapshots, and of moving or privileged teachers),
forward and backward pass, a critic's included, clipping and AdamW. What is stored in the buffer, the log-probs of the
sampling policy, of the reference and of a fixed teacher, is there beforehand: it is computed once per row, and
``log_probs`` is the cost of that, for as many rows. Composites are left out: their cost is that of their components.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from rlzoo import Policy, get_objective, list_objectives, load_policy
from rlzoo.buffers.problems import demonstrations
from rlzoo.config import Training
from rlzoo.experiments.benchmarks.steps import OPTIONS, RATE, problems_of, together, tokens_of
from rlzoo.inputs import Stage
from rlzoo.objective import Objective, is_composite, objective_class
from rlzoo.policy import Assembler, Models, log_probs
from rlzoo.testing.batches import inputs_of
from rlzoo.testing.engine import SameRows
from rlzoo.training import Trainer
from rlzoo.types import Trajectory, Unit, selector_of

SAMPLES = 8
"""Samples per prompt."""
EVERY = 4
"""SFT is measured once before so many objectives."""


def measured() -> list[str]:
    """The built-in objectives that are measured."""
    found = {name: objective_class(name) for name in list_objectives()}
    return [
        name for name, one in found.items() if one.__module__.startswith("rlzoo.algorithms.") and not is_composite(one)
    ]


def rows_of(policy: Policy, number: int) -> list[Trajectory]:
    """Solutions of the built-in task as samples, `SAMPLES` per prompt, the first and every second after it right."""
    problems = problems_of("world:arithmetic/train", number)
    return together(policy, demonstrations(policy.tokenizer, problems)[:number], SAMPLES)


def units_of(objective: Objective, rows: int) -> list[tuple[int, ...]]:
    """The units in which the objective learns from all rows; the better completion of a pair comes first."""
    size = {Unit.PAIR: 2, Unit.GROUP: SAMPLES, Unit.ROW: 1}[selector_of(objective.learns_from).unit]
    return [tuple(range(start, start + size)) for start in range(0, rows, size)]


def with_stored(policy: Policy, rows: Sequence[Trajectory], objective: Objective) -> list[Trajectory]:
    """The rows with all stored inputs of the objective that can be computed."""
    own = list(rows)
    for one in inputs_of(objective):
        if one.stage is Stage.STORED and any(one.stored(row) is None for row in own):
            values = Assembler(policy, Models.load(policy, [one])).values(one, own)
            pairs = zip(own, values, strict=True)
            own = [replace(row, inputs={**row.inputs, one.column: value.tolist()}) for row, value in pairs]
    return own


def step_seconds(policy: Policy, objective: Objective, rows: Sequence[Trajectory], steps: int) -> float:
    """Processor seconds of a step, the mean over ``steps`` after the first. The policy stays as it is."""
    own = Policy(deepcopy(policy.model), policy.tokenizer, policy.name, policy.compute)
    ends: list[float] = []
    trainer = Trainer(
        own,
        objective,
        SameRows(rows, units_of(objective, len(rows))),
        Training(steps=steps + 1, learning_rate=RATE, checkpoint_seconds=None),
        callbacks=[lambda *_: ends.append(time.process_time())],
    )
    trainer.run()
    return (ends[-1] - ends[0]) / steps


def measure(names: Sequence[str], rows: int, rounds: int, steps: int) -> dict[str, Any]:
    """The costs of the objectives ``names``, and how they were measured."""
    policy = load_policy("embedded", "float32", "cpu")
    shared = rows_of(policy, rows)
    objectives = {name: get_objective(name, **OPTIONS.get(name, {})) for name in ("sft", *names)}
    own = {name: with_stored(policy, shared, objective) for name, objective in objectives.items()}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    sft: list[float] = []
    passes: list[float] = []

    def seconds(name: str) -> float:
        return step_seconds(policy, objectives[name], own[name], steps)

    seconds("sft")  # the first of a process is slow
    for number in range(rounds):
        order = list(names)[:: 1 if number % 2 == 0 else -1]
        before = seconds("sft")
        for start in range(0, len(order), EVERY):
            some = {name: seconds(name) for name in order[start : start + EVERY]}
            after = seconds("sft")
            sft.append(after)
            for name, one in some.items():
                ratios[name].append(one / ((before + after) / 2))
            before = after
        started = time.process_time()
        log_probs(policy, [(row.prompt_ids, row.completion_ids) for row in shared])
        passes.append((time.process_time() - started) / before)
        print(f"round {number + 1} of {rounds} done", file=sys.stderr)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()} CPU, one thread",
        "versions": {"torch": torch.__version__},
        "model": "embedded",
        "vocabulary": len(policy.tokenizer),
        "rows": len(shared),
        "tokens": tokens_of(shared),
        "rounds": rounds,
        "steps": steps,
        "sft_seconds": round(quartiles(sft)[1], 4),
        "log_probs": rounded(passes),
        "relative_to_sft": {name: rounded(some) for name, some in ratios.items()},
    }


def rounded(ratios: Sequence[float]) -> list[float]:
    """The lower quartile, the median and the upper quartile, to three digits."""
    return [round(x, 3) for x in quartiles(ratios)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, median, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return low, median, high


def main() -> None:
    """Measure, print a line per objective, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", help="comma-separated; all that are built in by default")
    parser.add_argument("--rows", type=int, default=64, help=f"a multiple of {SAMPLES}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="measured per objective and round")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    if arguments.rows % SAMPLES:
        parser.error(f"--rows {arguments.rows} is not a multiple of {SAMPLES}")
    torch.set_num_threads(1)
    names = arguments.objectives.split(",") if arguments.objectives else measured()
    found = measure(names, arguments.rows, arguments.rounds, arguments.steps)
    for name, (low, median, high) in found["relative_to_sft"].items():
        print(f"{name:14} {median:5.2f}  [{low:.2f}, {high:.2f}]")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
