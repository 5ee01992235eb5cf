"""Sampling: rlzoo's own decoding against transformers' plain generate, and against vLLM where that is installed.

    python experiments/benchmarks/sampling.py --model models/SmolLM2-135M-Instruct --data gsm8k/train.jsonl

``--samples`` completions of each of the first ``--prompts`` problems at T = 1, up to ``--max-new-tokens`` tokens. Every
engine runs in a process of its own, in turn, ``--repeats`` times, after a start that is not counted; medians:

- ``generate``: `model.generate` with ``num_return_sequences``, batches of ``--batch-size`` sequences as the data come;
- ``rlzoo``: `rlzoo.rollout.TransformersSampler` with the same batch size;
- ``vllm``: `rlzoo.rollout.VLLMSampler` in this process, its own scheduler.

Tokens per second count sampled tokens up to and with the end of sequence. What is sampled differs in length from engine
to engine by chance alone.

    python experiments/benchmarks/sampling.py --prompts 256 --batch-size 128 --reward math-answer

With a reward, rlzoo's loop samples and the reward scores in processes of its own instead: ``after`` the sampling, or
``meanwhile``, as it does; beside them the sampling alone. The scores are compared. Gold answers n of the built-in
tasks become \\sqrt{n^2}, so that answers are compared as formulas (some 10 ms each), as many of a real data set are.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from rlzoo import Policy, load_policy
from rlzoo.buffers.problems import EncodedProblem, Problem, encode_problems
from rlzoo.config import Sampling
from rlzoo.experiments.benchmarks.parts import medians, run_part
from rlzoo.experiments.benchmarks.steps import problems_of
from rlzoo.reward.isolation import Limits, RewardProcesses, isolated
from rlzoo.rollout import TransformersSampler
from rlzoo.rollout.decoding import padded
from rlzoo.rollout.scoring import Scorer

ENGINES = ("generate", "rlzoo", "vllm")


def encoded(policy: Policy, arguments: argparse.Namespace) -> Sequence[EncodedProblem]:
    """The first problems, as prompts of the model."""
    return encode_problems(policy.tokenizer, problems_of(arguments.data, arguments.prompts))


@torch.no_grad()
def generate(policy: Policy, prompts: list[list[int]], settings: Sampling) -> int:
    """Sampled tokens, by `generate` as a script would call it."""
    tokens, size = 0, max(1, settings.batch_size // settings.samples)
    torch.manual_seed(0)
    for start in range(0, len(prompts), size):
        ids, mask = padded(prompts[start : start + size], policy.device)
        out = policy.model.generate(
            input_ids=ids, attention_mask=mask.long(), do_sample=True, temperature=settings.temperature, top_k=0,
            num_return_sequences=settings.samples, max_new_tokens=settings.max_new_tokens,
            pad_token_id=policy.tokenizer.pad_token_id, eos_token_id=sorted(policy.eos_ids),
        )  # fmt: skip
        for row in out[:, ids.shape[1] :].tolist():
            tokens += next((i + 1 for i, token in enumerate(row) if token in policy.eos_ids), len(row))
    return tokens


def one(arguments: argparse.Namespace) -> dict[str, float]:
    """One engine's tokens per second, in this process."""
    torch.set_num_threads(arguments.threads)
    policy = load_policy(arguments.model)
    prompts = [problem.ids for problem in encoded(policy, arguments)]
    settings = Sampling(
        samples=arguments.samples, max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size
    )
    short = settings.model_copy(update={"max_new_tokens": 4})
    if arguments.part == "generate":
        generate(policy, prompts[:2], short)
        started, cpu_started = time.perf_counter(), time.process_time()
        tokens = generate(policy, prompts, settings)
    else:
        if arguments.part == "vllm":
            from rlzoo.rollout import VLLMSampler

            sampler: Any = VLLMSampler(policy)
        else:
            sampler = TransformersSampler(policy)
        sampler.sample(prompts[:2], short, seed=1)
        started, cpu_started = time.perf_counter(), time.process_time()
        found = sampler.sample(prompts, settings, seed=0)
        tokens = sum(len(sample.ids) for samples in found for sample in samples)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu_seconds,
        "seconds": seconds,
        "tokens": tokens,
    }


