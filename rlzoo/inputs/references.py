"""Inputs from other models than the policy: the initial policy, a teacher, a moving average."""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlzoo.errors import UserError
from rlzoo.inputs.base import Context, Input, Stage, normal
from rlzoo.types import Trajectory

if TYPE_CHECKING:
    from rlzoo.policy import Policy


@dataclass(frozen=True)
class Reference(Input):
    """``reference_logp`` [B, T]: log-probs in nats under a frozen model.

    The model is the initial policy, or a teacher with the same tokenizer: ``name`` is a folder or a Hub id. An
    objective with several references gives each its own key, ``as_key``.
    """

    stage: ClassVar[Stage] = Stage.STORED

    name: str | None = None
    as_key: str = "reference_logp"

    @property
    def key(self) -> str:
        return self.as_key

    @property
    def column(self) -> str:
        return "reference_logp" if self.name is None else f"logp of {self.name}"

    def models(self) -> tuple[str | None, ...]:
        return (self.name,)

    def compute(self, context: Context) -> Float[Tensor, "B T"]:
        return context.log_probs(context.model(self.name))

    def example(self, logp: Float[Tensor, "B T"], draw: torch.Generator) -> Float[Tensor, "B T"]:
        """Log-probs far enough from the policy's to reach the bounds of their ratio."""
        return logp + normal(logp.shape, draw)

    @property
    def label(self) -> str:
        return "reference" if self.name is None else f"reference ({self.name})"


@dataclass(frozen=True)
class MovingReference(Input):
    """``reference_logp`` [B, T]: log-probs in nats under an exponential moving average of the policy's weights.

    After each optimizer step, θ_ref ← ``decay`` · θ_ref + (1 - ``decay``) · θ.
    """

    stage: ClassVar[Stage] = Stage.BATCH
    key: ClassVar[str] = "reference_logp"

    decay: float

    def moving_model(self, policy: Policy) -> Policy:
        return policy.frozen_copy(moving=True)

    def compute(self, context: Context) -> Float[Tensor, "B T"]:
        return context.log_probs(context.own)

    def after_step(self, context: Context) -> None:
        follow(context.own, context.policy, self.decay)

    @property
    def label(self) -> str:
        return "moving reference"


@torch.no_grad()
def follow(average: Policy, policy: Policy, decay: float) -> None:
    """Move an exponential average towards the policy: θ_ref ← decay · θ_ref + (1 - decay) · θ."""
    for mean, current in zip(average.model.parameters(), policy.model.parameters(), strict=True):  # sharded alike
        if mean.is_floating_point():  # weights in 4 bits stay as they are
            mean.lerp_(current, 1 - decay)


@dataclass(frozen=True)
class ReferenceLogits(Input):
    """The logits of a frozen model, for `Objective.logit_term`: the initial policy, or the teacher ``name``.

    The model stays in memory and runs a forward pass in every optimizer step.
    """

    stage: ClassVar[Stage] = Stage.FORWARD
    key: ClassVar[str] = "reference_logits"

    name: str | None = None

    def models(self) -> tuple[str | None, ...]:
        return (self.name,)

    @property
    def gives_logits(self) -> bool:
        return True


@dataclass(frozen=True)
class Mismatched(Input):
    """``mismatched`` [B]: the batch mean of Σ_t log π_θ/π_ref in nats, for completions paired with other rows' prompts.

    The same for all rows, and independent of micro-batches; 0 if all rows have the same prompt. Pairs that are longer
    than the model's positions are omitted. KTO's estimate of the KL divergence (arXiv 2402.01306).
    """

    stage: ClassVar[Stage] = Stage.STEP
    key: ClassVar[str] = "mismatched"

    def models(self) -> tuple[str | None, ...]:
        return (None,)

    def example(self, logp: Float[Tensor, "B T"], draw: torch.Generator) -> Float[Tensor, " B"]:
        return normal((), draw).expand(len(logp))

    def compute(self, context: Context) -> Float[Tensor, " B"]:
        others = mismatched(context.rows, context.policy.positions)
        mean = torch.zeros((), device=context.mask.device)
        if others and context.model(None) is not context.policy:
            own, reference = (
                context.log_probs(model, others).sum(1) for model in (context.policy, context.model(None))
            )
            mean = (own - reference).mean()
        return mean.expand(len(context.rows))


