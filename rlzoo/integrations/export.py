"""An objective in another training stack: what the stack must give it, and its loss on what the stack gives.

There is one way from a stack's tensors to a gradient: log-probs, a mask and further values become a `TokenBatch`, and
the objective's coefficients its surrogate loss. A stack is described by a `Stack`, and an objective is checked against
it once, before training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlzoo.errors import UserError
from rlzoo.inputs import Input, Stage
from rlzoo.objective import Objective, get_objective, is_composite, surrogate_of
from rlzoo.registry import one_line
from rlzoo.training.sums import reported_loss
from rlzoo.types import Coefficients, Coupling, TokenBatch, Unit, selector_of

ABSENT = {
    "rows": "the text of rows",
    "units": "which rows belong together",
    "policy": "the policy as an object",
    "own": "a moving average of the policy's weights",
    "encode": "how prompts are encoded",
    "progress": "how far training has come",
}
"""What only rlzoo's own trainer can tell an input, for messages."""
UNIT_NAMES = {Unit.ROW: "single rows", Unit.PAIR: "pairs", Unit.GROUP: "groups of samples"}


@dataclass(frozen=True)
class Stack:
    """What a training stack gives to an objective."""

    name: str
    units: frozenset[Unit]
    """The kinds of units that its batches consist of."""
    keys: frozenset[str] = frozenset()
    """The keys of inputs that it gives itself."""
    has_columns: bool = False
    """Whether it passes on columns of the data, from which stored inputs are read."""
    has_logits: bool = False
    """Whether statistics and full-vocabulary terms can be computed from the policy's logits."""
    has_models: bool = False
    """Whether frozen models can be run on the batch."""
    splits: bool = False
    """Whether a loss may be computed on a part of the optimizer batch, so that coupling BATCH is not possible."""
    hint: str = "train with rlzoo.train"
    """What to do with an objective that cannot be served."""


class Values:
    """`rlzoo.inputs.Context` in another stack: log-probs of the rows at hand, without a graph, and nothing else."""

    def __init__(
        self,
        mask: Bool[Tensor, "B T"],
        now: Mapping[str, Tensor],
        of_model: Callable[[str | None], Float[Tensor, "B T"]] | None = None,
    ) -> None:
        """``now`` has the policy's current log-probs and statistics; ``of_model`` a frozen model's log-probs."""
        self.mask, self._now, self._of_model = mask, now, of_model

    def now(self, key: str = "logp") -> Float[Tensor, "B T"]:
        """The policy's log-probs or a statistic, detached. Raises UserError for what is not there."""
        if key not in self._now:
            raise UserError(f"{key!r} is not known")
        return self._now[key].detach()

    def model(self, name: str | None) -> str | None:
        """The name itself stands for a frozen model."""
        if self._of_model is None:
            raise UserError("frozen models cannot be run")
        return name

    def log_probs(self, model: str | None, rows: object = None) -> Float[Tensor, "B T"]:
        """A frozen model's log-probs of the rows at hand. Raises UserError for other rows."""
        if rows is not None or self._of_model is None:
            raise UserError("other rows than those of the batch cannot be scored")
        return self._of_model(model)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UserError(f"{ABSENT.get(name, name)} is not known there")


class StepLoss(NamedTuple):
    """The loss of a micro-batch and what it was computed from."""

    value: Float[Tensor, ""]
    """The paper's loss in value, with the surrogate's gradient."""
    surrogate: Float[Tensor, ""]
    batch: TokenBatch
    coefficients: Coefficients