def scored(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of sampling alone, with scoring after it, and with scoring meanwhile; medians."""
    torch.set_num_threads(arguments.threads)
    policy = load_policy(arguments.model)
    problems = encoded(policy, arguments)
    if arguments.data.startswith("world:"):
        problems = [replace(one, problem=replace(one.problem, columns=_as_formula(one.problem))) for one in problems]
    settings = Sampling(
        samples=arguments.samples, max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size
    )
    sampler, reward = (
        TransformersSampler(policy),
        isolated(arguments.reward, Limits(None, 8.0), "fail", arguments.processes),
    )
    processes = reward.function
    assert isinstance(processes, RewardProcesses)

    def run(meanwhile: bool) -> tuple[float, float, list[float | None]]:
        for process in processes.processes:
            process.close()  # it may remember answers
        scored_in(False, problems[-8:], 1)
        return scored_in(meanwhile, problems, 0)

    def scored_in(
        meanwhile: bool, some: Sequence[EncodedProblem], seed: int
    ) -> tuple[float, float, list[float | None]]:
        started = time.perf_counter()
        with Scorer(reward, some) as scorer:
            with sampler.reporting_to(scorer.begin if meanwhile else lambda *_: None):
                sampled = sampler.sample([problem.ids for problem in some], settings, seed)
            alone = time.perf_counter() - started
            scorer.begin_all(sampled)
            scores = [score.value for score, _ in scorer.end()]
        return alone, time.perf_counter() - started, scores

    seconds: dict[str, list[float]] = {"sampling": [], "after": [], "meanwhile": []}
    for _ in range(arguments.repeats):
        alone, after, scores = run(False)
        _, meanwhile, same = run(True)
        if scores != same:
            raise SystemExit("the scores differ")
        for name, value in zip(seconds, (alone, after, meanwhile), strict=True):
            seconds[name].append(value)
    found: dict[str, Any] = {name: median(some) for name, some in seconds.items()}
    return {"seconds": found, "completions": len(scores), "after_over_meanwhile": found["after"] / found["meanwhile"]}


def _as_formula(problem: Problem) -> dict[str, Any]:
    answer = str(problem.columns["answer"])
    return {**problem.columns, "answer": rf"\sqrt{{{int(answer) ** 2}}}" if answer.isdigit() else answer}


def main() -> None:
    """Run every engine in turn, and compare with `generate`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="world:arithmetic/train", help="a file in GSM8K's format, or a built-in task")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64, help="sequences that are sampled together")
    parser.add_argument("--engines", help="comma-separated; default: those that are installed")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--reward", help="time scoring by this reward instead, after the sampling and meanwhile")
    parser.add_argument("--processes", type=int, default=1, help="processes of the reward")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--part", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(one(arguments)))
        return
    if arguments.reward:
        print(json.dumps(scored(arguments), indent=None if arguments.json else 1))
        return
    engines = ENGINES if find_spec("vllm") else ENGINES[:2]
    if arguments.engines:
        engines = tuple(arguments.engines.split(","))
    runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for _ in range(arguments.repeats):
        for engine in engines:
            runs[engine].append(run_part(__file__, engine, *sys.argv[1:]))
            if not arguments.json:
                print(engine, runs[engine][-1], flush=True)
    found: dict[str, Any] = {engine: medians(some) for engine, some in runs.items()}
    if "generate" in found:
        base = found["generate"]["tokens_per_second"]
        found["over_generate"] = {engine: found[engine]["tokens_per_second"] / base for engine in engines}
    print(json.dumps(found, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
