"""What one of several processes finds of a sharded model, as JSON in a folder: ``sharding_worker.py FOLDER MODEL…``."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rlzoo import analyze_variance
from rlzoo.buffers import OfflineBuffer
from rlzoo.errors import UserError
from rlzoo.inputs import Critic
from rlzoo.jobs.ranks import joined, rank
from rlzoo.policy import MicroBatches, Policy, load_policy, log_probs, sharding
from rlzoo.policy.defaults import bytes_of_training
from rlzoo.policy.sequences import Row
from rlzoo.types import Trajectory

ROWS = [([5, 6], [7, 8, 9]), ([10], [11, 3]), ([4, 4, 4], [12])]


def critic_of(policy: Policy) -> list[list[float]]:
    """The values of a new critic on a trunk of its own, and after its head sums hidden states."""
    policy.attach([Critic()])
    found = []
    for weight in (0.0, 1.0):
        with torch.no_grad():
            policy.modules_of_inputs["value"].head.weight.add_(weight)  # type: ignore[union-attr, operator]
        values = MicroBatches(8192).log_probs(policy, [Row(*row) for row in ROWS])["value"]
        found.append(values.flatten().tolist())
    return found


def found_in(policy: Policy) -> dict[str, Any]:
    """What must not depend on how the weights are held."""
    return {
        "logp": log_probs(policy, ROWS),
        "buffers": {name: value.tolist() for name, value in policy.model.named_buffers()},
        "critic": critic_of(policy),
    }


def held(policy: Policy) -> int:
    """Weights that this process holds."""
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in policy.model.parameters())


def digest(weight: torch.Tensor) -> str:
    """Of a weight's shape and bits: a list of a million numbers takes seconds to write and read."""
    return f"{tuple(weight.shape)} {hashlib.sha256(weight.detach().contiguous().numpy().tobytes()).hexdigest()}"


def dtypes(policy: Policy) -> dict[str, str]:
    return {name: str(parameter.dtype) for name, parameter in policy.model.named_parameters()}


def refusal(policy: Policy) -> str:
    """What cannot be done with a sharded model."""
    buffer = OfflineBuffer.from_trajectories([Trajectory("", "", [5], [6], "0")])
    try:
        analyze_variance(policy, ["sft"], buffer)
    except UserError as error:
        return str(error)
    return ""


def look(name: str) -> dict[str, Any]:
    read: list[str] = []
    plain = PreTrainedModel.from_pretrained.__func__

    def spied(cls: type, where: Any, *args: Any, **options: Any) -> Any:
        read.append(str(where))
        return plain(cls, where, *args, **options)

    PreTrainedModel.from_pretrained = classmethod(spied)
    try:
        policy = load_policy(name, "float32", "cpu")
        reads, training = len(read), bytes_of_training(policy)
        found = found_in(policy)
        mixed, teacher = (load_policy(name, "bfloat16-mixed", "cpu", frozen=frozen) for frozen in (False, True))
    finally:
        PreTrainedModel.from_pretrained = classmethod(plain)
    models = {"policy": mixed, "reference": mixed.reference(), "teacher": teacher, "moving": mixed.frozen_copy(True)}
    whole = sharding.whole_weights(policy.model)
    return {
        **found,
        "reads": reads,
        "refused": refusal(policy),
        "held": held(policy),
        "training": training,
        "together": sharding.gathered_together(policy.model),
        "in all": sum(p.numel() for p in policy.model.parameters()),
        "tied": policy.model.get_input_embeddings().weight is policy.model.get_output_embeddings().weight,
        "mixed": {key: log_probs(model, ROWS) for key, model in models.items()},
        "dtypes": {key: dtypes(model) for key, model in models.items()},
        "shards": {key: held(model) for key, model in models.items()},
        "weights": {key: digest(value) for key, value in whole.items()},
    }


if __name__ == "__main__":
    with joined():
        told = {name: look(name) for name in sys.argv[2:]}
        (Path(sys.argv[1]) / f"found-{rank()}.json").write_text(json.dumps(told))
