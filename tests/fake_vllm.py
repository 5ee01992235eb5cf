"""A stand-in for vLLM in this process: it samples with the weights it was handed, and gives log-probs as vLLM does."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlzoo.config import Sampling
from rlzoo.jobs.ranks import is_sharded
from rlzoo.policy import Policy, Sequences
from rlzoo.rollout import TransformersSampler
from rlzoo.worlds import EMBEDDED_BASE


@dataclass
class Entry:
    logprob: float


@dataclass
class Output:
    token_ids: list[int]
    logprobs: list[dict[int, Entry]]


@dataclass
class Request:
    outputs: list[Output]


@dataclass
class SamplingParams:
    """What is asked of an engine for one prompt."""

    n: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    others: dict[str, Any] = field(default_factory=dict)

    def __init__(self, n: int, temperature: float, top_p: float, max_tokens: int, seed: int, **others: Any) -> None:
        self.n, self.temperature, self.top_p, self.max_tokens = n, temperature, top_p, max_tokens
        self.seed, self.others = seed, others


def own_model(policy: Policy) -> Any:
    """A whole copy of the policy's model; of a sharded one, the embedded base that it was loaded from."""
    if not is_sharded(policy.model):
        return copy.deepcopy(policy.model)
    return type(policy.model).from_pretrained(EMBEDDED_BASE, dtype=policy.model.dtype)


class FakeEngine:
    """Starts with weights of its own, as an engine does that loads a model's folder."""

    def __init__(self, policy: Policy, gap: float = 0.0, where: str = "", **options: Any) -> None:
        """``gap``, in nats, is how far its log-probs are from what they should be."""
        self.policy = Policy(own_model(policy), policy.tokenizer, policy.name)
        self.gap, self.handed, self.fails = gap, 0, False
        self.where, self.options = where, options
        self.asked: list[SamplingParams] = []
        self.prompts: list[list[int]] = []
        self.calls: list[Any] = []
        """What it was called for, in order."""
        self._cache_is_stale = False
        self._asleep: set[str] = set()
        core = SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))
        self.llm_engine = SimpleNamespace(engine_core=core)

    def holds(self, policy: Policy) -> bool:
        """Whether its weights are the policy's."""
        weights = plain_weights(policy)
        own = self.policy.model.state_dict()
        return set(own) == set(weights) and all(torch.equal(own[name], value) for name, value in weights.items())

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights" and "weights" not in self._asleep
        self.calls.append("weights")
        self._cache_is_stale = True
        if "weights_path" in kwargs:
            weights: dict[str, Tensor] = load_file(Path(kwargs["weights_path"]) / "model.safetensors")
        else:
            weights = dict(kwargs["weights_iterator"])
        absent = self.policy.model.load_state_dict(weights, strict=False)
        assert not absent.unexpected_keys and set(absent.missing_keys) <= {"lm_head.weight"}, "a tied head is not saved"
        if self.fails:
            raise RuntimeError("the engine is out of memory")
        self.handed += 1

    def reset_prefix_cache(self) -> None:
        self._cache_is_stale = False

    @torch.no_grad()
    def sleep(self, level: int) -> None:
        """Its memory is another's: at level 2 the weights are lost."""
        assert self.options["enable_sleep_mode"] and not self._asleep
        self.calls.append(f"sleep {level}")
        self._asleep = {"weights", "kv_cache"}
        for parameter in self.policy.model.parameters():
            if level == 2:
                parameter.fill_(float("nan"))

    def wake_up(self, tags: list[str]) -> None:
        assert self._asleep >= set(tags)
        self.calls.append(f"wake {' '.join(tags)}")
        self._asleep -= set(tags)

    def generate(
        self, prompts: list[dict[str, list[int]]], params: list[SamplingParams], use_tqdm: bool
    ) -> list[Request]:
        assert not self._cache_is_stale, "keys and values of the old weights"
        assert not self._asleep
        self.calls.append("generate")
        self.asked += params
        self.prompts += [prompt["prompt_token_ids"] for prompt in prompts]
        return [self._answer(prompt["prompt_token_ids"], asked) for prompt, asked in zip(prompts, params, strict=True)]

    @torch.no_grad()
    def _answer(self, prompt: list[int], asked: SamplingParams) -> Request:
        greedy = asked.temperature == 0
        heat = 1.0 if greedy else asked.temperature
        settings = Sampling(
            samples=asked.n, temperature=heat, top_p=asked.top_p, max_new_tokens=asked.max_tokens, batch_size=asked.n
        )
        sampler = TransformersSampler(self.policy)  # whose `sample` would share the prompt with other processes
        (samples,) = sampler._sample_all([prompt], [0], [0], settings, asked.seed, greedy, None)
        sequences = Sequences.collate([prompt] * len(samples), [s.ids for s in samples], self.policy.device)
        processed = self.policy(sequences, temperature=heat, top_p=asked.top_p).logp
        return Request(
            [
                Output(s.ids, [{t: Entry(float(x) + self.gap)} for t, x in zip(s.ids, row, strict=False)])
                for s, row in zip(samples, processed, strict=True)
            ]
        )


def plain_weights(policy: Policy) -> dict[str, Tensor]:
    """A policy's weights, an adapter merged into them."""
    from rlzoo.policy.adapters import merged

    return merged(policy.model, dict(policy.model.state_dict()))


def install(monkeypatch: pytest.MonkeyPatch, policy: Policy, gap: float = 0.0) -> list[FakeEngine]:
    """Put the stand-in in vLLM's place; the engines that get started, each with ``policy``'s weights of now."""
    started: list[FakeEngine] = []

    def start(where: str, **options: Any) -> FakeEngine:
        started.append(FakeEngine(policy, gap, where, **options))
        return started[-1]

    module = ModuleType("vllm")
    vars(module).update(LLM=start, SamplingParams=SamplingParams)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr("rlzoo.rollout.vllm.find_spec", lambda name: True)
    monkeypatch.setattr("rlzoo.rollout.vllm._engines", {})
    return started