def mismatched(rows: Sequence[Trajectory], positions: int | None = None) -> list[Trajectory]:
    """Pairs each prompt with a completion of another prompt; each completion is used once, for any order of the rows.

    If one prompt has more than half of the rows, those without a counterpart are omitted, and so are pairs of more
    tokens than ``positions`` (None: no limit).
    """
    order = sorted(rows, key=lambda row: (row.prompt_id, row.completion_ids))
    shift = max(Counter(row.prompt_id for row in rows).values())
    others = order[shift:] + order[:shift]
    pairs = zip(order, others, strict=True)
    return [
        replace(row, completion_ids=other.completion_ids, completion_mask=other.completion_mask)
        for row, other in pairs
        if row.prompt_id != other.prompt_id
        and (positions is None or len(row.prompt_ids) + len(other.completion_ids) <= positions)
    ]


@dataclass(frozen=True)
class Privileged(Input):
    """``privileged_logp`` [B, T]: log-probs in nats of the same completions after a prompt with more information.

    ``template`` builds that prompt from ``{prompt}`` and the row's columns, as in ``"{prompt}\\nHint: {answer}\\n"``.
    The log-probs are those of the frozen ``model`` or, without one, of an exponential average of the policy's weights,
    as `MovingReference` has it: a ``decay`` of 0 is the policy at the start of the batch, one of 1 the initial policy.
    Self-distillation learns from their difference to the policy's own. Raises UserError for a template that does not
    fit a row, and for a decay outside [0, 1].
    """

    stage: ClassVar[Stage] = Stage.BATCH
    key: ClassVar[str] = "privileged_logp"

    template: str
    model: str | None = None
    decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise UserError(f"a teacher's weights need a decay between 0 and 1, got {self.decay}")
        for name in self._names():
            if not name or name.isdecimal():
                text = f"{{{name}}}"
                raise UserError(
                    f"the template {self.template!r} has {text}: name a column in it, or write {{{text}}} for text"
                )

    def models(self) -> tuple[str | None, ...]:
        return (self.model,) if self.model is not None or self.decay == 1 else ()

    @property
    def _moves(self) -> bool:
        return self.model is None and 0 < self.decay < 1

    def moving_model(self, policy: Policy) -> Policy | None:
        return policy.frozen_copy(moving=True) if self._moves else None

    def after_step(self, context: Context) -> None:
        if self._moves:
            follow(context.own, context.policy, self.decay)

    def compute(self, context: Context) -> Float[Tensor, "B T"]:
        rows = [replace(row, prompt_ids=self._prompt_ids(context, row)) for row in context.rows]
        if self.models():
            return context.log_probs(context.model(self.model), rows)
        return context.log_probs(context.own if self._moves else context.policy, rows)

    def _prompt_ids(self, context: Context, row: Trajectory) -> list[int]:
        """The tokens of the prompt that says more, which ends as the row's own does.

        A template that opens an answer with ``<think>`` does not in the row of a demonstration without reasoning.
        """
        found = context.encode(self._prompt(row), row.columns)
        if row.messages is not None:
            plain, size = context.encode(row.messages, row.columns), len(row.prompt_ids)
            opened = plain[size:]
            if opened and plain[:size] == list(row.prompt_ids) and found[-len(opened) :] == opened:
                return found[: -len(opened)]
        return found

    def _prompt(self, row: Trajectory) -> str | list[dict[str, Any]]:
        """The template filled with the prompt or, in a conversation, with its last user turn."""
        if row.messages is None:
            return self._filled(row, row.prompt)
        turns = [dict(turn) for turn in row.messages]
        last = max((n for n, turn in enumerate(turns) if turn["role"] == "user"), default=len(turns) - 1)
        turns[last]["content"] = self._filled(row, turns[last]["content"])
        return turns

    def _filled(self, row: Trajectory, prompt: str) -> str:
        for name in self._names():
            if name in row.columns and row.columns[name] is None:
                raise UserError(
                    f"the template {self.template!r} asks for {name!r}, which is null in a row of prompt "
                    f"{row.prompt_id!r}: fill it in, or drop the row"
                )
        given = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.columns.items()}
        try:
            return self.template.format(**{**given, "prompt": prompt})
        except KeyError as error:
            raise UserError(
                f"the template {self.template!r} needs {error.args[0]!r}, and a row of prompt {row.prompt_id!r} has "
                f"{', '.join(['prompt', *given])}"
            ) from None
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"the template {self.template!r} does not fit a row of prompt {row.prompt_id!r}: {error}"
            ) from None

    def _names(self) -> list[str]:
        """The names of the fields in the template."""
        try:
            return [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
        except ValueError as error:
            raise UserError(
                f"the template {self.template!r}: {error}: write {{{{ and }}}} for braces that are text"
            ) from None
