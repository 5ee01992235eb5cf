"""Inputs from the policy itself: statistics of its distribution, snapshots, values of a critic, and its training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from rlzoo.errors import unknown
from rlzoo.inputs.base import Context, Input, Stage, normal

if TYPE_CHECKING:
    from rlzoo.policy import Policy

TOP = 20
"""The number of most likely tokens in ``top_entropy`` (arXiv 2601.02151)."""


def entropy(logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """The entropy -Σ_v π_v log π_v, in nats."""
    logp = logits.log_softmax(1)
    return -(logp.exp() * logp).sum(1)


def top_entropy(logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """The entropy of the distribution renormalised to its `TOP` most likely tokens, in nats (arXiv 2601.02151)."""
    return entropy(logits.topk(min(TOP, logits.shape[1]), dim=1).values)


def square_mass(logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """The collision probability Σ_v π_v²."""
    return functional.softmax(logits, 1).square().sum(1)


STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    function.__name__: function for function in (entropy, top_entropy, square_mass)
}


@dataclass(frozen=True)
class Statistic(Input):
    """A statistic of the policy's next-token distribution at each position [B, T], without a graph.

    ``entropy``: -Σ_v π_v log π_v; ``top_entropy``: that of the distribution renormalised to the 20 most likely tokens
    (arXiv 2601.02151); both in nats; ``square_mass``: Σ_v π_v². Raises UserError for any other name.
    """

    stage: ClassVar[Stage] = Stage.FORWARD

    name: str

    def __post_init__(self) -> None:
        if self.name not in STATISTICS:
            raise unknown("statistic", self.name, STATISTICS)

    @property
    def key(self) -> str:
        return self.name

    def example(self, logp: Float[Tensor, "B T"], draw: torch.Generator) -> Float[Tensor, "B T"]:
        p, share = logp.exp(), torch.rand(logp.shape, dtype=torch.float64, generator=draw)
        if self.name == "square_mass":  # one of its terms is the token's own
            return p.square() + share * (1 - p).square()
        return math.log(TOP) * share

    def of_logits(self, logits: Float[Tensor, "N V"], target: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        return STATISTICS[self.name](logits)


@dataclass(frozen=True)
class Snapshot(Input):
    """``snapshot_logp`` [B, T]: the policy's log-probs at the start of the batch, in nats.

    `Snapshot("value")` is ``old_value``: the FORWARD input ``value`` at the start of the batch.
    """

    stage: ClassVar[Stage] = Stage.BATCH

    of: str = "logp"

    @property
    def key(self) -> str:
        return "snapshot_logp" if self.of == "logp" else f"old_{self.of}"

    def compute(self, context: Context) -> Float[Tensor, "B T"]:
        return context.now(self.of)

    def example(self, logp: Float[Tensor, "B T"], draw: torch.Generator) -> Float[Tensor, "B T"]:
        return super().example(logp, draw) if self.of == "logp" else 0.3 * normal(logp.shape, draw)


@dataclass(frozen=True)
class TrainingProgress(Input):
    """``progress``, a scalar: the fraction of training that is done, for coefficients that change in training.

    0 at the first step and, unless it is told, in the variance analyzer; below 1 at the last.
    """

    stage: ClassVar[Stage] = Stage.STEP
    key: ClassVar[str] = "progress"

    def compute(self, context: Context) -> Float[Tensor, ""]:
        return torch.tensor(context.progress, device=context.mask.device)

    def example(self, logp: Float[Tensor, "B T"], draw: torch.Generator) -> Float[Tensor, ""]:
        return torch.rand((), dtype=torch.float64, generator=draw)


@dataclass(frozen=True)
class Critic(Input):
    """``value`` [B, T]: a critic's estimate of the return before each token, with its graph.

    A linear head, initialised to 0, on the policy's trunk (``shared``) or on a separately trained copy of it.
    """

    stage: ClassVar[Stage] = Stage.FORWARD
    key: ClassVar[str] = "value"
    initial: ClassVar[float | None] = 0.0

    shared: bool = False

    def example(self, logp: Float[Tensor, "B T"], draw: torch.Generator) -> Float[Tensor, "B T"]:
        return 0.3 * normal(logp.shape, draw)

    def module(self, policy: Policy) -> nn.Module:
        return ValueHead(None if self.shared else policy.copy_of_trunk(), policy.hidden_size)

    def of_hidden(self, module: ValueHead, hidden: Float[Tensor, "N H"]) -> Float[Tensor, " N"]:
        found: Tensor = module.head(hidden)[:, 0]
        return found

    def trunk(self, module: ValueHead) -> nn.Module | None:
        return module.trunk

    def flops(self, module: nn.Module, tokens: int, completion_tokens: int) -> float:
        """2 × parameters of its own trunk × tokens; the head is negligible."""
        trunk = module.trunk
        if not isinstance(trunk, nn.Module):
            return 0.0
        look_up = trunk.get_input_embeddings().weight.numel()  # type: ignore[operator]
        return 2.0 * float(sum(p.numel() for p in trunk.parameters()) - look_up) * tokens


class ValueHead(nn.Module):
    """A linear layer from hidden states to one number, initialised to 0, with its own trunk if it has one."""

    def __init__(self, trunk: nn.Module | None, hidden_size: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
