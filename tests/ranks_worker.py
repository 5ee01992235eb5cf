"""Train some steps of each objective in float64, alone or as one of several processes, and write what comes out.

With RANKS_CHECKPOINTS, a folder, a run resumes there; with RANKS_STOP, a number, it stops in that step.
"""

from __future__ import annotations

import json
import os
import random
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from rlzoo.config import Sampling, Training
from rlzoo.jobs.ranks import is_main, is_sharded, joined, world_size
from rlzoo.objective import get_objective
from rlzoo.policy import load_policy
from rlzoo.policy.loading import save_policy
from rlzoo.policy.microbatches import log_probs
from rlzoo.rollout import TransformersSampler
from rlzoo.training import Trainer
from rlzoo.types import Selection, Trajectory

# small micro-batches, so that processes have uneven shares of them, and clipping, so that a norm matters
SETTINGS = Training(
    steps=3, learning_rate=1e-3, token_budget=48, max_gradient_norm=0.5, dtype="float64", checkpoint_seconds=0
)
OPTIONS = {"iw-sft-ema": ("iw-sft", {"variant": "ema", "ema_decay": 0.5})}


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


def shard_on_cpu() -> None:
    """Have Accelerate shard models (FSDP2), which it does of itself on GPUs alone."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )  # fmt: skip
    PartialState._shared_state.update(distributed_type=DistributedType.FSDP)
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)


def run(folder: Path, name: str) -> None:
    torch.manual_seed(0)
    policy = load_policy("embedded", "float64", device="cpu")
    parts = name.split("+")  # the critic's part first: its gradients are none of those that come last
    kind, options = OPTIONS.get(name, (name, {}))
    weights = dict.fromkeys(parts, 0.5)
    objective = get_objective("mixture", weights=weights) if len(parts) > 1 else get_objective(kind, **options)
    together = [
        component.objective.learns_from in (Selection.PAIRS, Selection.GROUPS) for component in objective.components
    ]
    checkpoints = Path(os.environ["RANKS_CHECKPOINTS"]) / name if "RANKS_CHECKPOINTS" in os.environ else None
    versions: list[int] = []

    def stop(trainer: Trainer, step: int) -> None:
        versions.append(policy.weights_version)
        if step == int(os.environ.get("RANKS_STOP", "0")):
            raise StopIteration

    trainer = Trainer(
        policy, objective, [Fixed(pairs) for pairs in together], SETTINGS, [stop], checkpoints=checkpoints
    )
    try:
        record = trainer.run()
    except StopIteration:
        return
    prompts = [row.prompt_ids for row in rows()]
    samples = TransformersSampler(policy).sample(prompts, Sampling(samples=2, max_new_tokens=6), seed=3)
    told = {
        "steps": record.steps,
        "costs": record.costs.as_dict(),
        "sampled": [[s.ids for s in row] for row in samples],
        "scored": log_probs(policy, [(row.prompt_ids, row.completion_ids) for row in rows()]),
        "ranks": world_size(),
        "sharded": is_sharded(policy),
        "versions": versions,
    }
    versions.append(policy.weights_version)
    save_policy(policy, folder / name)
    if is_main():
        (folder / f"{name}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    with joined() if "RANK" in os.environ else nullcontext():
        if os.environ.get("RANKS_SHARD"):
            shard_on_cpu()
        for objective in sys.argv[2:]:
            run(Path(sys.argv[1]), objective)
