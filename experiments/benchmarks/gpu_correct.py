"""What a GPU computes against what a CPU computes in float64: the parts of gpu_check.py that prove numbers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from rlzoo import OfflineBuffer, Policy, compare, get_objective, list_objectives, load_policy, train
from rlzoo.config import Sampling, Training, load_experiment
from rlzoo.experiments.benchmarks.findings import Finding, Setup
from rlzoo.experiments.benchmarks.random_models import SHAPES, random_model, random_rows
from rlzoo.experiments.benchmarks.steps import OPTIONS, RATE, UNIT, together
from rlzoo.inputs import Behaviour, Snapshot
from rlzoo.objective import Objective
from rlzoo.policy.assembly import Units
from rlzoo.policy.loading import load_for
from rlzoo.policy.microbatches import log_probs
from rlzoo.rollout import TransformersSampler
from rlzoo.rollout.sampler import uniform_numbers
from rlzoo.testing.engine import SameRows, rows_of, units_of
from rlzoo.training import Trainer
from rlzoo.types import Trajectory

GAPS = {"float32": 1e-4, "bfloat16-mixed": 0.15}
"""The largest distance of a gradient from float64's, over the size of that: by dtype."""
ONE_STEP: dict[str, Any] = {
    "steps": 1, "learning_rate": RATE, "warmup_ratio": 0.0, "max_gradient_norm": 1e9, "checkpoint_seconds": None,
}  # fmt: skip
"""Leaves the gradient of a batch in the weights, as it is."""


def gradients(setup: Setup) -> Iterator[Finding]:
    """Every registered objective's gradient on the embedded model, with all that its rows can have stored.

    In bfloat16 a token that is near to a clip may fall on its other side: where ratios are clipped, a gap of 1 passes.
    The miniature takes every fourth objective.
    """
    exact = load_policy("embedded", "float64", "cpu")
    low = {dtype: load_policy("embedded", dtype, setup.device) for dtype in GAPS}
    for name in list_objectives()[:: setup.pick(1, 4)]:
        objective = get_objective(name, **OPTIONS.get(name, {}))
        rows = rows_of(exact, objective)
        wanted = gradient(exact, objective, rows, Training(**ONE_STEP))
        gaps = {dtype: gap(gradient(p, objective, rows, Training(**ONE_STEP)), wanted) for dtype, p in low.items()}
        clips = any(
            isinstance(one, (Behaviour, Snapshot))
            for component in objective.components
            for one in component.objective.requires
        )
        yield Finding(name, gaps, at_most={**GAPS, "bfloat16-mixed": 1.0} if clips else GAPS)


def gradient(
    policy: Policy,
    objective: Objective,
    rows: Sequence[Trajectory],
    settings: Training,
    units: Units | None = None,
) -> Float[Tensor, " P"]:
    """The gradient in all parameters, those of a critic included, as `train` makes it; the policy stays as it is.

    ``units`` are those of the rows; None: of `rows_of`.
    """
    own = Policy(deepcopy(policy.model), policy.tokenizer, policy.name, policy.compute)
    sources = [SameRows(rows, units or units_of(component.objective)) for component in objective.components]
    with drawn_alike():
        record = train(own, objective, sources, settings)
    if halved := [event for event in record.events if "out of memory" in event]:
        raise RuntimeError(halved[0])
    if {p.device.type for p in own.parameters()} != {policy.device.type}:
        raise RuntimeError(f"training moved a policy from {policy.device} to {own.device}")
    own_gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in own.parameters()]
    return torch.cat([g.detach().double().cpu().flatten() for g in own_gradients])


def gap(found: Float[Tensor, " P"], wanted: Float[Tensor, " P"]) -> float:
    """The distance of two gradients over the size of the second."""
    return float((found - wanted).norm() / wanted.norm())


@contextmanager
def drawn_alike() -> Iterator[None]:
    """While this lasts, tokens that an objective draws are the same on every device: from a CPU's random numbers."""
    generator = torch.Generator().manual_seed(0)

    def multinomial(probability: Tensor, number: int, replacement: bool = False) -> Tensor:
        assert replacement, "only independent draws are made alike"
        cumulative = probability.double().cpu().cumsum(1)
        uniform = torch.rand(len(probability), number, dtype=torch.float64, generator=generator)
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        return drawn.clamp(max=probability.shape[1] - 1).to(probability.device)

    with patch.object(torch, "multinomial", multinomial):
        yield


