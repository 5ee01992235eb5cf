"""The one idea: an objective is a coefficient per token, and one surrogate turns coefficients into a gradient.

    ∇J(θ) = E[ (1/Z) Σ_t c_t ∇ log π_θ(y_t | x, y_<t) ] + auxiliary terms

This is the gradient-coefficient view of DeepSeekMath (arXiv 2402.03300, section 5.2). A positive c_t raises the
probability of the token.
"""

from __future__ import annotations

import dataclasses
import math
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import pydantic
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlzoo.config.schedules import Schedule
from rlzoo.errors import UserError, unknown
from rlzoo.inputs import Input
from rlzoo.registry import Registry, one_line
from rlzoo.types import Coefficients, Coupling, Selection, TokenBatch, Unit, WhichView, over, selector_of
from rlzoo.types import Normaliser as Normaliser


@dataclass(frozen=True)
class Component:
    """A component of a composite: an objective, on rows of its own, and the weight of its gradient in the sum."""

    objective: Objective
    weight: float = 1.0
    label: str = ""
    """The prefix of its metrics, before a slash."""
    schedules: tuple[Schedule, ...] = ()
    """Further factors of the weight, which change in training."""

    def at(self, progress: float) -> Component:
        """The component with its weight once the fraction ``progress`` of training is done."""
        factors = [schedule.at(progress) for schedule in self.schedules]
        return dataclasses.replace(self, weight=math.prod(factors, start=self.weight), schedules=())


@dataclass(frozen=True)
class Objective:
    """A fine-tuning objective: a frozen configuration and one method, `coefficients`.

    A subclass's fields are its hyper-parameters; its class variables say what it learns from.
    """

    truncated: Literal["keep", "mask", "drop"] = dataclasses.field(default="keep", kw_only=True)
    """What happens to truncated completions: ``keep`` treats them like any other; ``drop`` leaves them out of the view;
    ``mask``, for objectives that learn from groups, removes their tokens from the loss and the token count, while they
    still count as sequences and their rewards count in their groups."""

    name: ClassVar[str]
    """The name in the registry, in experiments and in reports."""
    learns_from: ClassVar[WhichView] = Selection.DEMONSTRATIONS
    """The view of the buffer: a `Selection`, a view object, or a name."""
    couples: ClassVar[Coupling] = Coupling.NONE
    source: ClassVar[str] = ""
    """The paper: ``arXiv 2508.05629``, or a DOI."""
    compared_with: ClassVar[str] = ""
    """Another implementation with which its tests compare loss and gradient: ``TRL 1.16``."""
    shown_too: ClassVar[Sequence[Mapping[str, Any]]] = ()
    """Further settings for the map of losses, besides the defaults."""

    @property
    def normaliser(self) -> Normaliser:
        """How per-token terms are reduced; where no option changes it, a class variable."""
        return Normaliser.PER_TOKEN

    @property
    def requires(self) -> tuple[Input, ...]:
        """The inputs that the batch must hold besides the fields of its rows: see `rlzoo.inputs`."""
        return ()

    @property
    def view_options(self) -> Mapping[str, Any]:
        """Options of the view ``learns_from``; `view_of` adds those that ``truncated`` implies."""
        return {}

    @property
    def at_sampling_temperature(self) -> bool:
        """Whether log-probs and statistics of a row are taken at its sampling temperature.

        True where the sampling policy itself is improved: for groups of its samples, and for ratios to it, which start
        at 1 only at that temperature. Other objectives train the policy at temperature 1.
        """
        groups = selector_of(self.learns_from).unit is Unit.GROUP
        return groups or any(one.at_sampling_temperature for one in self.requires)

    @property
    def components(self) -> tuple[Component, ...]:
        """The objectives whose weighted gradients are summed: this one alone. A composite defines only this."""
        return (Component(self),)

    def prepare(self, batch: TokenBatch) -> TokenBatch:
        """The batch with what is fixed for all updates on it, such as advantages. Called once, without a gradient.

        It may mask tokens, which are then excluded from all sums and denominators; if so, it must also set advantages,
        because a batch without them counts as not yet prepared.

        ``logp`` and FORWARD inputs are available only to an objective with a `Snapshot` or with coupling BATCH: for
        others the policy has not run yet, and reading them raises `AbsentInputError`. ``batch.dtype`` is their dtype.
        """
        advantage = self.advantages(batch)
        return batch if advantage is None else batch.replace(advantage=advantage)

    def advantages(self, batch: TokenBatch) -> Float[Tensor, "B T"] | None:
        """The advantage of each token, [B, T], from the whole batch; None for an objective without advantages."""
        return None

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        """The coefficient c_t of each token, [B, T], from a batch without a graph. The one method that is required."""
        raise NotImplementedError(f"{type(self).__name__} must define coefficients(batch)")

    def auxiliary(self, batch: TokenBatch) -> Mapping[str, Float[Tensor, "B T"] | Float[Tensor, " B"]]:
        """Further losses by name, each [B, T], or [B] per row, with its weight and its graph.

        The normaliser reduces them.
        """
        return {}

    def logit_term(
        self,
        policy_logits: Float[Tensor, "N V"],
        reference_logits: Float[Tensor, "N V"] | None,
        target: Int[Tensor, " N"],
    ) -> Float[Tensor, " N"] | None:
        """A loss over the full vocabulary, [N] for logits [N, V], computed chunk by chunk in the head.

        ``reference_logits`` is None unless the objective requires `ReferenceLogits`. What depends on more than the
        logits of a position, such as an advantage, is a weight: `Coefficients.logit_weight`.
        """
        return None

    @property
    def has_logit_term(self) -> bool:
        """Whether this objective uses a `logit_term`: by default, whether it defines one."""
        return type(self).logit_term is not Objective.logit_term

    @property
    def is_coupled(self) -> bool:
        """Whether coefficients depend on the whole batch, whose log-probs are then needed before the first backward."""
        return self.couples is Coupling.BATCH

    def needed(self, batch: TokenBatch, *names: str) -> tuple[Tensor, ...]:
        """The fields or inputs of these names. Raises UserError naming the first that the batch lacks."""
        values = []
        for name in names:
            value = batch.get(name)
            if value is None and name in ("advantage", "returns"):
                value = self.prepare(batch.detach()).get(name)
            if value is None:
                raise UserError(f"objective {self.name!r} needs {name} and the batch has none")
            values.append(value)
        return tuple(values)


