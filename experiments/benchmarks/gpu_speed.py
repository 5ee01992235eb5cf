"""Training steps and decoding of models of real sizes, timed: the parts of gpu_check.py that measure.

FLOPs of a step are what any engine has to do, the same for all: 6 per parameter and token for the layers, 6 per entry
of the head and completion token, and for causal attention 6 · layers · hidden · Σ length² (two matrix products of
length² / 2 times hidden, forward once and backward twice). What an engine computes besides (padding, the head on
prompts, recomputation) earns it nothing. The fraction is FLOPs per second over those of a bfloat16 matrix product that
is timed before and after the engine, in the same process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from rlzoo import OfflineBuffer, Policy, get_objective, load_policy, train
from rlzoo.advantages import group_normalised
from rlzoo.config import Sampling, Training
from rlzoo.errors import UserError
from rlzoo.experiments.benchmarks.findings import Finding, Setup, Value
from rlzoo.experiments.benchmarks.random_models import random_model, random_rows
from rlzoo.experiments.benchmarks.sampling import generate
from rlzoo.experiments.benchmarks.steps import (
    RATE,
    UNIT,
    Watch,
    gemm_speed,
    plain_steps,
    synchronise,
    together,
    tokens_of,
    trl_loss_steps,
    trl_sft_steps,
    with_trl_head,
)
from rlzoo.jobs.memory import is_out_of_memory, release_memory
from rlzoo.rollout import TransformersSampler
from rlzoo.training import Trainer
from rlzoo.types import Trajectory

OBJECTIVES = ("dft", "dpo", "grpo")
UNLIKE = 0.01
"""The most that the cosine of two engines' gradients may be below 1: both multiply matrices in bfloat16."""
Gradient = list[Float[Tensor, " P"]]


def steps(setup: Setup, size: str) -> Iterator[Finding]:
    """DFT, DPO and GRPO: rlzoo, a bare loop over transformers' model, and TRL's trainers in their best setting."""
    name = model_of(setup, size)
    held = [load_policy(name, setup.dtype, setup.device)]
    rows = {one: rows_of(held[0], one, size, setup) for one in OBJECTIVES}
    best: dict[str, dict[str, Any]] = {one: {} for one in OBJECTIVES}
    kept: dict[str, Gradient] = {}
    for one in OBJECTIVES:
        for budget in setup.token_budgets:
            found = timed(setup, held[0], rows[one], partial(rlzoo_steps, setup, held[0], rows[one], one, budget))
            kept.setdefault(one, gradient_of(held[0]))
            yield told(f"{one}: rlzoo", found, best[one], "rlzoo")
        if one == "dft" and setup.device != "cpu":  # where compiling takes longer than all the rest
            run_compiled = partial(rlzoo_steps, setup, held[0], rows[one], one, setup.token_budgets[0], compile=True)
            try:
                found = timed(setup, held[0], rows[one], run_compiled)
            except UserError as error:
                found = {"setting": str(error)}
            yield told(f"{one}: rlzoo compiled", found, best[one], "rlzoo")
        loss = {"dft": dft_loss, "dpo": dpo_loss, "grpo": grpo_loss}[one]
        run = partial(bare_steps, setup, loss)
        found = in_memory(setup, lambda: held[0], rows[one], kept[one], run, setup.pick(8, 4), UNIT.get(one, 1))
        yield told(f"{one}: bare loop", found, best[one], "bare")
    held.clear()
    if find_spec("trl") is None:
        yield Finding("TRL", {"setting": "not installed here"})
        return
    for one, settings in (("dft", "by length"), ("dft", "packed"), ("dpo", "by length"), ("grpo", "by length")):
        fresh = partial(load_policy, name, setup.dtype, setup.device)  # TRL changes a model for good
        steps_of = partial(trl_steps, setup, one, settings == "packed")
        # packed rows see each other without kernels for that: its gradient is another one
        wanted = None if settings == "packed" else kept[one]
        found = in_memory(setup, fresh, rows[one], wanted, steps_of, setup.pick(16, 4), UNIT.get(one, 1))
        if settings == "packed":
            found["setting"] = str(found["setting"]).replace("rows", "times the longest row")
        yield told(f"{one}: TRL {settings}", found, best[one], "trl")
    for one in OBJECTIVES:
        ours, theirs = best[one].get("rlzoo"), best[one].get("trl")
        if ours and theirs:
            ratios: dict[str, Value] = {
                "speed": ours["tokens/s"] / theirs["tokens/s"],
                "memory": ours["peak GB"] / theirs["peak GB"],
            }
            if bare := best[one].get("bare"):  # else it ran out of memory
                ratios["speed over bare"] = ours["tokens/s"] / bare["tokens/s"]
            yield Finding(f"{one}: rlzoo over TRL's best", ratios)


