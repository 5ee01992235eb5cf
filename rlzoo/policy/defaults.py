"""What ``auto`` stands for: device, dtype and token budget, chosen for the machine and the model."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch

from rlzoo.config import TokenBudget, Training
from rlzoo.errors import UserError
from rlzoo.jobs.memory import free_bytes
from rlzoo.jobs.ranks import gathered, is_sharded
from rlzoo.jobs.restarts import within_limit
from rlzoo.policy import sharding
from rlzoo.policy.head import chunk_rows
from rlzoo.policy.policy import Policy

CPU_TOKENS = 4096
"""The token budget on a CPU."""
LEAST, MOST = 512, 65536
"""Bounds of a token budget; the upper one keeps any GPU busy, whatever its memory."""
SHARE = 0.85
"""The fraction of memory to use, besides weights, gradients and the optimizer: fragmentation and temporaries take the
rest."""
ENGINE_SHARE = 0.3
"""The fraction of a GPU's memory that a vLLM engine in the training process takes."""


def device_of(asked: str | torch.device | None) -> torch.device:
    """The device of a setting; ``auto`` and None: a GPU if there is one. Raises UserError if it does not exist."""
    if asked in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(str(asked))
    except RuntimeError:
        raise UserError(f"unknown device {str(asked)!r}: give auto, cpu, cuda, or one GPU, as in cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UserError(f"device {str(asked)!r}: this process sees {there} GPUs: use auto, or CUDA_VISIBLE_DEVICES")
    return device


def dtype_of(asked: str, device: torch.device) -> str:
    """The dtype of a setting; ``auto``: bfloat16-mixed on a GPU, float32 elsewhere."""
    if asked != "auto":
        return asked
    return "bfloat16-mixed" if device.type == "cuda" else "float32"


def make_deterministic(device: torch.device) -> None:
    """Make a GPU's results bitwise reproducible, without kernels that add in varying order. On a CPU they already are.

    Call this before anything runs on the GPU, because cuBLAS reads its environment variable when it starts.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def token_budget_of(policy: Policy, asked: TokenBudget) -> int:
    """Tokens per micro-batch, padding included; ``auto``: on a GPU as many as fit, and ``auto/4`` a quarter of that.

    At most as many as a restart for lack of memory has left (see `rlzoo.jobs.restarts`).
    (free memory - `bytes_of_training`) / `bytes_per_token`, with a margin; the minimum over all processes.
    """
    if isinstance(asked, int):
        return within_limit("tokens", asked)
    parts = int(asked.partition("/")[2] or 1)
    tokens = CPU_TOKENS
    if policy.device.type == "cuda":
        left = SHARE * (free_bytes(policy.device) - _reserved_for_engine(policy.device) - bytes_of_training(policy))
        tokens = min(gathered(int(min(max(left / bytes_per_token(policy), LEAST), MOST))))  # the same for all
    return within_limit("tokens", max(1, tokens // parts))


def bytes_per_token(policy: Policy) -> float:
    """The activations that a training step keeps for the backward pass, in bytes per token, padding included.

    Per layer, with H, I and K the widths of hidden states, the MLP and all keys: 32 H + 16 I + 8 K in float32, and
    30 H + 8 I + 4 K with matrix products in bfloat16. Counted from the saved tensors of transformers' Qwen2.
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
    """The memory, in bytes, that training allocates besides weights and activations: gradients, the optimizer's two
    moments, weights cast to the dtype of matrix products, and chunks of logits.

    For a sharded model: its shards, and the layers that are gathered at the same time.
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
    """The memory, in bytes, that a vLLM engine may later take in this process."""
    return ENGINE_SHARE * torch.cuda.get_device_properties(device).total_memory if find_spec("vllm") else 0.0


def resolved(policy: Policy, training: Training, engine: str | None = None) -> dict[str, Any]:
    """The values of the ``auto`` settings, for the record of a run."""
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
