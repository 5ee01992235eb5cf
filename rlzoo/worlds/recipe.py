"""The training of the built-in base model: ``python -m rlzoo.worlds.recipe --out DIR`` repeats it.

A Llama of 0.9 M parameters learns to answer questions of both built-in tasks from deliberately noisy data: each
intermediate result of a chain sum is wrong with probability 0.12 and carried forward, and a fact has its correct answer
only some of the time. The base model therefore samples correct answers sometimes but not reliably, like a pre-trained
model before fine-tuning. ``--save-at 400,800`` also writes the models after so many steps, to DIR/step-400 and
DIR/step-800.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from rlzoo.errors import UserError
from rlzoo.worlds import arithmetic, facts
from rlzoo.worlds.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

STEPS, BATCH, PEAK_RATE, SLIP_RATE, FACT_SHARE, SEED = 3200, 128, 2e-3, 0.12, 0.15, 0


def _example(rng: random.Random, known: Sequence[facts.Fact]) -> tuple[str, str]:
    if rng.random() < FACT_SHARE:
        fact = rng.choice(known)
        return fact.question(rng.randrange(3)), facts.believe(fact, rng)
    problem = arithmetic.draw(rng, rng.choice((2, 3, 3, 4)), rng.choice((9, 20, 99, 99)))
    return problem.question, arithmetic.solve(problem, rng.choice(arithmetic.STYLES), rng, SLIP_RATE)


def train_base(out: Path, steps: int = STEPS, save_at: Collection[int] = ()) -> None:
    """Train the base model from scratch, and write it to ``out`` in half precision (about 1.8 MB).

    The models after each number of steps in ``save_at`` are written to ``out``/step-N; the final one does not depend on
    that. Raises FloatingPointError if the loss becomes infinite or NaN, and UserError for a step to save at that is not
    among the steps.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if outside := [step for step in save_at if not 0 < step <= steps]:
        raise UserError(f"--save-at {outside[0]}: training has the steps 1 to {steps}")
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    known = facts.facts()
    started, step = time.perf_counter(), 0
    while step < steps:
        pool = []
        for _ in range(16 * BATCH):
            question, answer = _example(rng, known)
            prompt = tokenizer.encode(question)
            completion = [*tokenizer.encode(answer), tokenizer.eos_token_id]
            pool.append((prompt + completion, len(prompt)))
        pool.sort(key=lambda row: len(row[0]))  # batches of similar length need little padding
        batches = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        rng.shuffle(batches)
        for batch in batches[: steps - step]:
            longest = max(len(ids) for ids, _ in batch)
            ids = torch.full((BATCH, longest), tokenizer.pad_token_id)
            labels = torch.full((BATCH, longest), -100)
            for row, (tokens, start) in enumerate(batch):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
            rate = PEAK_RATE * min(1.0, (step + 1) / 100) * (1 - step / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            logits = model(input_ids=ids).logits[:, :-1]  # right padding under causal attention needs no mask
            loss = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 100 == 0 or step == steps:
                seconds = time.perf_counter() - started
                print(f"step {step}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"loss is {loss.item()} at step {step}")
            if step in save_at:
                _write(copy.deepcopy(model), tokenizer, out / f"step-{step}")
    _write(model, tokenizer, out)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def whole_numbers(text: str) -> list[int]:
    """The numbers in a text such as ``400,800``."""
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--save-at", type=whole_numbers, default=[], metavar="STEPS")
    arguments = parser.parse_args()
    try:
        train_base(arguments.out, arguments.steps, arguments.save_at)
    except UserError as error:
        parser.error(str(error))
