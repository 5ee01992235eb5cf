"""The interface of inputs: what an objective may request besides the rows themselves."""

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
    """A value of each row; if rows lack it and it can be computed, it is computed once and kept in the buffer."""
    BATCH = "batch"
    """Once per batch, without a graph; the same for all updates on it."""
    STEP = "step"
    """Before each optimizer step, without a graph."""
    FORWARD = "forward"
    """In every forward pass of the policy."""


class Context(Protocol):
    """What an input is computed from: the rows of a batch, the current policy, and other models."""

    @property
    def rows(self) -> Sequence[Trajectory]: ...
    @property
    def units(self) -> Sequence[tuple[int, ...]]:
        """The units of the batch, as indices into its rows: pairs, groups, or single rows."""
        ...

    @property
    def mask(self) -> Bool[Tensor, "B T"]:
        """True at completion tokens; its device is where values belong."""
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
        """A model's log-probs of the batch's rows, or of others, each at its temperature; 0 at padding, no graph."""
        ...

    def encode(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """The token ids of a prompt or a conversation, encoded as for the policy."""
        ...

    def now(self, key: str = "logp") -> Float[Tensor, "B T"]:
        """The current log-probs of the policy, or a FORWARD input of the same objective, without a graph."""
        ...


def normal(shape: Sequence[int], draw: torch.Generator) -> Float[Tensor, ...]:
    """Standard normal numbers in float64."""
    return torch.randn(tuple(shape), dtype=torch.float64, generator=draw)


@dataclass(frozen=True)
class Input:
    """Something that an objective requests, under a ``key`` of the batch.

    A subclass is a frozen dataclass, so that equal inputs are the same input, computed once. It sets ``stage`` and
    ``key``, and overrides what that stage uses: `compute` for STORED (or `stored` alone, for what only a buffer can
    know), BATCH and STEP; `of_logits` or `module` with `of_hidden` for FORWARD.
    """

    stage: ClassVar[Stage]
    at_sampling_temperature: ClassVar[bool] = False
    """Whether objectives with this input take all log-probs at the row's sampling temperature."""
    initial: ClassVar[float | None] = None
    """The value of `of_hidden` before the first step, if it is a constant: an analysis then makes no module."""

    @property
    def key(self) -> str:
        """Its name in the batch; may be a class variable."""
        raise NotImplementedError(f"{type(self).__name__} must define key")

    @property
    def column(self) -> str:
        """STORED: the name of its values in a buffer."""
        return self.key

    def stored(self, row: Trajectory) -> Sequence[float] | float | None:
        """STORED: a row's own value, one number per completion token or a single one; None if the row has none."""
        found: Sequence[float] | float | None = row.stored(self.column)
        return found

    def compute(self, context: Context) -> Float[Tensor, "B T"] | Float[Tensor, " B"] | Float[Tensor, ""]:
        """STORED, BATCH, STEP: the values for all rows of the context."""
        raise UserError(f"the buffer has no {self.column}")

    @property
    def is_computed(self) -> bool:
        """Whether it defines `compute`."""
        return type(self).compute is not Input.compute

    def of_logits(self, logits: Float[Tensor, "N V"], target: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """FORWARD, without a graph: from logits divided by the temperature, in chunks; must not change them."""
        raise NotImplementedError(f"{type(self).__name__} must define of_logits(logits, target)")

    @property
    def is_statistic(self) -> bool:
        """Whether it defines `of_logits`."""
        return type(self).of_logits is not Input.of_logits

    def module(self, policy: Policy) -> nn.Module | None:
        """FORWARD: a module that the input owns, trained and checkpointed with the policy."""
        return None

    def of_hidden(self, module: Any, hidden: Float[Tensor, "N H"]) -> Float[Tensor, " N"]:
        """FORWARD, with its graph: the module's output from the last hidden states at completion positions."""
        raise NotImplementedError(f"{type(self).__name__} has a module, and must define of_hidden(module, hidden)")

    @property
    def lacks(self) -> str | None:
        """The methods that its stage needs and it does not define; None if there are none."""
        if self.stage in (Stage.BATCH, Stage.STEP):
            return None if self.is_computed else "compute(context)"
        has_module = type(self).module is not Input.module
        made = self.stage is Stage.STORED or self.is_statistic or has_module or self.gives_logits
        return None if made else "of_logits(logits, target), or module(policy) with of_hidden(module, hidden)"

    def trunk(self, module: Any) -> nn.Module | None:
        """FORWARD: the trunk in the module whose hidden states `of_hidden` takes; None: the policy's."""
        return None

    def flops(self, module: nn.Module, tokens: int, completion_tokens: int) -> float:
        """FLOPs of the module's forward pass: 2 per parameter and completion token."""
        return 2.0 * sum(p.numel() for p in module.parameters()) * completion_tokens

    def models(self) -> tuple[str | None, ...]:
        """Frozen models to load once and share, as `load_policy` takes them; None is the initial policy."""
        return ()

    @property
    def gives_logits(self) -> bool:
        """FORWARD: whether the logits of its model go to `Objective.logit_term` rather than into the batch."""
        return False

    def moving_model(self, policy: Policy) -> Policy | None:
        """The initial state of a model that `after_step` updates; it is checkpointed."""
        return None

    def after_step(self, context: Context) -> None:
        """Called after each optimizer step; the context has no rows."""

    def example(self, logp: Float[Tensor, "B T"], draw: torch.Generator) -> Float[Tensor, "B T"] | Float[Tensor, " B"]:
        """Plausible values beside these log-probs, for `rlzoo.testing`; by default log-probs near them."""
        return logp + 0.4 * normal(logp.shape, draw)

    @property
    def label(self) -> str:
        """Its name in docs and messages."""
        return self.key.removesuffix("_logp").replace("_", " ")
