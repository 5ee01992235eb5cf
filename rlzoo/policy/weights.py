"""Counting changes of a model's weights, so that copies of them can be updated."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


def _mark_stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Count a step: fused kernels do not increment torch's version counters."""
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])


register_optimizer_step_post_hook(_mark_stepped)


class Changes:
    """Counts changes of one model's weights: replaced tensors and, by torch's version counters, in-place changes."""

    def __init__(self) -> None:
        self._count = 0
        self._seen: list[tuple[weakref.ref[Tensor], int]] = []

    def count(self, model: nn.Module) -> int:
        """A number that increases if a weight has changed since the last call."""
        now = list(model.parameters())
        same = len(now) == len(self._seen) and all(
            tensor is seen() and tensor._version == version  # ids are reused
            for tensor, (seen, version) in zip(now, self._seen, strict=True)
        )
        if not same:
            self._count += 1
            self._seen = [(weakref.ref(tensor), tensor._version) for tensor in now]
        return self._count

    def add(self) -> None:
        """Make the next call of `count` see a change."""
        self._seen = []


_changes: weakref.WeakKeyDictionary[nn.Module, Changes] = weakref.WeakKeyDictionary()


def changes_of(model: nn.Module) -> Changes:
    """The counter of a model, shared by all policies with this model."""
    return _changes.setdefault(model, Changes())