def model_of(setup: Setup, size: str) -> str:
    """A random model of this size, written once."""
    folder = setup.folder / size
    return str(folder) if folder.is_dir() else random_model(size, folder, setup.device, seed=setup.seed)


def rows_of(policy: Policy, objective: str, size: str, setup: Setup) -> list[Trajectory]:
    """Rows that an objective learns from, with the log-probs of reference and behaviour."""
    unit = UNIT.get(objective, 1)
    rows = random_rows(size, setup.pick(64, 8), unit, setup.seed)
    return together(policy, rows, unit) if unit > 1 else rows


def told(name: str, found: dict[str, Value], best: dict[str, Any], engine: str) -> Finding:
    """A finding, which is kept as its engine's best if it is the fastest so far."""
    speed, before = found.get("tokens/s"), best.get(engine, {}).get("tokens/s", 0.0)
    if isinstance(speed, float) and speed > before:
        best[engine] = found
    return Finding(name, found, at_most={"1 - cosine": UNLIKE} if "1 - cosine" in found else {})


def timed(
    setup: Setup, policy: Policy, rows: list[Trajectory], run: Callable[[], tuple[Watch, str]]
) -> dict[str, Value]:
    """Speed and peak memory of the steps after the first."""
    release_memory()
    gemm = partial(gemm_speed, setup.device, torch.bfloat16, setup.pick(8192, 256))
    before = gemm()
    watch, setting = run()
    speed, seconds = max(before, gemm()), median(watch.seconds[1:])
    return {
        "tokens/s": tokens_of(rows) / seconds,
        "of GEMM": step_flops(policy, rows) / seconds / speed,
        "peak GB": max(watch.peaks[1:]) / 1e9,
        "seconds": seconds,
        "GEMM TFLOP/s": speed / 1e12,
        "setting": setting,
    }


def in_memory(
    setup: Setup,
    fresh: Callable[[], Policy],
    rows: list[Trajectory],
    wanted: Gradient | None,
    run: Callable[[Policy, list[Trajectory], int, Watch], None],
    batch: int,
    least: int,
) -> dict[str, Value]:
    """The same of an engine with ``batch`` rows per micro-batch, or half as many until that fits into memory.

    With the cosine of its gradient and ``wanted``. ``least`` rows belong together.
    """
    while batch >= least:
        cosines: list[float] = []

        def attempt(batch: int = batch, cosines: list[float] = cosines) -> dict[str, Value]:
            release_memory()
            policy = fresh()
            policy.zero_grad(set_to_none=True)

            def compare() -> None:
                if wanted is not None and not cosines:  # in the first step, which is not timed
                    cosines.append(cosine(policy, wanted))

            watch = Watch(compare)

            def all_steps() -> tuple[Watch, str]:
                run(policy, rows, batch, watch)
                return watch, f"micro-batches of {batch} rows"

            return timed(setup, policy, rows, all_steps)

        try:
            found = attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return found | ({"1 - cosine": 1 - cosines[-1]} if cosines else {})
        batch //= 2
    return {"setting": f"out of memory with micro-batches of {least} rows"}


def step_flops(policy: Policy, rows: list[Trajectory]) -> float:
    """FLOPs of a step; see the top of this file."""
    completions = sum(len(row.completion_ids) for row in rows)
    squares = sum((len(row.prompt_ids) + len(row.completion_ids)) ** 2 for row in rows)
    config = policy.model.config
    attention: float = 6.0 * config.num_hidden_layers * config.hidden_size * squares
    return 3 * policy.flops(tokens_of(rows), completions, modules=False) + attention


def gradient_of(policy: Policy) -> Gradient:
    """The gradient of each parameter, on the CPU, so that it takes no part in peaks."""
    return [p.grad.detach().float().cpu() for p in policy.model.parameters() if p.grad is not None]


