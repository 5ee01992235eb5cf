"""Train some steps of each objective in float64, alone or as one of several processes, and write what comes out.

RANKS_MODEL is the folder of the model. With RANKS_CHECKPOINTS, a folder, a run resumes there; with RANKS_STOP, a
number, it stops in that step, and with RANKS_KILL a process other than the main one is killed in it, once the
checkpoint of the step before is whole.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from rlzoo.config import Sampling, Training
from rlzoo.jobs.ranks import is_main, is_sharded, joined, rank, world_size
from rlzoo.objective import get_objective
from rlzoo.policy import Policy, load_policy
from rlzoo.policy.loading import save_policy
from rlzoo.policy.microbatches import log_probs
from rlzoo.policy.sequences import Sequences
from rlzoo.rollout import TransformersSampler
from rlzoo.training import Trainer
from rlzoo.types import Selection, Trajectory

# small micro-batches, so that processes have uneven shares of them, and clipping, so that a norm matters
SETTINGS = Training(
    steps=3, learning_rate=1e-3, token_budget=48, max_gradient_norm=0.5, dtype="float64", checkpoint_seconds=0
)
EMA = ("iw-sft", {"variant": "ema", "ema_decay": 0.5})
LORA = {"lora": {"rank": 2}}
OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "iw-sft-ema": (*EMA, {}),
    "iw-sft-ema-lora": (*EMA, LORA),
    "kto-lora": ("kto", {}, LORA),
    "dft-packed": ("dft", {}, {"packing": "packed", "gradient_checkpointing": True}),
    "kto-hungry": ("kto", {}, {}),
    "ppo-compiled": ("ppo", {}, {"compile": True}),
    "grpo-budget": ("grpo", {}, {"steps": 9, "budget": {"flops": 5e7}}),
}
"""Objective, options and settings of the names that are not an objective's."""
ROOM = 40
"""The tokens that fit into the memory of process 1, for a hungry objective."""


def hungry(policy: Policy) -> None:
    """Have the policy run out of memory in process 1 alone."""
    forward = policy.forward

    def limited(sequences: Sequences | None = None, **options: Any) -> Any:
        if rank() == 1 and sequences is not None and sequences.ids.numel() > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(sequences, **options)

    policy.forward = limited  # type: ignore[method-assign]


def rows() -> list[Trajectory]:
    """Ten rows of very uneven lengths, in pairs of one prompt, of which the last has equal rewards."""
    rng = random.Random(0)
    made = []
    for i in range(10):
        prompt = [10 + i // 2] * (1 + i // 2)
        completion = [rng.randrange(3, 60) for _ in range(1 + (7 * i) % 23)]
        near = [rng.gauss(-3, 1) for _ in completion]
        made.append(
            Trajectory("", "", prompt, completion, str(i // 2), source="policy", reward=float(i % 2 or i == 8),
                       behaviour_logp=near, reference_logp=near)
        )  # fmt: skip
    return made


class Fixed:
    """The same batch at every draw."""

    def __init__(self, pairs: bool) -> None:
        self.pairs = pairs

    def draw(self) -> tuple[list[Trajectory], list[tuple[int, ...]]]:
        some = rows()
        if self.pairs:
            return some, [(i + 1, i) for i in range(0, len(some), 2)]
        return some, [(i,) for i in range(len(some))]

    def state(self) -> None:
        """There is none."""

    def restore(self, state: None) -> None:
        """There is none."""


def run(folder: Path, name: str) -> None:
    torch.manual_seed(0)
    policy = load_policy(os.environ["RANKS_MODEL"], "float64", device="cpu")
    parts = name.split("+")  # the critic's part first: its gradients are none of those that come last
    kind, options, update = OPTIONS.get(name, (name, {}, {}))
    torch.manual_seed(rank())  # adapters are drawn at random: all take those of the main process
    if name.endswith("hungry"):
        hungry(policy)
    weights = dict.fromkeys(parts, 0.5)
    objective = get_objective("mixture", weights=weights) if len(parts) > 1 else get_objective(kind, **options)
    together = [
        component.objective.learns_from in (Selection.PAIRS, Selection.GROUPS) for component in objective.components
    ]
    settings = Training.model_validate({**SETTINGS.model_dump(), **update})
    checkpoints = Path(os.environ["RANKS_CHECKPOINTS"]) / name if "RANKS_CHECKPOINTS" in os.environ else None
    versions: list[int] = []

    def written(step: int) -> None:
        """Wait for the checkpoint of a step, which a thread writes."""
        parts = [f"step-{step:08d}.result", *([f"step-{step:08d}/rank-1.result"] if is_sharded(policy) else [])]
        while checkpoints is not None and not all((checkpoints / part).exists() for part in parts):
            time.sleep(0.01)

    def stop(trainer: Trainer, step: int) -> None:
        versions.append(policy.weights_version)
        if step == int(os.environ.get("RANKS_STOP", "0")):
            written(step - 1)
            raise StopIteration
        if checkpoints is not None and step == int(os.environ.get("RANKS_KILL", "0")) and rank() == 1:
            written(step - 1)
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = Trainer(
        policy, objective, [Fixed(pairs) for pairs in together], settings, [stop], checkpoints=checkpoints
    )
    if trainer.checkpoints is not None and "RANKS_STOP" in os.environ:
        cached, write = trainer.checkpoints._cached, trainer.checkpoints._cached.write

        def late(name: str, state: Any) -> Any:
            """Write a step's checkpoint only once the next step is over: what it holds must not have changed."""
            while len(trainer.record.steps) <= int(name.removeprefix("step-")):
                time.sleep(0.01)
            return write(name, state)

        cached.write = late  # type: ignore[method-assign,assignment]
    started = trainer.step
    try:
        record = trainer.run()
    except StopIteration:
        return
    prompts = [row.prompt_ids for row in rows()]
    samples = TransformersSampler(policy).sample(prompts, Sampling(samples=2, max_new_tokens=6), seed=3)
    told = {
        "started": started,
        "steps": record.steps,
        "events": record.events,
        "budget": trainer.micro.token_budget,
        "costs": record.costs.as_dict(),
        "sampled": [[s.ids for s in row] for row in samples],
        "scored": log_probs(
            policy, [(row.prompt_ids, row.completion_ids) for row in rows()], trainer.micro.token_budget
        ),
        "ranks": world_size(),
        "sharded": is_sharded(policy),
        "compiled": policy.compiles,
        "versions": versions,
    }
    versions.append(policy.weights_version)
    save_policy(policy, folder / name)
    if is_main():
        (folder / f"{name}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    with joined() if "RANK" in os.environ else nullcontext():
        for objective in sys.argv[2:]:
            run(Path(sys.argv[1]), objective)
