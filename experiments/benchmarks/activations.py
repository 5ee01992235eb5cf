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
from typing import Any

import torch

from rlzoo.experiments.benchmarks.random_models import SHAPES, config_of


def kept(shape: str, layers: int, tokens: int, compute: torch.dtype | None) -> int:
    """Bytes that so many layers keep of a row of so many tokens, and of weights."""
    from transformers import Qwen2Model

    model = Qwen2Model(config_of(shape, num_hidden_layers=layers, vocab_size=64, attn_implementation="sdpa"))
    blocks: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        blocks[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    ids = torch.randint(64, (1, tokens))
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", compute, enabled=compute is not None),
    ):
        out = model(input_ids=ids, use_cache=False).last_hidden_state  # held: the hooks alone keep no graph alive
    del out
    return sum(storage.nbytes() for storage in blocks.values())


def per_layer(shape: str, compute: torch.dtype | None, tokens: int) -> float:
    """Bytes that one layer keeps per token."""
    two, one = (kept(shape, n, 2 * tokens, compute) - kept(shape, n, tokens, compute) for n in (2, 1))
    return (two - one) / tokens


def main() -> None:
    """Print a line per shape and dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.5b,1.5b", help=f"comma-separated: {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=64, help="of the shorter row")
    parser.add_argument("--batch", type=int, default=8192, help="tokens of the micro-batch that totals are given for")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    found = {}
    for shape in arguments.shapes.split(","):
        hidden, layers = (SHAPES[shape][key] for key in ("hidden_size", "num_hidden_layers"))
        for dtype, compute in (("bfloat16-mixed", torch.bfloat16), ("float32", None)):
            own = per_layer(shape, compute, arguments.tokens)
            values = {
                "bytes_per_layer_and_token": own,
                "over_hidden": own / hidden,
                "gigabytes": own * layers * arguments.batch / 1e9,
            }
            found[f"{shape} {dtype}"] = values
            if not arguments.json:
                print(
                    f"{shape} {dtype}: {own / hidden:.1f} · hidden bytes per layer and token, "
                    f"{values['gigabytes']:.1f} GB for {arguments.batch:,} tokens"
                )
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