def cosine(policy: Policy, wanted: Gradient) -> float:
    """Between the policy's gradient and another, in float64, where the policy is, a part at a time."""
    own = [p.grad for p in policy.model.parameters() if p.grad is not None]
    sums = torch.zeros(3, dtype=torch.float64, device=policy.device)
    for pair in zip(own, wanted, strict=True):
        for x, y in zip(*(gradient.flatten().split(2**24) for gradient in pair), strict=True):
            a, b = x.double(), y.to(x.device).double()
            sums += torch.stack([a @ b, a @ a, b @ b])
    product, size, other = map(float, sums.tolist())
    return product / math.sqrt(size * other)


def rlzoo_steps(
    setup: Setup, policy: Policy, rows: list[Trajectory], objective: str, token_budget: int, compile: bool = False
) -> tuple[Watch, str]:
    """Steps of `train` on a buffer; leaves the last gradient in the policy."""
    own: dict[str, Any] = {"token_budget": token_budget} if token_budget else {}
    own["compile"] = compile
    settings = Training(
        steps=1 + setup.repeats, batch_size=len(rows), learning_rate=RATE, checkpoint_seconds=None, **own
    )
    watch = Watch()

    def next_step(trainer: Trainer, step: int) -> None:
        watch.end()
        if step < settings.steps:
            watch.begin()

    buffer = OfflineBuffer.from_trajectories(rows)
    watch.begin()
    record = train(policy, get_objective(objective), buffer, settings, callbacks=[next_step])
    halved = [event for event in record.events if "out of memory" in event]
    return watch, f"token budget {settings.token_budget}" + (f"; {halved[-1]}" if halved else "")


def trl_steps(
    setup: Setup, objective: str, packed: bool, policy: Policy, rows: list[Trajectory], batch: int, watch: Watch
) -> None:
    """Steps of TRL, on padded rows of like length, or packed ones in blocks as long as ``batch`` of the longest."""
    lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
    longest = max(lengths)
    if (size := UNIT.get(objective, 1)) > 1:
        with_trl_head(policy)
        units = sorted(range(0, len(rows), size), key=lambda unit: max(lengths[unit : unit + size]))
        rows = [row for unit in units for row in rows[unit : unit + size]]
        trl_loss_steps(policy, rows, objective, watch, batch=batch, steps=1 + setup.repeats)
    else:
        length = longest * batch if packed else longest
        trl_sft_steps(
            policy,
            rows,
            objective,
            watch,
            batch=batch,
            length=length,
            packed=packed,
            by_length=not packed,
            steps=1 + setup.repeats,
        )


def bare_steps(
    setup: Setup,
    loss: Callable[[Policy, list[Trajectory], list[Trajectory]], Tensor],
    policy: Policy,
    rows: list[Trajectory],
    batch: int,
    watch: Watch,
) -> None:
    """The loop that one writes oneself: padded rows as they come, logits of all positions."""
    policy.model.train()
    plain_steps(policy, rows, batch, lambda some: loss(policy, some, rows), watch, 1 + setup.repeats)


def bare_logp(policy: Policy, rows: list[Trajectory]) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
    """Log-probs of all tokens but the first, and which of them count."""
    ids = [torch.tensor(row.prompt_ids + row.completion_ids) for row in rows]
    counts = [torch.tensor([0.0] * len(row.prompt_ids) + [1.0] * len(row.completion_ids)) for row in rows]
    inputs, mask = (pad_sequence(some, batch_first=True).to(policy.device) for some in (ids, counts))
    lengths = torch.tensor([len(row) for row in ids], device=policy.device)
    attended = torch.arange(inputs.shape[1], device=policy.device) < lengths[:, None]
    logits = policy.model(input_ids=inputs, attention_mask=attended.long(), use_cache=False).logits[:, :-1]
    flat = functional.cross_entropy(logits.float().flatten(0, 1), inputs[:, 1:].flatten(), reduction="none")
    return -flat.view(len(rows), -1), mask[:, 1:]


