"""What an objective may ask for beside the rows themselves: the interface that built-in and other inputs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlzoo.errors import UserError
from rlzoo.types import Trajectory

if TYPE_CHECKING:
    from rlzoo.policy import Policy


class Stage(Enum):
    """When an input is computed."""

    STORED = "stored"
    """A value of the row's own. Where rows lack it and it can be computed, it is, once, and kept in the buffer."""
    BATCH = "batch"
    """Once for a batch, with no graph; the same for all updates on it."""
    STEP = "step"
    """Anew before each optimizer step, with no graph."""
    FORWARD = "forward"
    """In every forward pass of the policy."""


class Context(Protocol):
    """What an input is computed from: the rows of a batch, the policy as it is, and other models."""

    @property
    def rows(self) -> Sequence[Trajectory]: ...
    @property
    def units(self) -> Sequence[tuple[int, ...]]:
        """The rows that belong together: pairs, groups, or single rows."""
        ...

    @property
    def mask(self) -> Bool[Tensor, "B T"]:
        """True at completion tokens; on the device that values belong on."""
        ...

    @property
    def policy(self) -> Policy: ...
    @property
    def own(self) -> Policy:
        """The input's moving model."""
        ...

    def model(self, name: str | None) -> Policy:
        """A frozen model that `Input.models` names."""
        ...

    def log_probs(self, model: Policy, rows: Sequence[Trajectory] | None = None) -> Float[Tensor, "R T"]:
        """A model's log-probs of the batch's rows, or of others: 0 at padding, no graph, each at its temperature."""
        ...

    def encode(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """The token ids of a prompt or a conversation, as the policy is shown it."""
        ...

    def now(self, key: str = "logp") -> Float[Tensor, "B T"]:
        """The policy's log-probs, or a FORWARD input of the same objective, as they are now, with no graph."""
        ...


def normal(shape: Sequence[int], draw: torch.Generator) -> Float[Tensor, ...]:
    """Standard normal numbers in float64."""
    return torch.randn(tuple(shape), dtype=torch.float64, generator=draw)


@dataclass(frozen=True)
class Input:
    """One thing that an objective asks for, under a ``key`` of the batch.

    A subclass is a frozen dataclass, so that equal inputs are the same input, computed once. It sets ``stage`` and
    ``key``, and overrides what that stage uses: `compute` for STORED (or `stored` alone, for what only a buffer can
    know), BATCH and STEP; `of_logits` or `module` with `of_hidden` for FORWARD.
    """

    stage: ClassVar[Stage]
    at_sampling_temperature: ClassVar[bool] = False
    """Whether objectives with this input take all log-probs at the temperature that a row was sampled at."""
    initial: ClassVar[float | None] = None
    """What `of_hidden` gives before the first step, where it is one number: an analysis then makes no module."""

    @property
    def key(self) -> str:
        """Its name in the batch; a class variable where it is always the same."""
        raise NotImplementedError(f"{type(self).__name__} must define key")

    @property
    def column(self) -> str:
        """STORED: the name that its values have in a buffer."""
        return self.key

    def stored(self, row: Trajectory) -> Sequence[float] | float | None:
        """STORED: a row's own value, one number per completion token or one in all; None if the row has none."""
        found: Sequence[float] | float | None = row.stored(self.column)
        return found

    def compute(self, context: Context) -> Float[Tensor, "B T"] | Float[Tensor, " B"] | Float[Tensor, ""]:
        """STORED, BATCH, STEP: the values of all rows of the context."""
        raise UserError(f"the buffer has no {self.column}")

    @property
    def is_computed(self) -> bool:
        """Whether it defines `compute`."""
        return type(self).compute is not Input.compute

    def of_logits(self, logits: Float[Tensor, "N V"], target: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """FORWARD, with no graph: from logits over temperature, a chunk at a time; they must not be changed."""
        raise NotImplementedError(f"{type(self).__name__} must define of_logits(logits, target)")

    @property
    def is_statistic(self) -> bool:
        """Whether it defines `of_logits`."""
        return type(self).of_logits is not Input.of_logits

    def module(self, policy: Policy) -> nn.Module | None:
        """FORWARD: a module of the input's own, trained and saved with the policy; its state is checkpointed too."""
        return None

    def of_hidden(self, module: Any, hidden: Float[Tensor, "N H"]) -> Float[Tensor, " N"]:
        """FORWARD, with its graph: what the module makes of the last hidden states at completion positions."""
        raise NotImplementedError(f"{type(self).__name__} has a module, and must define of_hidden(module, hidden)")

    @property
    def lacks(self) -> str | None:
        """What its stage asks for and it does not define; None if nothing."""
        if self.stage in (Stage.BATCH, Stage.STEP):
            return None if self.is_computed else "compute(context)"
        has_module = type(self).module is not Input.module
        made = self.stage is Stage.STORED or self.is_statistic or has_module or self.gives_logits
        return None if made else "of_logits(logits, target), or module(policy) with of_hidden(module, hidden)"

    def trunk(self, module: Any) -> nn.Module | None:
        """FORWARD: the trunk whose hidden states `of_hidden` takes, within the module; None: the policy's."""
        return None

    def flops(self, module: nn.Module, tokens: int, completion_tokens: int) -> float:
        """FLOPs of the module's forward pass: 2 per parameter and completion token."""
        return 2.0 * sum(p.numel() for p in module.parameters()) * completion_tokens

    def models(self) -> tuple[str | None, ...]:
        """Frozen models to load once and share, as `load_policy` takes them; None is the initial policy."""
        return ()

    @property
    def gives_logits(self) -> bool:
        """FORWARD: whether the logits of its one model go to `Objective.logit_term`, and nothing into the batch."""
        return False

    def moving_model(self, policy: Policy) -> Policy | None:
        """A model of the input's own that `after_step` moves, as it is before training; it is checkpointed."""
        return None

    def after_step(self, context: Context) -> None:
        """Called after each optimizer step; the context has no rows."""

    def example(self, logp: Float[Tensor, "B T"], draw: torch.Generator) -> Float[Tensor, "B T"] | Float[Tensor, " B"]:
        """Values that it might have beside these log-probs, for `rlzoo.testing`: log-probs that are near to them."""
        return logp + 0.4 * normal(logp.shape, draw)

    @property
    def label(self) -> str:
        """What the documents call it."""
        return self.key.removesuffix("_logp").replace("_", " ")
