"""Batches to try coefficients on: from probabilities written by hand, and random ones with every input there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlzoo import testing
from rlzoo.inputs import (
    Behaviour,
    Critic,
    FromDemonstration,
    Input,
    Mismatched,
    Outcome,
    Reference,
    Snapshot,
    Statistic,
    Truncated,
)
from rlzoo.objective import Objective, get_objective
from rlzoo.testing.batches import PADDING
from rlzoo.types import TokenBatch

SEEDS = range(2)
REQUIRED: Mapping[str, Mapping[str, Any]] = {
    "opd": {"teacher": "embedded"},
    "mixture": {"weights": {"sft": 0.5, "grpo": 0.5}},
}
"""Values of options without a default."""


def built(name: str, **options: Any) -> Objective:
    """An objective with these options, and with some for those that have no default."""
    return get_objective(name, **{**REQUIRED.get(name, {}), **options})


@dataclass(frozen=True)
class Everything(Objective):
    """Asks for all built-in inputs."""

    name: ClassVar[str] = "everything"
    requires: ClassVar[tuple[Input, ...]] = (
        Behaviour(), Reference(), Snapshot(), Snapshot("value"), Critic(), Truncated(), Mismatched(),
        FromDemonstration(), Outcome(),
        *(Statistic(name) for name in ("entropy", "top_entropy", "square_mass")),
    )  # fmt: skip


def random_batch(seed: int, padding: Sequence[float] = PADDING) -> TokenBatch:
    """The random batch of `rlzoo.testing`, with every built-in input."""
    return testing.random_batch(Everything(), seed, padding)


def of_each_kind(objectives: Mapping[str, Objective]) -> list[str]:
    """The first objective of each kind that the engine can tell apart: others run the same code on the same batches."""
    kinds: dict[Any, str] = {}
    for name, one in objectives.items():
        has_auxiliary = type(one).auxiliary is not Objective.auxiliary
        kind = frozenset(one.requires), one.learns_from, one.couples, one.normaliser, one.has_logit_term, has_auxiliary
        kinds.setdefault(kind, name)
    return list(kinds.values())


def hand_batch(probabilities: list[list[float]], **columns: Any) -> TokenBatch:
    """A batch from token probabilities; rows are padded to the longest with 0, which is masked."""
    width = max(map(len, probabilities))
    table = torch.tensor([row + [0.0] * (width - len(row)) for row in probabilities], dtype=torch.float64)
    return TokenBatch(logp=table.log().requires_grad_(), mask=table > 0, **columns)


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    """Equal up to ``tolerance`` relative to the norm of ``theirs``, which must not be 0."""
    assert theirs.norm() > 0
    assert torch.isfinite(ours).all()
    assert float((ours - theirs).norm() / theirs.norm()) <= tolerance
