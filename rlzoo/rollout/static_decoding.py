"""Decoding with static shapes: every step reads and writes the same memory, so that a CUDA graph can replay it.

A step of a small batch consists of hundreds of small kernels, which a GPU runs faster than Python can launch them; a
CUDA graph launches all of them at once. A step must then not depend on the CPU: buffers of keys and values have room
for future positions, masked until they are written, and the position to write to is itself a tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from rlzoo.jobs.memory import is_out_of_memory, on_device

PATIENCE = 16
"""The number of tokens between checks for finished sequences on a GPU, each of which waits for the GPU."""
LEAVE = 0.5
"""Finished sequences are removed once they are this fraction of a batch, because a new shape needs a new capture."""
ROOM, BLOCK = 256, 64
"""The number of initially free positions, and the unit of a buffer's length. Buffers grow by half of their length."""

NextLogits = Callable[[Tensor, Tensor, Tensor, DynamicCache], Tensor]
"""Tokens, mask, positions and cache → the logits after the last position of each sequence."""
Pick = Callable[[Tensor, "Tensor | None"], Tensor]
"""Logits, and a uniform number per sequence or None → the next token of each."""


class FixedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in a buffer of fixed length, written at the position in the tensor ``at``."""

    def __init__(self, keys: Tensor, values: Tensor, length: int, at: Int[Tensor, " 1"]) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = _longer(keys, length), _longer(values, length)
        self.at = at

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one new position of each sequence, and return the whole buffers."""
        self.keys.index_copy_(2, self.at, key_states)
        self.values.index_copy_(2, self.at, value_states)
        return self.keys, self.values


def _longer(past: Tensor, length: int) -> Tensor:
    """A copy with ``length`` positions; new ones are zero, because masked values are multiplied by 0."""
    rows, heads, positions, size = past.shape
    buffer = past.new_zeros(rows, heads, length, size)
    buffer[:, :, :positions] = past
    return buffer


class StaticBatch:
    """Unfinished sequences, with all tensors that a step reads and writes."""

    def __init__(
        self,
        cache: DynamicCache,
        mask: Bool[Tensor, "B P"],
        logits: Float[Tensor, "B V"],
        uniform: Float[Tensor, "B T"] | None,
        tokens: int,
        ends: Int[Tensor, " E"],
        next_logits: NextLogits,
        pick: Pick,
    ) -> None:
        """``mask`` and ``cache`` are those of the prompts, and ``logits`` those of the first new token."""
        rows, device = len(logits), logits.device
        self.ends, self.next_logits, self.pick, self.cache = ends, next_logits, pick, cache
        self.tokens, self.past = tokens, mask.shape[1]
        self.most = self.past + tokens
        self.found = torch.full((rows * tokens,), -1, device=device)
        self.uniform = None if uniform is None else uniform.flatten()
        self.place = torch.arange(rows, device=device) * tokens
        """The next entry of each sequence in ``found`` and in ``uniform``."""
        self.at = torch.full((1,), self.past, device=device)
        self.position = mask.sum(1, keepdim=True)
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)
        self.token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._choose(logits)
        self._make_room(mask)

    def _make_room(self, mask: Bool[Tensor, "B P"], stay: Int[Tensor, " S"] | None = None) -> None:
        """New buffers with all positions so far: longer ones, or those of the sequences in ``stay``."""
        length = min(self.past + max(ROOM, self.past // 2), self.most)
        length += -length % BLOCK
        layers, self.cache.layers = self.cache.layers, []
        while layers:  # one after the other, so that old buffers are freed early
            own = layers.pop(0)
            keys, values = (x[:, :, : self.past] for x in (own.keys, own.values))
            if stay is not None:
                keys, values = keys[stay], values[stay]
            self.cache.layers.append(FixedLayer(keys, values, length, self.at))
        self.mask = mask.new_zeros(len(mask), 1, 1, length)
        self.mask[:, 0, 0, : self.past] = mask[:, : self.past]

    def _choose(self, logits: Float[Tensor, "B V"]) -> None:
        token = self.pick(logits, None if self.uniform is None else self.uniform.index_select(0, self.place))
        self.found.index_copy_(0, self.place, torch.where(self.alive, token, -1))
        self.alive.logical_and_((token[:, None] != self.ends).all(1))
        self.token.copy_(token[:, None])
        self.place.add_(1)

    def step(self) -> None:
        """One more token of every sequence, without synchronisation with the CPU and with unchanged shapes."""
        self.mask.index_fill_(3, self.at, True)
        logits = self.next_logits(self.token, self.mask, self.position, self.cache)
        self._choose(logits)
        self.position.add_(1)
        self.at.add_(1)

    @property
    def is_full(self) -> bool:
        """Whether the next step needs more room."""
        return self.past == self.mask.shape[3]

    def keep(self, live: Sequence[bool]) -> None:
        """Keep only the ``live`` sequences."""
        stay = on_device(torch.tensor([row for row, is_live in enumerate(live) if is_live]), self.token.device)
        for name in ("token", "alive", "position", "place"):
            setattr(self, name, getattr(self, name)[stay])
        self._make_room(self.mask[stay, 0, 0], stay)

    def grow(self) -> None:
        """Make room for more positions."""
        self._make_room(self.mask[:, 0, 0])

    def completions(self) -> list[list[int]]:
        """The tokens of all sequences so far, each up to its end of sequence."""
        return [[token for token in row if token >= 0] for row in self.found.view(-1, self.tokens).tolist()]


def run(batch: StaticBatch, graphs: bool) -> bool:
    """Decode until all sequences end, with CUDA graphs if ``graphs``; returns whether the model supports them."""
    replay: Callable[[], None] | None = None
    allowed = True
    number = 1
    while number < batch.tokens:
        if batch.is_full:
            replay = None  # it keeps the old buffers alive
            batch.grow()
        if graphs and replay is None and batch.tokens - number > PATIENCE:
            replay = captured(batch.step, batch.token.device)
            allowed = graphs = replay is not None
        else:
            (replay or batch.step)()
        batch.past += 1
        number += 1
        if number % PATIENCE == 0 and number < batch.tokens:
            live = batch.alive.tolist()
            if not any(live):
                break
            if live.count(False) >= LEAVE * len(live):
                replay = None
                batch.keep(live)
    return allowed


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None] | None:
    """Run a step, and capture a CUDA graph of it to replay; None, with a warning, if the model does not support that.

    The step that is run lets libraries initialise and autocast cast the weights before the capture.
    """
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    here, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        step()
    here.wait_stream(stream)
    try:
        # this records without running, and other threads may use the GPU meanwhile
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"sampling without CUDA graphs, which this model does not support: {reason}", stacklevel=2)
        return None
    return graph.replay