def budgets(setup: Setup) -> Iterator[Finding]:
    """The gradient of DFT, DPO and GRPO on a Qwen2 is float64's whatever the micro-batches, layers recomputed or not.

    Ratios and log-ratios are off 1 and 0, so that clips and weights come to bear.
    """
    name = random_model(setup.small, setup.folder / "sharp", setup.device, spread=0.1, seed=setup.seed)
    exact = load_policy(name, "float64", "cpu")
    low = {dtype: load_policy(name, dtype, setup.device) for dtype in GAPS}
    longest = setup.pick(1024, 48)
    ways = {
        "one row at a time": {"token_budget": 1},
        "some rows": {"token_budget": 4 * longest},
        "all rows": {"token_budget": 10**6},
        "recomputed": {"token_budget": 4 * longest, "gradient_checkpointing": True},
    }
    for objective in ("dft", "dpo", "grpo"):
        size, made = UNIT.get(objective, 1), get_objective(objective)
        rows = random_rows(setup.small, setup.pick(16, 8), size, setup.seed)
        rows = shifted(together(exact, rows, size), setup.seed) if size > 1 else rows
        units: Units = [tuple(range(i, i + size)) for i in range(0, len(rows), size)]
        own = partial(gradient, objective=made, rows=rows, units=units)
        wanted = own(exact, settings=Training(**ONE_STEP, token_budget=4 * longest))
        for dtype, policy in low.items():
            gaps = {way: gap(own(policy, settings=Training(**ONE_STEP, **how)), wanted) for way, how in ways.items()}
            yield Finding(f"{objective} {dtype}", gaps, at_most=dict.fromkeys(gaps, GAPS[dtype]))


def shifted(rows: list[Trajectory], seed: int) -> list[Trajectory]:
    """The same rows with log-probs of behaviour and reference moved within GRPO's clip and beyond, but not next to it.

    There bfloat16 would decide on which side a token falls.
    """
    noise = np.random.default_rng(seed)

    def moved(logp: Sequence[float] | None) -> list[float]:
        return [min(0.0, p + noise.choice([-0.6, -0.06, 0.0, 0.06, 0.6])) for p in logp or ()]

    return [
        replace(row, behaviour_logp=moved(row.behaviour_logp), reference_logp=moved(row.reference_logp)) for row in rows
    ]


HALT = 2
"""The step after which a run is stopped."""
STEPS = 4


class Halted(Exception):  # noqa: N818  (nothing is wrong)
    """Stops a run."""


def determinism(setup: Setup) -> Iterator[Finding]:
    """A second run, in a process of its own, has the same bits; so has one that was stopped and resumes there.

    OTR draws tokens on the device, PPO trains a critic that starts at random.
    """
    name = random_model(setup.small, setup.folder / "plain", setup.device, seed=setup.seed)
    objectives = {objective: setup.folder / f"checkpoints-{objective}" for objective in ("otr", "ppo")}
    found: list[dict[str, list[tuple[str, int]]]] = []
    # in a fresh process each: deterministic kernels are chosen when one begins, on a GPU
    context = get_context("fork" if setup.device == "cpu" else "spawn")
    for halts in (True, False):
        with ProcessPoolExecutor(1, mp_context=context) as fresh:
            found.append(
                {
                    objective: [
                        fresh.submit(trained, setup, name, objective).result(),
                        fresh.submit(trained, setup, name, objective, checkpoints, halts).result(),
                    ]
                    for objective, checkpoints in objectives.items()
                }
            )
    for objective in objectives:
        (first, _), (second, _), (resumed, steps) = found[0][objective][0], *found[1][objective]
        values = {"second run equal": int(second == first), "resumed run equal": int(resumed == first)}
        again = steps - (STEPS - HALT)
        yield Finding(
            objective,
            {**values, "steps done again": again},
            at_most={"steps done again": 0},
            at_least=dict.fromkeys(values, 1),
        )


def trained(
    setup: Setup, name: str, objective: str, checkpoints: Path | None = None, halts: bool = False
) -> tuple[str, int]:
    """A digest of weights and losses after some steps, and how many of them were done here."""
    if setup.device == "cpu":
        torch.set_num_threads(1)
    settings = Training(
        steps=STEPS, batch_size=setup.pick(16, 4), learning_rate=1e-3, token_budget=setup.pick(4096, 64),
        checkpoint_seconds=0, dtype=setup.dtype, device=setup.device, deterministic=True,
    )  # fmt: skip
    policy = load_for(name, settings)
    rows = random_rows(setup.small, 2 * settings.batch_size, UNIT["grpo"], setup.seed)
    rows = together(policy, rows, UNIT["grpo"]) if objective == "ppo" else rows
    done: list[int] = []

    def watch(_: Trainer, step: int) -> None:
        if halts and step > HALT:
            raise Halted
        done.append(step)

    buffer = OfflineBuffer.from_trajectories(rows)
    try:
        record = train(policy, get_objective(objective), buffer, settings, 1, [watch], checkpoints=checkpoints)
    except Halted:
        return "halted", len(done)
    digest = hashlib.sha256(repr([step["loss"] for step in record.steps]).encode())
    for _, parameter in sorted(policy.named_parameters()):
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest(), len(done)


