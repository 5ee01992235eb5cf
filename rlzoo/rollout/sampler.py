"""The Sampler protocol and the sampler that needs nothing but transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from rlzoo.config import Sampling
from rlzoo.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sample:
    """One sampled completion."""

    ids: list[int]
    """Tokens up to and with the end of sequence; without one if truncated."""
    text: str
    """The tokens as text, special tokens left out."""
    truncated: bool
    """True if ``max_new_tokens`` came before an end of sequence."""


class Sampler(Protocol):
    """Anything that continues prompts."""

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        seed: int,
        greedy: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Sample]]:
        """``settings.samples`` completions of each prompt, one if ``greedy``; the same for the same seed.

        ``progress`` is told how many prompts are done.
        """
        ...


class TransformersSampler:
    """Samples with transformers' ``generate``; prompts of like length share a batch."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sampling,
        seed: int,
        greedy: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Sample]]:
        copies = 1 if greedy else settings.samples
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        size = max(1, settings.batch_size // copies)
        results: list[list[Sample]] = [[] for _ in prompts]
        training = self.policy.training
        self.policy.eval()
        devices = [self.policy.device] if self.policy.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # sampling leaves the caller's random state alone
            torch.manual_seed(seed)
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                for index, samples in zip(
                    batch, self._generate([prompts[i] for i in batch], settings, copies, greedy), strict=True
                ):
                    results[index] = samples
                if progress is not None:
                    progress(len(batch))
        self.policy.train(training)
        return results

    @torch.no_grad()
    def _generate(
        self, prompts: list[Sequence[int]], settings: Sampling, copies: int, greedy: bool
    ) -> list[list[Sample]]:
        policy, tokenizer = self.policy, self.policy.tokenizer
        longest = max(map(len, prompts))
        padding, ends = tokenizer.pad_token_id, sorted(policy.eos_ids)
        ids = torch.full((len(prompts), longest), padding)
        attention = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
            attention[row, longest - len(prompt) :] = 1
        # top_k = 0: the library's own default keeps 50 tokens
        how = {"do_sample": False} if greedy else {
            "do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0,
            "num_return_sequences": copies,
        }  # fmt: skip
        with _no_defaults(policy.model):
            out = policy.model.generate(
                input_ids=ids.to(policy.device),
                attention_mask=attention.to(policy.device),
                max_new_tokens=settings.max_new_tokens,
                pad_token_id=padding,
                eos_token_id=ends,
                **how,
            )
        rows = out[:, longest:].tolist()
        samples = [self._sample(row) for row in rows]
        return [samples[i : i + copies] for i in range(0, len(samples), copies)]

    def _sample(self, ids: list[int]) -> Sample:
        end = next((i for i, token in enumerate(ids) if token in self.policy.eos_ids), None)
        kept = ids if end is None else ids[: end + 1]
        text = self.policy.tokenizer.decode(kept, skip_special_tokens=True)
        return Sample(kept, text, truncated=end is None)


@contextmanager
def _no_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Put a checkpoint's own generation settings aside: beams, penalties or min_p would sample from a distribution
    other than the one whose log-probs are recorded."""
    from transformers import GenerationConfig

    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept
