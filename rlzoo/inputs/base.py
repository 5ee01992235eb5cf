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


NO_COLUMNS: Mapping[str, Any] = {}


class Stage(Enum):
    """When an input is computed."""

    STORED = "stored"
    """Stored in each row; if rows lack it and it can be computed, it is computed once and kept in the buffer."""
    BATCH = "batch"
    """Once per batch, without a graph, for all optimizer steps on it."""
    STEP = "step"
    """Before each optimizer step, without a graph."""
    FORWARD = "forward"
    """In every forward pass of the policy; with a graph, except for statistics."""


class Context(Protocol):
    """What an input is computed from: the rows of a batch, the current policy, and other models."""

    @property
    def rows(self) -> Sequence[Trajectory]:
        """The rows of the batch."""
        ...

    @property
    def units(self) -> Sequence[tuple[int, ...]]:
        """The units of the batch, as indices into its rows: pairs, groups, or single rows."""
        ...

    @property
    def mask(self) -> Bool[Tensor, "B T"]:
        """True at learned tokens: the positions of the values of `compute`, which must be on its device."""
        ...

    @property
    def policy(self) -> Policy:
        """The current policy."""
        ...

    @property
    def own(self) -> Policy:
        """The input's moving model."""
        ...

    @property
    def progress(self) -> float:
        """The fraction of training that is done: 0 at the first step, and where nothing is trained."""
        ...

    def model(self, name: str | None) -> Policy:
        """A frozen model listed in `Input.models`; None: the initial policy. Raises UserError for any other name."""
        ...

    def log_probs(self, model: Policy, rows: Sequence[Trajectory] | None = None) -> Float[Tensor, "R T"]:
        """A model's log-probs in nats of the batch's rows, or of ``rows``, each at its own temperature; 0 at padding.

        Without a graph.
        """
        ...

    def encode(self, prompt: str | Sequence[Mapping[str, Any]], columns: Mapping[str, Any] = NO_COLUMNS) -> list[int]:
        """The token ids of a prompt or a conversation, encoded as for the policy.

        ``columns`` are those of the row, with which the chat template renders a conversation: ``tools`` and
        ``chat_template_kwargs``.
        """
        ...

    def now(self, key: str = "logp") -> Float[Tensor, "B T ..."]:
        """The policy's current log-probs in nats, or a FORWARD input of the same objective, without a graph."""
        ...


def normal(shape: Sequence[int], draw: torch.Generator) -> Float[Tensor, ...]:
    """Standard normal numbers in float64."""
    return torch.randn(tuple(shape), dtype=torch.float64, generator=draw)


@dataclass(frozen=True)
class Input:
    """A quantity that an objective requests, and gets under a ``key`` of the batch.

    A subclass is a frozen dataclass, so that equal inputs are the same input and computed once. It sets ``stage`` and
    ``key``, and overrides the methods of its stage: `compute` for STORED, BATCH and STEP (or only `stored`, for values
    that must come from the buffer); `of_logits`, or `module` with `of_hidden`, for FORWARD.
    """

    stage: ClassVar[Stage]
    at_sampling_temperature: ClassVar[bool] = False
    """Whether objectives with this input use log-probs at the row's sampling temperature throughout."""
    initial: ClassVar[float | None] = None
    """The value of `of_hidden` before the first step, if it is constant: analyses then need no module."""

    @property
    def key(self) -> str:
        """The name in the batch; may be a class variable."""
        raise NotImplementedError(f"{type(self).__name__} must define key")

    @property
    def column(self) -> str:
        """STORED: the name of the values in a buffer."""
        return self.key

    def stored(self, row: Trajectory) -> Sequence[float] | float | None:
        """STORED: a row's value, one number per completion token or a single one; None if the row lacks it."""
        found: Sequence[float] | float | None = row.stored(self.column)
        return found

    def compute(self, context: Context) -> Float[Tensor, "B T"] | Float[Tensor, " B"] | Float[Tensor, ""]:
        """STORED, BATCH, STEP: the values for all rows of the context. Raises UserError if it is not overridden."""
        raise UserError(f"the buffer has no {self.column}: add it to every row")

    @property
    def is_computed(self) -> bool:
        """Whether the class overrides `compute`."""
        return type(self).compute is not Input.compute

    def of_logits(self, logits: Float[Tensor, "N V"], target: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """FORWARD, without a graph: from logits divided by the temperature, in chunks; must not modify them."""
        raise NotImplementedError(f"{type(self).__name__} must define of_logits(logits, target)")

    @property
    def is_statistic(self) -> bool:
        """Whether the class overrides `of_logits`."""
        return type(self).of_logits is not Input.of_logits

    def module(self, policy: Policy) -> nn.Module | None:
        """FORWARD: a module of the input's own, which is trained and checkpointed with the policy; None: no module."""
        return None

    def of_hidden(self, module: Any, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N ..."]:
        """FORWARD, with its graph: the module's output from the last hidden states at completion positions.

        One number per position, or several, such as the hidden states themselves: the batch has them as [B, T, …].
        """
        raise NotImplementedError(f"{type(self).__name__} has a module, and must define of_hidden(module, hidden)")

    @property
    def lacks(self) -> str | None:
        """The methods that its stage needs and the class does not override; None if there are none."""
        if self.stage in (Stage.BATCH, Stage.STEP):
            return None if self.is_computed else "compute(context)"
        has_module = type(self).module is not Input.module
        made = self.stage is Stage.STORED or self.is_statistic or has_module or self.gives_logits
        return None if made else "of_logits(logits, target), or module(policy) with of_hidden(module, hidden)"

    def trunk(self, module: Any) -> nn.Module | None:
        """FORWARD: the trunk within the module whose hidden states `of_hidden` gets; None: the policy's trunk."""
        return None

    def flops(self, module: nn.Module, tokens: int, completion_tokens: int) -> float:
        """FLOPs of the module's forward pass: 2 × parameters × completion tokens."""
        return 2.0 * sum(p.numel() for p in module.parameters()) * completion_tokens

    def models(self) -> tuple[str | None, ...]:
        """Names of frozen models to load once and share, as for `load_policy`; None is the initial policy."""
        return ()

    @property
    def gives_logits(self) -> bool:
        """FORWARD: whether its model's logits go to `Objective.logit_term` rather than into the batch."""
        return False

    def moving_model(self, policy: Policy) -> Policy | None:
        """A model that `after_step` updates, in its initial state; it is checkpointed. None: no such model."""
        return None

    def after_step(self, context: Context) -> None:
        """Called after every optimizer step; the context has no rows."""

    def example(
        self, logp: Float[Tensor, "B T"], draw: torch.Generator
    ) -> Float[Tensor, "B T ..."] | Float[Tensor, " B"] | Float[Tensor, ""]:
        """Plausible random values for these log-probs, for `rlzoo.testing`; by default log-probs near them."""
        return logp + 0.4 * normal(logp.shape, draw)

    @property
    def label(self) -> str:
        """The name in docs and messages."""
        return self.key.removesuffix("_logp").replace("_", " ")