def sampler(setup: Setup) -> Iterator[Finding]:
    """What the sampler draws, and the trainer's log-probs, against transformers' forward pass of each row alone.

    A token is drawn where the cumulative probability passes a uniform number: ``drawn`` is by how much probability
    that number misses the token's own interval under the plain forward pass. ``greedy`` is by how much the logit of a
    greedy token is below the largest, ``log-probs`` by how many nats a log-prob differs.
    """
    limits = {"float32": (1e-4, 1e-3, 1e-3), "bfloat16-mixed": (0.1, 0.5, 0.3)}
    name = random_model(setup.small, setup.folder / "peaked", setup.device, spread=0.2, seed=setup.seed)
    chance = random.Random(setup.seed)
    prompts = [
        [chance.randrange(3, SHAPES[setup.small]["vocab_size"]) for _ in range(length)]
        for length in (2, 3, 5, 9, 17, 33, 40, setup.pick(300, 41))
    ]
    settings = Sampling(
        samples=3, temperature=0.8, max_new_tokens=setup.pick(64, 24), batch_size=12, engine="transformers"
    )
    for dtype, (drawn_limit, greedy_limit, logp_limit) in limits.items():
        policy = load_policy(name, dtype, setup.device).eval()
        make = TransformersSampler(policy)
        drawn = greedy = off = 0.0
        for place, [sample] in enumerate(make.sample(prompts, settings, setup.seed, greedy=True)):
            logits = plain_logits(policy, prompts[place], sample.ids)
            chosen = logits.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
            greedy = max(greedy, float((logits.amax(1) - chosen).max()))
        tokens, used = 0, set[int]()
        for place, samples in enumerate(make.sample(prompts, settings, setup.seed)):
            uniform = uniform_numbers(setup.seed, [place], range(len(samples)), settings.max_new_tokens)
            [*logps] = log_probs(policy, [(prompts[place], sample.ids) for sample in samples])
            for number, sample in enumerate(samples):
                logits = plain_logits(policy, prompts[place], sample.ids)
                drawn = max(drawn, missed(logits / settings.temperature, sample.ids, uniform[number]))
                plain = logits.log_softmax(1).gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
                off = max(off, float((plain - torch.tensor(logps[number], dtype=torch.float64)).abs().max()))
                tokens, used = tokens + len(sample.ids), used | set(sample.ids)
        yield Finding(
            dtype,
            {"drawn": drawn, "greedy": greedy, "log-probs": off, "tokens": tokens, "kinds of tokens": len(used)},
            at_most={"drawn": drawn_limit, "greedy": greedy_limit, "log-probs": logp_limit},
            at_least={"tokens": setup.pick(1000, 200), "kinds of tokens": setup.pick(100, 20)},
        )


@torch.no_grad()
def plain_logits(policy: Policy, prompt: list[int], completion: list[int]) -> Float[Tensor, "T V"]:
    """transformers' logits of each completion token, of one row without padding, in float64 on the CPU."""
    ids = torch.tensor([prompt + completion], device=policy.device)
    logits: Tensor = policy.run(lambda: policy.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1])
    return logits.double().cpu()


def missed(logits: Float[Tensor, "T V"], ids: list[int], uniform: Float[np.ndarray, " U"]) -> float:
    """The largest distance of a token's uniform number from the token's interval of cumulative probability."""
    cumulative = torch.cat([torch.zeros(len(ids), 1, dtype=torch.float64), logits.softmax(1).cumsum(1)], 1)
    token, u = torch.tensor(ids)[:, None], torch.tensor(uniform[: len(ids)], dtype=torch.float64)
    low, high = cumulative.gather(1, token)[:, 0], cumulative.gather(1, token + 1)[:, 0]
    return float(torch.maximum(low - u, u - high).clamp(min=0).max())


def comparison(setup: Setup) -> Iterator[Finding]:
    """A small `compare` in processes of its own: every cell ends, and the base model is as good as it always is."""
    problems = setup.pick(32, 8)
    experiment = load_experiment(
        "arithmetic",
        {
            "algorithms": {name: {} for name in (("sft", "dft", "dpo", "grpo") if not setup.tiny else ("sft", "grpo"))},
            "train.limit": 4 * problems, "rollouts.prompts": problems, "validation": None, "seeds": [0],
            "benchmarks": {"chain-sums": {"source": "world:arithmetic/test", "limit": problems}},
            "retention": {}, "evaluation": {"samples": 4, "max_new_tokens": 40, "curve_points": 0},
            "training": {"steps": setup.pick(8, 2), "batch_size": 16, "learning_rate": 1e-5},
        },
    )  # fmt: skip
    workers = setup.pick(2, 1)
    start = patch("rlzoo.jobs.pool.START", "fork" if setup.device == "cpu" else "spawn")  # a copy imports nothing
    with start, patch("rlzoo.comparison.runner.write_report"):  # which nobody reads, and which takes longer than a cell
        results = compare(experiment, setup.folder / "compare", workers=workers, console=Console(quiet=True))
    base = results["base"]["chain-sums"]["avg_at_k"]
    failed = [f"{cell}" for cell in results["failed"]]
    yield Finding(
        "workers",
        {
            "cells": len(results["cells"]),
            "failed": len(failed),
            "base avg@4": base,
            "why": failed[0] if failed else None,
        },
        at_most={"failed": 0},
        at_least={"cells": len(experiment.algorithms), "base avg@4": 0.15},  # 0.46 over all problems
    )


PARTS: dict[str, Callable[[Setup], Iterator[Finding]]] = {
    "gradients": gradients,
    "budgets": budgets,
    "determinism": determinism,
    "sampler": sampler,
    "compare": comparison,
}
