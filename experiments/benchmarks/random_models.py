"""Models of Qwen2's shapes with random weights, and random rows for them: nothing has to be downloaded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from rlzoo.types import Trajectory
from rlzoo.worlds.tokenizer import build_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 512,
    },
    "small": {
        "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "intermediate_size": 704, "vocab_size": 4096,
    },
    "0.5b": {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151936,
    },
    "1.5b": {
        "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8960, "vocab_size": 151936,
    },
    "70b/8": {
        "hidden_size": 1024, "num_hidden_layers": 80, "num_attention_heads": 8, "num_key_value_heads": 1,
        "intermediate_size": 3584, "vocab_size": 128256,
    },
}  # fmt: skip
"""Among them Qwen2.5-0.5B and Qwen2.5-Math-1.5B, and Llama's 70B at an eighth of its width."""
LENGTHS = {"tiny": (12, 48)}
"""Shortest and longest rows where they are not of `USUAL`."""
USUAL = (128, 1024)


def config_of(shape: str, **changes: Any) -> Any:
    """The configuration of a shape."""
    from transformers import Qwen2Config

    return Qwen2Config(**{**SHAPES[shape], "tie_word_embeddings": True, "max_position_embeddings": 4096, **changes})


def random_model(shape: str, folder: Path, device: str, spread: float = 0.02, seed: int = 0) -> str:
    """Write such a model with the embedded tokenizer to a folder, in bfloat16, and give back its name.

    ``spread`` is the standard deviation of its weights: of a large one, some next tokens are far likelier than others.
    """
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = config_of(shape, initializer_range=spread, eos_token_id=tokenizer.eos_token_id)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def random_rows(shape: str, number: int, together: int = 1, seed: int = 0) -> list[Trajectory]:
    """Demonstrations of random tokens, lengths log-uniform in `USUAL`, a fifth to two fifths of it prompt.

    ``together`` rows in a row have one prompt.
    """
    chance = random.Random(seed)
    shortest, longest = LENGTHS.get(shape, USUAL)
    rows: list[Trajectory] = []
    for number_of_row in range(number):
        length = round(shortest * (longest / shortest) ** chance.random())
        prompt = round(length * chance.uniform(0.2, 0.4))
        # ids 0 to 2 are the tokenizer's special tokens
        ids = [chance.randrange(3, SHAPES[shape]["vocab_size"]) for _ in range(length)]
        own = ids[:prompt] if number_of_row % together == 0 else rows[-1].prompt_ids
        rows.append(Trajectory("", "", own, ids[prompt:], str(number_of_row // together)))
    return rows
