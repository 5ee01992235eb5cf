"""Bytes that a forward pass keeps for the backward pass, per token: what decides how many tokens fit into memory.

    python experiments/benchmarks/activations.py

Qwen2's layers at full width, one and two of them, run on two numbers of tokens on the CPU; what autograd saves is
counted by `torch.autograd.graph.saved_tensors_hooks`, each block of memory once. Weights and their copies in bfloat16
are among it, and the same for any number of tokens: the difference of the differences is what a layer keeps per token.
A model keeps that times its layers; logits come on top.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from typing import Any

import torch

from rlzoo.experiments.benchmarks.random_models import SHAPES, config_of
from rlzoo.training.savings import layers_recomputed

WIDTH = {"70b/8": 8192}
"""The model's own hidden size where the shape has another: over it, the bytes are the same."""
WAYS: dict[str, tuple[torch.dtype, torch.dtype | None, bool]] = {
    "bfloat16-mixed": (torch.float32, torch.bfloat16, False),
    "bfloat16-mixed, recomputed": (torch.float32, torch.bfloat16, True),
    "bfloat16": (torch.bfloat16, None, False),
    "bfloat16, recomputed": (torch.bfloat16, None, True),
    "float32": (torch.float32, None, False),
}
"""The dtype of weights, that of matrix products where it is another, and whether layers are recomputed."""


def kept(shape: str, layers: int, tokens: int, way: str) -> int:
    """Bytes that a forward pass through ``layers`` layers keeps, of one row of ``tokens`` tokens and of weights."""
    from transformers import Qwen2Model

    dtype, compute, recomputed = WAYS[way]
    model = Qwen2Model(config_of(shape, num_hidden_layers=layers, vocab_size=64, attn_implementation="sdpa")).to(dtype)
    blocks: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        blocks[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    ids = torch.randint(64, (1, tokens))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", compute, enabled=compute is not None),
        layers_recomputed(model) if recomputed else nullcontext(),
    ):
        model(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in blocks.values())


def per_layer(shape: str, way: str, tokens: int) -> float:
    """Bytes that one layer keeps per token."""
    two, one = (kept(shape, n, 2 * tokens, way) - kept(shape, n, tokens, way) for n in (2, 1))
    return (two - one) / tokens


def main() -> None:
    """Print a line per shape and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.5b,1.5b,70b/8", help=f"comma-separated: {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=64, help="of the shorter row")
    parser.add_argument("--batch", type=int, default=8192, help="tokens of the micro-batch that totals are given for")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    found = {}
    for shape in arguments.shapes.split(","):
        for way in WAYS:
            share = per_layer(shape, way, arguments.tokens) / SHAPES[shape]["hidden_size"]
            width = WIDTH.get(shape, SHAPES[shape]["hidden_size"])
            total = share * width * SHAPES[shape]["num_hidden_layers"] * arguments.batch / 1e9
            found[f"{shape} {way}"] = {"over_hidden": share, "gigabytes": total}
            if not arguments.json:
                told = f"{share:.1f} · hidden bytes per layer and token, {total:.1f} GB for {arguments.batch:,} tokens"
                print(f"{shape} {way}: {told}", flush=True)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
