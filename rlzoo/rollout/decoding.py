"""Decoding with a key-value cache: one prefill per prompt for all its samples, and finished sequences are removed."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rlzoo.advantages import running_sum
from rlzoo.config import Sampling
from rlzoo.errors import UserError
from rlzoo.jobs.memory import is_out_of_memory, on_device, pins
from rlzoo.jobs.ranks import gathered, is_sharded, summed
from rlzoo.policy import Policy
from rlzoo.policy.head import computing_in
from rlzoo.policy.packing import HALF
from rlzoo.rollout.static_decoding import PATIENCE, StaticBatch, run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEAVE = 0.125
"""Finished sequences are removed once they are this fraction of a batch, because removal copies the cache."""
CLOSE = {True: 0.02, False: 1e-3}
"""The tolerated rounding difference of logits, relative to the largest: in 16 bits (True) or more (False)."""


class _Growing(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in a growing buffer; transformers' own cache copies all of them at every step."""

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
    """A buffer with the ``past`` positions of a cache and room for half as many positions again."""
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
    """Continues prompts with a policy, one token of every unfinished sequence at a time."""

    def __init__(self, policy: Policy, static_shapes: bool | None = None) -> None:
        """``static_shapes``: see `static_decoding`; None: on a GPU, if they do not change the model's logits."""
        self.policy = policy  # modules are looked up at every step: an adapter may replace one
        known = inspect.signature(policy.model.base_model.forward).parameters
        self.takes_positions = "position_ids" in known
        self._cache_name = "cache" if "cache" in known else "past_key_values"  # as transformers 5.19 calls it
        self.static_shapes = static_shapes
        self._takes_static: bool | None = None  # None: not tried yet
        self.refuses_graphs = False
        """Whether capturing a CUDA graph of this model has failed."""

    @torch.no_grad()
    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        settings: Sampling,
        draws: Float[np.ndarray, "B T"] | None,
    ) -> list[list[int]]:
        """The tokens of ``copies`` completions per prompt, including the end of sequence; B = prompts × copies.

        ``draws`` are uniform on [0, 1), one per token; None decodes greedily. All processes of a sharded model must
        call this together, perhaps with different prompts, or none. Raises UserError if ``static_shapes`` is True but
        changes the model's logits.
        """
        policy = self.policy
        if not is_sharded(policy):
            with computing_in(policy.compute, policy.device):  # autocast then casts each weight only once
                return self._decode(prompts, copies, settings, draws, lambda: None)
        most = max(gathered(settings.max_new_tokens if prompts else 0))
        steps = itertools.count(1)

        def again(unfinished: bool) -> bool:
            """Whether any process has another step; all call this before each."""
            step = next(steps)
            if step == most or step % self._patience:
                return step < most
            return bool(summed(torch.tensor([float(unfinished)], device=policy.device)))

        if prompts:
            found = self._decode(prompts, copies, settings, draws, lambda: again(True))
        else:
            found = []
            self._idle()
        while again(False):
            self._idle()
        return found

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        copies: int,
        settings: Sampling,
        draws: Float[np.ndarray, "B T"] | None,
        before_step: Callable[[], object],
    ) -> list[list[int]]:
        """See `decode`; ``before_step`` is called before every forward pass but the first."""
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
        if self._is_static(room):
            pick = partial(_pick, settings=settings)
            batch = StaticBatch(cache, mask, logits, uniform, room, ends, self._next_logits, pick)
            self.refuses_graphs |= not run(batch, pins(device) and not self.refuses_graphs)
            return batch.completions()
        found = torch.full((len(logits), room), -1, device=device)
        rows = torch.arange(len(logits), device=device)
        alive = torch.ones(len(logits), dtype=torch.bool, device=device)
        for step in range(room):
            token = _pick(logits, None if uniform is None else uniform[rows, step], settings)
            found[:, step].index_copy_(0, rows, torch.where(alive, token, -1))
            alive &= ~torch.isin(token, ends)
            if step + 1 == room:
                break
            live = alive.tolist() if (step + 1) % self._patience == 0 else [True] * len(rows)
            if not any(live):
                break
            if live.count(False) >= LEAVE * len(rows):
                stay = on_device(torch.tensor([row for row, is_live in enumerate(live) if is_live]), device)
                cache.batch_select_indices(stay)
                rows, token, mask, position, alive = (x[stay] for x in (rows, token, mask, position, alive))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            before_step()
            logits = self._next_logits(token[:, None], mask, position, cache)
            position = position + 1
        return [[token for token in row if token >= 0] for row in found.tolist()]

    @property
    def _patience(self) -> int:
        """The number of tokens between checks for finished sequences."""
        return 1 if self.policy.device.type == "cpu" else PATIENCE

    def _idle(self) -> None:
        """A forward pass of one token, so that other processes of a sharded model can run theirs."""
        ids, mask = padded([[0]], self.policy.device)
        self._next_logits(ids, mask, mask.cumsum(1) - 1, self._cache())

    def _is_static(self, tokens: int) -> bool:
        """Whether to decode this number of tokens with static shapes."""
        wanted = self.static_shapes
        if wanted is None:
            wanted = self.policy.device.type == "cuda" and tokens > 2 * PATIENCE and not self.refuses_graphs
        if not wanted or is_sharded(self.policy):
            return False
        if self._takes_static is None:
            self._takes_static = self._same_logits()
        if self.static_shapes and not self._takes_static:
            raise UserError("static_shapes: they change this model's logits: remove the option")
        return self._takes_static

    def _same_logits(self) -> bool:
        """Whether static shapes leave the model's logits unchanged, tried on two prompts and one more token."""
        if not self.takes_positions or any(type(layer) is not _Growing for layer in self._cache().layers):
            return False
        device = self.policy.device
        ids, mask = padded([[0], [0, 1, 0]], device)
        token, found = torch.ones(2, 1, dtype=torch.long, device=device), list[Tensor]()

        def note(logits: Tensor, uniform: Tensor | None) -> Tensor:
            found.append(logits)
            return token[:, 0]

        try:
            for _ in range(2):
                cache = self._cache()
                logits = self._next_logits(ids, mask, mask.cumsum(1) - 1, cache)
                if found:
                    StaticBatch(cache, mask, logits, None, 2, token[0], self._next_logits, note).step()
                else:
                    longer = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
                    note(self._next_logits(token, longer, mask.sum(1, keepdim=True), cache), None)
        except Exception as error:  # a model's own code can do anything with its mask and its cache
            if is_out_of_memory(error):
                raise
            return False
        gap, scale = (found[0] - found[-1]).abs().max(), found[0].abs().max()
        return bool(gap <= CLOSE[(self.policy.compute or self.policy.model.dtype) in HALF] * scale)

    def _cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.policy.model.config)
        if cache.layers and all(type(layer) is DynamicLayer for layer in cache.layers):
            cache.layers = [_Growing() for _ in cache.layers]
        return cache

    def _next_logits(
        self, ids: Int[Tensor, "B L"], mask: Bool[Tensor, "B ..."], positions: Int[Tensor, "B L"], cache: DynamicCache
    ) -> Float[Tensor, "B V"]:
        """The logits after the last position of each sequence."""
        extra: dict[str, Any] = {self._cache_name: cache}
        if self.takes_positions:
            extra["position_ids"] = positions.clamp(min=0)
        policy = self.policy

        def work() -> Tensor:
            trunk = policy.model.base_model
            out = trunk(input_ids=ids, attention_mask=mask, use_cache=True, **extra)
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


def _pick(logits: Float[Tensor, "B V"], uniform: Float[Tensor, " B"] | None, settings: Sampling) -> Int[Tensor, " B"]:
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