def view_of(objective: Objective) -> tuple[WhichView, dict[str, Any]]:
    """The view that an objective learns from, and its options, including that for truncated rows."""
    dropping = {"truncated": "drop"} if objective.truncated == "drop" else {}
    return objective.learns_from, {**objective.view_options, **dropping}


def _check_class(spec: str, found: Any) -> None:
    """Raise UserError for anything but the class of an objective that is whole."""
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise UserError(f"objective {spec!r} is not a subclass of rlzoo.Objective")
    if not isinstance(getattr(found, "name", None), str):
        raise UserError(f"objective {spec!r} has no name: give the class one, as in name = 'mine'")
    if found.coefficients is Objective.coefficients and not is_composite(found):
        raise UserError(f"objective {spec!r} does not define coefficients(self, batch): every objective must")


_objectives: Registry[type[Objective]] = Registry("objective", "rlzoo.algorithms", "rlzoo.objectives", _check_class)
_Class = TypeVar("_Class", bound=type[Objective])


def register(objective: _Class) -> _Class:
    """Class decorator: register an `Objective` under its ``name``. Raises UserError if another class has that name."""
    _objectives.add(objective.name, objective)
    return objective


def list_objectives() -> list[str]:
    """The names of all registered objectives: built-ins and those of installed packages' entry points."""
    return _objectives.names()


def objective_class(spec: str) -> type[Objective]:
    """The class of a name, ``package.module:Name`` or ``path/to/file.py:Name``. Raises UserError for anything else."""
    return _objectives.get(spec)


def is_composite(objective: type[Objective]) -> bool:
    """Whether an objective is a sum of others, each with its own view, coefficients and normaliser."""
    return objective.components is not Objective.components


def summary_of(objective: type[Objective]) -> tuple[str, str]:
    """The full name and the coefficient: the two halves of the class docstring's first line; empty where it has none.

    A class without a docstring of its own has none: neither that of its base nor the signature that dataclasses write.
    """
    first = (vars(objective).get("__doc__") or "").partition("\n")[0]
    first = "" if first.startswith(f"{objective.__name__}(") else first
    full, _, formula = first.partition(": ")
    return full, formula.removeprefix("c_t = ").removesuffix(".")


def options_of(objective: type[Objective]) -> dict[str, dict[str, Any]]:
    """The hyper-parameters of an objective: name → its type as text, and its default (None if it has none)."""
    hints = _hints(objective)
    return {f.name: {"type": type_name(hints[f.name]), "default": _default(f)} for f in dataclasses.fields(objective)}


def own_options_of(objective: type[Objective]) -> dict[str, dict[str, Any]]:
    """`options_of` without those that every objective has."""
    common = {field.name for field in dataclasses.fields(Objective)}
    return {name: option for name, option in options_of(objective).items() if name not in common}


def type_name(hint: Any) -> str:
    """An annotation as text."""
    plain = isinstance(hint, type) and typing.get_origin(hint) is None
    return hint.__name__ if plain else str(hint).replace("typing.", "").replace("collections.abc.", "")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _hints(objective: type[Objective]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(objective)
    except (NameError, TypeError) as error:
        raise UserError(f"objective {objective.name!r} has an annotation that cannot be resolved: {error}") from None


def get_objective(name: str, /, **options: Any) -> Objective:
    """The objective of a name, ``package.module:Name`` or ``path/to/file.py:Name``, with its options checked.

    Raises UserError for an unknown name, for an option that is unknown, missing or of the wrong type, and for bad
    inputs.
    """
    found = objective_class(name)
    hints = _hints(found)
    known = {f.name for f in dataclasses.fields(found)}
    for option, value in options.items():
        if option not in known:
            raise unknown(f"option of objective {name!r}", option, known)
        try:
            options[option] = pydantic.TypeAdapter(hints[option]).validate_python(value)
        except pydantic.ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UserError(f"objective {name!r}: option {option!r} = {value!r}: {reason}") from None
    bare = [f for f in dataclasses.fields(found) if f.default is f.default_factory is dataclasses.MISSING]
    if lacking := [f.name for f in bare if f.init and f.name not in options]:
        raise UserError(f"objective {name!r} needs the option {lacking[0]!r}, which has no default: give it a value")
    try:
        built = found(**options)
    except UserError:
        raise
    except Exception as error:  # from a plug-in's own checks
        raise UserError(f"objective {name!r} cannot be built from {options}: {one_line(error)}") from error
    _check_truncated(built)
    _check_requires(built)
    return built


def _check_requires(objective: Objective) -> None:
    if is_composite(type(objective)):
        return
    for one in objective.requires:
        if not isinstance(one, Input):
            raise UserError(
                f"objective {objective.name!r}: requires lists {one!r}, which is not an input: give instances, as in "
                "rlzoo.inputs.Reference()"
            )
        if one.lacks is not None:
            raise UserError(
                f"objective {objective.name!r}: the input {type(one).__name__} has the stage {one.stage.value} "
                f"and must define {one.lacks}"
            )
    keys = [one.key for one in objective.requires]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"objective {objective.name!r} has two inputs with the key {twice[0]!r}: give one another key")


def _check_truncated(objective: Objective) -> None:
    if objective.truncated != "keep" and is_composite(type(objective)):
        raise UserError(f"objective {objective.name!r} is a composite: give truncated to its components' options")
    if objective.truncated == "mask" and selector_of(objective.learns_from).unit is not Unit.GROUP:
        raise UserError(
            f"objective {objective.name!r} does not learn from groups, in which a masked completion's reward counts: "
            "use truncated=drop"
        )


def reduce(
    per_token: Float[Tensor, "B T"] | Float[Tensor, " B"],
    batch: TokenBatch,
    normaliser: Normaliser,
    denominator: Tensor | float,
) -> Tensor:
    """Σ w x / Z, a scalar: over the unmasked tokens of x [B, T], or over the rows of x [B]. A Z of 0 counts as 1."""
    if per_token.ndim == 2:
        per_token = torch.where(batch.mask, per_token * normaliser.weight(batch), 0)
    total = per_token.sum()
    if isinstance(denominator, Tensor):
        return total / denominator.clamp(min=1).to(total.dtype)
    return total / (denominator or 1.0)


def surrogate(
    objective: Objective,
    batch: TokenBatch,
    denominator: float | None = None,
    progress: float = 0.0,
    term: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """The surrogate loss, a scalar: -Σ (c.detach() · log π)[mask] / Z plus the objective's auxiliary terms.

    Its gradient is that of the paper's loss; its value need not be (see `Coefficients.loss`). ``denominator`` is Z of
    the whole optimizer step; None applies the objective's normaliser to this batch. The components of a composite all
    get this batch, with their weights once the fraction ``progress`` of training is done; since each has its own
    normaliser, a composite takes no ``denominator`` (ValueError). A batch without advantages is prepared first.
    ``term`` is the value of the objective's `logit_term` at each token, with its graph. If all tokens are masked the
    loss is 0, with a warning.
    """
    if denominator is not None and is_composite(type(objective)):
        raise ValueError(f"objective {objective.name!r} is a composite: each of its components has its own denominator")
    losses = []
    for component in objective.components:
        own = batch
        if batch.advantage is None:
            fixed = component.objective.prepare(batch.detach())
            own = fixed.replace(logp=batch.logp, inputs={**fixed.inputs, **batch.inputs})  # with their graph
        coefficients = component.objective.coefficients(own.detach())
        weight = component.at(progress).weight
        losses.append(weight * surrogate_of(coefficients, component.objective, own, denominator, term))
    return torch.stack(losses).sum()


def surrogate_of(
    coefficients: Coefficients,
    objective: Objective,
    batch: TokenBatch,
    denominator: Tensor | float | None = None,
    term: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, ""]:
    """`surrogate` of one objective for given coefficients.

    Raises UserError for anything but one coefficient per token, and one auxiliary loss per token or row.
    """
    _check_coefficients(coefficients, objective, batch)
    normaliser = objective.normaliser
    if denominator is None:
        denominator = normaliser.denominator(batch)
        if not batch.mask.any():
            warnings.warn("every token of the batch is masked: the loss is 0", stacklevel=2)
    values = torch.where(batch.mask, coefficients.values, 0)  # padding may hold anything, even NaN
    loss = -reduce(values * batch.logp, batch, normaliser, denominator)
    live = {key: value for key, value in batch.inputs.items() if value.requires_grad and value.ndim > 1}
    batch = batch.replace(**{key: torch.where(over(batch.mask, value), value, 0) for key, value in live.items()})
    for name, one in objective.auxiliary(batch).items():
        if one.shape != batch.mask.shape[:1]:
            _check_per_token(one, f"auxiliary(batch) gives {name!r}", objective, batch)
        loss = loss + reduce(one, batch, normaliser, denominator)
    if term is not None:
        loss = loss + reduce(coefficients.of_term(term, batch.mask), batch, normaliser, denominator)
    return loss


def _check_coefficients(found: object, objective: Objective, batch: TokenBatch) -> None:
    """Raise UserError unless they are `Coefficients` with one value per token."""
    if not isinstance(found, Coefficients):
        what = f"returned {type(found).__name__}: return rlzoo.Coefficients(values)"
        raise UserError(f"objective {objective.name!r}: coefficients(batch) {what}")
    _check_per_token(found.values, "coefficients(batch) gives values", objective, batch)
    if found.logit_weight is not None:
        _check_per_token(found.logit_weight, "coefficients(batch) gives logit_weight", objective, batch)


def _check_per_token(value: Tensor, what: str, objective: Objective, batch: TokenBatch) -> None:
    """Raise UserError unless there is one value per token: another shape might be broadcast in silence."""
    if value.shape != (shape := batch.mask.shape):
        wrong = f"{what} of shape {list(value.shape)}: give one per token, [B, T], here {list(shape)}"
        raise UserError(f"objective {objective.name!r}: {wrong}")