class Exported:
    """An objective that a stack can serve.

    Raises UserError, in one line and before training, if it needs what the stack does not have.
    """

    def __init__(self, objective: str | Objective, stack: Stack, options: Mapping[str, Any] | None = None) -> None:
        """``objective`` is a name as for `get_objective`, with its ``options``, or an objective."""
        if isinstance(objective, Objective):
            if options:
                raise UserError(f"objective {objective.name!r} has its options already: leave out {', '.join(options)}")
            self.objective = objective
        else:
            self.objective = get_objective(objective, **(options or {}))
        self.stack = stack
        self._check()

    @property
    def statistics(self) -> list[Input]:
        """The statistics of logits that it requires."""
        return [one for one in self.objective.requires if one.is_statistic]

    @property
    def reference_of_term(self) -> list[str | None]:
        """The model whose logits its full-vocabulary term uses: one name or none."""
        return [name for one in self.objective.requires if one.gives_logits for name in one.models()]

    @property
    def columns(self) -> list[str]:
        """The columns of the data that stored inputs and, unless rows are imitated, the reward are read from."""
        stored = [one.column for one in self.objective.requires if one.stage is Stage.STORED]
        is_imitated = selector_of(self.objective.learns_from).is_imitated
        return list(dict.fromkeys(stored if is_imitated else [*stored, "reward"]))

    def batch(
        self,
        logp: Float[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"],
        given: Mapping[str, Tensor],
        of_model: Callable[[str | None], Tensor] | None = None,
        **fields: Tensor | None,
    ) -> TokenBatch:
        """A batch with the inputs that the objective requires: ``given`` by key or column, or computed.

        ``fields`` are those of `TokenBatch`. Without ``logp`` nothing is computed, and inputs that are not given are
        left out.
        """
        found: dict[str, Tensor] = {}
        known = {**given, **({} if logp is None else {"logp": logp})}
        for one in self.objective.requires:
            value = given.get(one.key, given.get(one.column))
            if value is None and logp is not None and not one.gives_logits:
                value = self._computed(one, Values(mask, known, of_model))
            if value is not None:
                found[one.key] = value
        return TokenBatch(logp, mask, inputs=found, **fields)  # type: ignore[arg-type]

    def _computed(self, one: Input, values: Values) -> Tensor:
        try:
            return one.compute(values)  # type: ignore[arg-type]
        except UserError as error:
            if one.stage is Stage.STORED:
                raise UserError(
                    f"objective {self.objective.name!r} needs {one.column!r} and the rows have no column of that name: "
                    f"add it to the data, with one number per learned token or per row ({self.stack.name})"
                ) from None
            raise self._refused(f"needs the input {type(one).__name__}, and {error}") from None

    def loss(
        self,
        batch: TokenBatch,
        denominator: Tensor | float,
        weight: Float[Tensor, "B T"] | None = None,
        term: Float[Tensor, "B T"] | None = None,
    ) -> StepLoss:
        """The loss of a micro-batch; ``denominator`` is Z of the whole optimizer step.

        ``weight`` multiplies the coefficients; ``term`` is the full-vocabulary term with its graph.
        """
        objective = self.objective
        if batch.advantage is None:
            fixed = objective.prepare(batch.detach())
            batch = fixed.replace(logp=batch.logp, inputs={**fixed.inputs, **batch.inputs})  # with their graph
        found = objective.coefficients(batch.detach())
        if weight is not None:
            found = found.weighted(weight)
        loss = surrogate_of(found, objective, batch, denominator, term)
        reported = reported_loss(objective, batch, found, loss, denominator)
        return StepLoss(loss + (reported - loss.detach()), loss, batch, found)

    def _check(self) -> None:
        objective, stack = self.objective, self.stack
        if is_composite(type(objective)):
            raise self._refused("is a composite, whose components learn from rows of their own")
        unit = selector_of(objective.learns_from).unit
        if unit not in stack.units:
            there = " and ".join(UNIT_NAMES[unit] for unit in Unit if unit in stack.units)
            raise self._refused(f"learns from {UNIT_NAMES[unit]}, and batches there consist of {there}")
        if objective.truncated != "keep":
            raise self._refused(f"has the option truncated={objective.truncated}, which is applied to rows of a buffer")
        if objective.couples is Coupling.GROUP:
            raise self._refused("couples the samples of a prompt, which are spread over micro-batches there")
        if stack.splits and self.is_coupled:
            raise self._refused("may depend on all rows of the optimizer batch, which is computed in parts there")
        if objective.has_logit_term and not stack.has_logits:
            raise self._refused("has a full-vocabulary term, and the loss gets no logits there")
        for one in objective.requires:
            if (reason := self._lacks(one)) is not None:
                raise self._refused(f"needs {one.label!r} ({type(one).__name__}), and {reason}")

    @property
    def is_coupled(self) -> bool:
        """Whether coefficients depend on all rows of the optimizer batch, by coupling or by what `prepare` fixes."""
        own = type(self.objective)
        fixes = own.prepare is not Objective.prepare or own.advantages is not Objective.advantages
        return self.objective.is_coupled or (fixes and Unit.GROUP not in self.stack.units)

    def _lacks(self, one: Input) -> str | None:
        """Why the stack cannot serve an input; None if it can."""
        stack = self.stack
        if one.key in stack.keys:
            return None
        if one.gives_logits:
            return None if stack.has_models and stack.has_logits else "logits of a frozen model are not known"
        if one.is_statistic:
            return None if stack.has_logits else "the loss gets no logits there"
        if one.stage is Stage.FORWARD:
            return "a module that is trained with the policy has no place there"
        if one.stage is Stage.STORED and stack.has_columns:
            return None
        nothing = torch.zeros(1, 1)
        known = dict.fromkeys(("logp", *(other.key for other in self.statistics)), nothing)
        run = (lambda _: nothing) if stack.has_models else None
        try:
            one.compute(Values(nothing.bool(), known, run))  # type: ignore[arg-type]
        except UserError as error:
            return "there is no such value there" if one.stage is Stage.STORED else str(error)
        except Exception as error:  # of a user's own input
            return one_line(error)
        return None

    def _refused(self, reason: str) -> UserError:
        return UserError(f"{self.stack.name}: objective {self.objective.name!r} {reason}: {self.stack.hint}")


def metrics_of_part(found: StepLoss) -> dict[str, float]:
    """The means of an objective's metrics over the tokens or rows of a micro-batch; NaN entries are left out."""
    means = {}
    for name, value in {"coefficient": found.coefficients.values, **found.coefficients.metrics}.items():
        kept = ~value.isnan() & found.batch.mask if value.ndim == 2 else ~value.isnan()
        means[name] = float(torch.where(kept, value, 0).sum() / kept.sum().clamp(min=1))
    return means