def dft_loss(policy: Policy, rows: list[Trajectory], whole: list[Trajectory]) -> Tensor:
    """-(p · log p) with p held, over all completion tokens of the batch."""
    logp, mask = bare_logp(policy, rows)
    total: Tensor = -(logp.detach().exp() * logp * mask).sum() / sum(len(row.completion_ids) for row in whole)
    return total


def dpo_loss(policy: Policy, rows: list[Trajectory], whole: list[Trajectory]) -> Tensor:
    """-log σ(β Δ) with β = 0.1, over all pairs: the first row of two is the better one."""
    logp, mask = bare_logp(policy, rows)
    reference = torch.tensor([sum(row.reference_logp or ()) for row in rows], device=policy.device)
    ratio = (logp * mask).sum(1) - reference
    return -functional.logsigmoid(0.1 * (ratio[::2] - ratio[1::2])).sum() / (len(whole) / 2)


def grpo_loss(policy: Policy, rows: list[Trajectory], whole: list[Trajectory]) -> Tensor:
    """-min(ρA, clip(ρ) A) + β k3, averaged over each row, then over all rows."""
    logp, mask = bare_logp(policy, rows)
    behaviour, reference = torch.zeros_like(logp), torch.zeros_like(logp)
    for place, row in enumerate(rows):
        span = slice(len(row.prompt_ids) - 1, len(row.prompt_ids) - 1 + len(row.completion_ids))
        behaviour[place, span] = torch.tensor(row.behaviour_logp, device=policy.device)
        reference[place, span] = torch.tensor(row.reference_logp, device=policy.device)
    reward = torch.tensor([row.reward or 0.0 for row in rows], dtype=torch.float64, device=policy.device)
    group = torch.arange(len(rows), device=policy.device) // UNIT["grpo"]
    advantage = group_normalised(reward, group, dtype=logp.dtype)[:, None]
    ratio = ((logp - behaviour) * mask).exp()
    pull = (reference - logp) * mask
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + 0.04 * (pull.exp() - pull - 1)
    total: Tensor = ((loss * mask).sum(1) / mask.sum(1)).sum() / len(whole)
    return total


def decoding(setup: Setup, size: str) -> Iterator[Finding]:
    """Sampled tokens per second of rlzoo's sampler, with CUDA graphs and without, and of transformers' `generate`.

    64 sequences, four per prompt.
    """
    name = model_of(setup, size)
    prompts = [row.prompt_ids for row in random_rows(size, setup.pick(16, 2), seed=setup.seed)]
    settings = Sampling(samples=4, max_new_tokens=setup.pick(128, 8), batch_size=64, engine="transformers")
    speeds: dict[str, float] = {}
    for dtype in (setup.dtype, "bfloat16"):
        policy = load_policy(name, dtype, setup.device).eval()
        made = {"rlzoo": TransformersSampler(policy, True), "rlzoo, no graphs": TransformersSampler(policy, False)}

        def sample(make: TransformersSampler, some: Sampling) -> int:
            return sum(len(sample.ids) for samples in make.sample(prompts, some, setup.seed) for sample in samples)

        engines: dict[str, Callable[[Sampling], int]] = {name: partial(sample, make) for name, make in made.items()}
        if dtype == "bfloat16":  # the weights of what a script would run
            engines["generate"] = partial(generate, policy, prompts)
        for engine, run in engines.items():
            watch = Watch()
            run(settings.model_copy(update={"max_new_tokens": setup.pick(40, 4)}))
            watch.begin()
            tokens = run(settings)
            watch.end()
            speeds[f"{engine} {dtype}"] = tokens / watch.seconds[0]
            values = {"tokens/s": tokens / watch.seconds[0], "peak GB": watch.peaks[0] / 1e9, "tokens": tokens}
            if engine == "rlzoo" and (decoder := made[engine].decoder) is not None:
                values["CUDA graphs"] = int(setup.device != "cpu" and not decoder.refuses_graphs)
            yield Finding(f"{engine} {dtype}", values, at_least={"tokens": 1})
        del policy, made, engines, run
        release_memory()
        synchronise()
    best = max(speed for key, speed in speeds.items() if key.startswith("rlzoo"))
    yield Finding("rlzoo over generate", {"speed": best / speeds["generate bfloat16"]})


PARTS: dict[str, Callable[[Setup, str], Iterator[Finding]]] = {"steps": steps, "decoding": decoding}
