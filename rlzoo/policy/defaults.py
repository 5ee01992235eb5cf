"""What ``auto`` stands for: the device, the dtype and the token budget that the machine and the model suggest."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch

from rlzoo.config import TokenBudget, Training
from rlzoo.errors import UserError
from rlzoo.jobs.memory import free_bytes
from rlzoo.jobs.ranks import gathered, is_sharded
from rlzoo.policy import sharding
from rlzoo.policy.head import chunk_rows
from rlzoo.policy.policy import Policy

CPU_TOKENS = 4096
"""The token budget where memory is no question of a GPU's."""
LEAST, MOST = 512, 65536
"""Bounds of a token budget: a GPU is busy with the latter, whatever its memory."""
SHARE = 0.85
"""Of what is free after weights, gradients and the optimizer; the rest is for fragments and short-lived tensors."""
ENGINE_SHARE = 0.3
"""Of a GPU's memory that vLLM's engine takes, next to training in the same process."""


def device_of(asked: str | torch.device | None) -> torch.device:
    """The device that is meant; ``auto`` and None: a GPU where there is one. Raises UserError for one that is not."""
    if asked in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(str(asked))
    except RuntimeError:
        raise UserError(
            f"device {str(asked)!r} is none: give auto, cpu, cuda, or a GPU's number as in cuda:1"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UserError(f"device {str(asked)!r}: this process sees {there} GPUs: use auto, or CUDA_VISIBLE_DEVICES")
    return device


def dtype_of(asked: str, device: torch.device) -> str:
    """The dtype that is meant; ``auto``: bfloat16-mixed on a GPU, float32 elsewhere."""
    if asked != "auto":
        return asked
    return "bfloat16-mixed" if device.type == "cuda" else "float32"


def make_deterministic(device: torch.device) -> None:
    """Have a GPU give the same bits every time: no kernel that adds in any order. A CPU does so anyway.

    cuBLAS reads its variable when it starts, so this comes before anything runs on the GPU.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def token_budget_of(policy: Policy, asked: TokenBudget) -> int:
    """Tokens per micro-batch, padding included; ``auto``: on a GPU as many as fit, and ``auto/4`` a fourth of them.

    What fits is what is free, less what training will allocate for all parameters, over `bytes_per_token`.
    """
    if isinstance(asked, int):
        return asked
    parts = int(asked.partition("/")[2] or 1)
    tokens = CPU_TOKENS
    if policy.device.type == "cuda":
        left = SHARE * (free_bytes(policy.device) - _reserved_for_engine(policy.device) - bytes_of_training(policy))
        tokens = min(gathered(int(min(max(left / bytes_per_token(policy), LEAST), MOST))))  # all share one batch
    return max(1, tokens // parts)


def bytes_per_token(policy: Policy) -> float:
    """What a training step keeps of each padded token until its backward pass, in bytes.

    By layer, with H, I and K the sizes of hidden states, of the MLP and of all keys: 32 H + 16 I + 8 K in float32, and
    30 H + 8 I + 4 K where matrices are multiplied in bfloat16. Counted of saved tensors of transformers' Qwen2.
    """
    config = policy.model.config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    size = getattr(config, "head_dim", None) or hidden // heads
    keys = size * (getattr(config, "num_key_value_heads", None) or heads)
    mixed = policy.compute is not None or policy.model.dtype in (torch.bfloat16, torch.float16)
    wide = policy.model.dtype.itemsize / 4 if not mixed else 1.0
    per_layer = 30 * hidden + 8 * inner + 4 * keys if mixed else wide * (32 * hidden + 16 * inner + 8 * keys)
    return float(config.num_hidden_layers * per_layer + 11 * wide * hidden)


def bytes_of_training(policy: Policy) -> float:
    """What training will allocate beside the weights and what follows the tokens: gradients and the optimizer's two
    moments, weights in the dtype of matrix products, and chunks of logits.

    Of a sharded model the shards, and what is whole at a time.
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]
    found = sum(3 * sharding.held(p) * p.element_size() for p in parameters if p.grad is None)
    together = sum(p.numel() for p in policy.parameters())
    if is_sharded(policy.model):
        together = sharding.gathered_together(policy.model)
        found += together * policy.model.dtype.itemsize
    if policy.compute is not None:
        found += together * policy.compute.itemsize
    return found + 3 * 4 * policy.vocabulary * chunk_rows(policy.vocabulary, policy.device)


def _reserved_for_engine(device: torch.device) -> float:
    """Memory that an engine in this process may yet ask for."""
    return ENGINE_SHARE * torch.cuda.get_device_properties(device).total_memory if find_spec("vllm") else 0.0


def resolved(policy: Policy, training: Training, engine: str | None = None) -> dict[str, Any]:
    """What became of all that was ``auto``, for the record of a run."""
    device = policy.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else device.type
    dtype = str(policy.model.dtype).removeprefix("torch.")
    mixed = "" if policy.compute is None else f"{str(policy.compute).removeprefix('torch.')}-mixed"
    return {
        "device": name,
        "dtype": mixed or dtype,
        "token_budget": token_budget_of(policy, training.token_budget),
        "packing": "packed" if policy.packs else "padded",
        "compile": policy.compiles,
        **({} if engine is None else {"engine": engine}),
    }
