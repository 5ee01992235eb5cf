"""A count of the changes of a model's weights, for whoever holds a copy of them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


def _mark_stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Fused kernels leave torch's count of a tensor's changes as it was."""
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])


register_optimizer_step_post_hook(_mark_stepped)


class Changes:
    """Counts the changes of one model: of a tensor in place, which torch counts, and of one tensor for another."""

    def __init__(self) -> None:
        self._count = 0
        self._seen: list[tuple[weakref.ref[Tensor], int]] = []

    def count(self, model: nn.Module) -> int:
        """A greater number whenever a weight is another than at the last call."""
        now = list(model.parameters())
        same = len(now) == len(self._seen) and all(
            tensor is seen() and tensor._version == version  # by id, a new tensor could pass for an old one
            for tensor, (seen, version) in zip(now, self._seen, strict=True)
        )
        if not same:
            self._count += 1
            self._seen = [(weakref.ref(tensor), tensor._version) for tensor in now]
        return self._count

    def add(self) -> None:
        """Have the next call of `count` find a change."""
        self._seen = []


_changes: weakref.WeakKeyDictionary[nn.Module, Changes] = weakref.WeakKeyDictionary()


def changes_of(model: nn.Module) -> Changes:
    """The count of a model: the same for every policy that stands on it."""
    return _changes.setdefault(model, Changes())
