"""Sample and evaluate with an engine, alone or as one of several processes, and write what comes out.

The engine is ``transformers``, ``vllm`` (a stand-in in this process) or ``tensor``, the same on two GPUs. The model is
the folder RANKS_MODEL.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeEngine, install

from rlzoo.buffers import OfflineBuffer
from rlzoo.buffers.problems import encode_problems, world_problems
from rlzoo.config import EvaluationSettings, Sampling, Training
from rlzoo.evaluation import evaluate
from rlzoo.jobs.ranks import joined, rank, world_size
from rlzoo.objective import get_objective
from rlzoo.policy import load_policy
from rlzoo.reward.isolation import Limits, isolated
from rlzoo.rollout import Sampler, TransformersSampler, VLLMSampler, collect_rollouts
from rlzoo.rollout.decoding import Decoder
from rlzoo.training import Trainer
from rlzoo.training.batches import BufferSource
from rlzoo.types import Selection

HOW = {"samples": 2, "max_new_tokens": 6, "batch_size": 4}


def counting(sampler: TransformersSampler, found: dict[str, int]) -> TransformersSampler:
    """The sampler, which counts its forward passes and the sequences that it decodes."""
    decoder: Any = sampler.decoder
    decode, next_logits = decoder.decode, decoder._next_logits

    def counted(prompts: Any, copies: int, *rest: Any) -> Any:
        found["sequences"] += len(prompts) * copies
        return decode(prompts, copies, *rest)

    def passed(*arguments: Any) -> Any:
        found["passes"] += 1
        return next_logits(*arguments)

    decoder.decode, decoder._next_logits = counted, passed
    return sampler


def run(folder: Path, engine: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ACCELERATE_USE_FSDP", raising=False)
        plain = load_policy(os.environ["RANKS_MODEL"], "float64", device="cpu")  # an engine's model is whole
    policy = load_policy(os.environ["RANKS_MODEL"], "float64", device="cpu")
    engines: list[FakeEngine] = []
    with pytest.MonkeyPatch.context() as patch:
        decoded = {"passes": 0, "sequences": 0}
        if engine == "transformers":
            patch.setattr(Decoder, "_patience", 4)  # as on a GPU, processes do not ask each other before every token
            sampler: Sampler = counting(TransformersSampler(policy), decoded)
        else:
            engines = install(patch, plain)
            together = {"tensor_parallel_size": 2} if engine == "tensor" else {}
            sampler = VLLMSampler(policy, enable_sleep_mode=True, **together)
        problems = world_problems("facts/test")[:9]
        encoded = encode_problems(policy.tokenizer, problems)
        found: dict[str, Any] = {}
        # scored in this process and, which an engine has no part in, in a process of its own
        for limits in [*([Limits()] if engine == "transformers" else []), Limits(None, None)]:
            reward = isolated(f"{folder / 'reward.py'}:told", limits)
            rows = collect_rollouts(policy, sampler, encoded, reward, Sampling(**HOW), seed=3)
            told = evaluate(policy, problems, reward, EvaluationSettings(**HOW), seed=4, sampler=sampler)
            found[str(limits.seconds)] = {
                "rows": [asdict(row) for row in rows], "metrics": told.metrics, "outcomes": told.outcomes,
            }  # fmt: skip
        buffer = OfflineBuffer.from_trajectories(rows)
        source = BufferSource(buffer, buffer.view(Selection.GROUPS), 4, 0)
        settings = Training(steps=1, dtype="float64", learning_rate=2e-2, warmup_ratio=0.0, checkpoint_seconds=None)
        Trainer(policy, get_objective("grpo", kl_coefficient=0.0), [source], settings).run()
        after = collect_rollouts(policy, sampler, encoded, reward, Sampling(**HOW), seed=3)
        found["after a step"] = [row.completion_ids for row in after]
    found["engine"] = {"prompts": engines[0].prompts, "calls": engines[0].calls} if engines else None
    found["options"] = (
        {k: v for k, v in engines[0].options.items() if "size" in k or "executor" in k} if engines else {}
    )
    found["ranks"], found["decoded"] = world_size(), decoded
    (folder / f"{engine}-{rank()}.json").write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    with joined() if "RANK" in os.environ else nullcontext():
        for engine in sys.argv[2:]:
            run(Path(sys.argv[1]), engine)
