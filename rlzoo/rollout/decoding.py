"""Decoding with a key-value cache: a prompt is processed once for all its samples, and finished sequences leave."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rlzoo.config import Sampling
from rlzoo.jobs.memory import on_device
from rlzoo.policy import Policy
from rlzoo.types import running_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAVE = 0.125
"""Finished sequences leave when they are this fraction of a batch, as closing the gaps copies the cache."""
PATIENCE = 16
"""Tokens after which a GPU is asked which sequences have finished: the host waits for the answer."""


class _Growing(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in a growing buffer; the library's own cache copies them all at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self._room: tuple[Tensor, ...] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append new states, each [B, heads, positions, size], and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        length = past + key_states.shape[-2]
        if self._room is None or length > self._room[0].shape[-2]:
            both = ((self.keys, key_states), (self.values, value_states))
            self._room = tuple(_roomier(old, new, past, length) for old, new in both)
        for buffer, new in zip(self._room, (key_states, value_states), strict=True):
            buffer[:, :, past:length] = new
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._room)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence; the next update allocates a new buffer."""
        super().batch_repeat_interleave(repeats)
        self._room = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences; the next update allocates a new buffer."""
        super().batch_select_indices(indices)
        self._room = None


def _roomier(old: Tensor, new: Tensor, past: int, length: int) -> Tensor:
    """A buffer with the past of a cache and room for half as many positions again."""
    rows, heads, _, size = new.shape
    buffer = new.new_empty(rows, heads, length + length // 2 if past else length, size)
    if past:
        buffer[:, :, :past] = old
    return buffer


def can_decode(model: PreTrainedModel) -> bool:
    """Whether the model's cache is only keys and values, which can be repeated and selected by sequence."""
    if getattr(model, "_is_stateful", False) or not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        return False
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=model.config).layers
    )


class Decoder:
    """Continues prompts with a policy, one token per unfinished sequence at a time."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy  # modules are looked up at every step: an adapter may replace one
        self.takes_positions = "position_ids" in inspect.signature(policy.model.base_model.forward).parameters

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        settings: Sampling,
        draws: Float[np.ndarray, "B T"] | None,
    ) -> list[list[int]]:
        """``copies`` completions per prompt, B = prompts × copies in all, each including its end of sequence.

        ``draws`` are uniform on [0, 1), one per token; None decodes greedily.
        """
        device, room = self.policy.device, settings.max_new_tokens
        ids, mask = padded(prompts, device)
        cache = self._cache()
        logits = self._next_logits(ids, mask, mask.cumsum(1) - 1, cache)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
            mask, logits = (x.repeat_interleave(copies, 0) for x in (mask, logits))
        position = mask.sum(1, keepdim=True)
        ends = on_device(torch.tensor(sorted(self.policy.eos_ids)), device)
        uniform = None if draws is None else on_device(torch.as_tensor(draws), device)
        patience = 1 if device.type == "cpu" else PATIENCE
        found = torch.full((len(logits), room), -1, device=device)
        rows = torch.arange(len(logits), device=device)
        alive = torch.ones(len(logits), dtype=torch.bool, device=device)
        for step in range(room):
            token = _pick(logits, settings, None if uniform is None else uniform[rows, step])
            found[:, step].index_copy_(0, rows, torch.where(alive, token, -1))
            alive &= ~torch.isin(token, ends)
            if step + 1 == room:
                break
            live = alive.tolist() if (step + 1) % patience == 0 else [True] * len(rows)
            if not any(live):
                break
            if live.count(False) >= LEAVE * len(rows):
                stay = on_device(torch.tensor([row for row, is_live in enumerate(live) if is_live]), device)
                cache.batch_select_indices(stay)
                rows, token, mask, position, alive = (x[stay] for x in (rows, token, mask, position, alive))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self._next_logits(token[:, None], mask, position, cache)
            position = position + 1
        return [[token for token in row if token >= 0] for row in found.tolist()]

    def _cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.policy.model.config)
        if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers):
            cache.layers = [_Growing() for _ in cache.layers]
        return cache

    def _next_logits(
        self, ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B P"], positions: Int[Tensor, "B L"], cache: DynamicCache
    ) -> Float[Tensor, "B V"]:
        """The logits after the last position of each sequence."""
        extra = {"position_ids": positions.clamp(min=0)} if self.takes_positions else {}
        policy = self.policy

        def work() -> Tensor:
            trunk = policy.model.base_model
            out = trunk(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
            return policy.head.logits(out.last_hidden_state[:, -1])

        return policy.run(work)


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Prompts padded on the left, and the mask of their tokens."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, longest - len(prompt) :] = True
    return on_device(ids, device), on_device(mask, device)


def _pick(logits: Float[Tensor, "B V"], settings: Sampling, uniform: Float[Tensor, " B"] | None) -> Int[Tensor, " B"]:
    """The most likely token, or the one at which the cumulative probability exceeds ``uniform``."""
    if uniform is None:
        return logits.argmax(1)
    probability = (logits / settings.temperature).softmax(1)
    order = None
    if settings.top_p < 1.0:
        probability, order = probability.sort(1, descending=True)
        probability = probability * (running_sum(probability) - probability < settings.top_p)
    cumulative = running_sum(probability, torch.float64)  # float32 would round away rare tokens at its end
    place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    place = place.clamp(max=logits.shape[1] - 1)
    return (place if order is None else order.gather(1, place))[:, 0]
