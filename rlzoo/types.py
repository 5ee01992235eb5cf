"""The core types of rlzoo. Shapes are in the annotations: B sequences, T completion positions, N flat positions.

A completion position ``t`` holds the token ``y_t`` and the values computed to predict it. Prompts are removed, and so
are tokens of a completion that are not learned from, such as a tool's result: they are context, and the positions of a
row are its learned tokens, one after the other. Rows are padded on the right, and values at masked positions are
ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlzoo.errors import UserError
from rlzoo.registry import Registry, canonical


class Selection(Enum):
    """The built-in views: which rows of a buffer an objective learns from, and in which units."""

    DEMONSTRATIONS = "demonstrations"
    """Single rows written by an expert."""
    CORRECT = "correct"
    """Single rows sampled by a policy and rewarded as correct."""
    PAIRS = "pairs"
    """A better and a worse completion of one prompt."""
    GROUPS = "groups"
    """All samples of one prompt."""
    UNPAIRED = "unpaired"
    """Single rows that have a reward, good and bad ones."""


class Unit(Enum):
    """The kind of a view's units: rows that are drawn and kept together."""

    ROW = "row"
    """A single row."""
    PAIR = "pair"
    """A better and a worse completion of one prompt, in this order."""
    GROUP = "group"
    """Samples of one prompt."""


Units = tuple[tuple[int, ...], ...]
"""Row indices, one tuple per unit."""


class Selector:
    """A view: which rows an objective learns from, in which units, and with which weights.

    A subclass defines ``units(self, rows, ...)``, where ``rows`` is the buffer as a pyarrow table; an objective's
    ``view_options`` may set the other parameters. A view without any units is an error.
    """

    name: ClassVar[str]
    """The name in the registry and in messages."""
    unit: ClassVar[Unit] = Unit.ROW
    """The kind of its units."""
    is_sampled: ClassVar[bool] = True
    """Whether its rows are samples; False for demonstrations, for which nothing has to be sampled."""
    is_imitated: ClassVar[bool] = False
    """Whether its units are single rows that are imitated whatever their reward. Another view of this kind can take its
    place, and the option ``weighted`` draws rows in proportion to their reward."""
    units: Callable[..., Units]
    """The units: tuples of row indices."""

    def weights(self, rows: Any, units: Units) -> tuple[float, ...] | None:
        """A weight per unit, for drawing with replacement; None draws each unit once per epoch."""
        return None


WhichView = Selection | Selector | str
"""A built-in view, a view object, or a name (registered, ``module:Name`` or ``file.py:Name``)."""
_views: Registry[type[Selector]] = Registry("view", "rlzoo.buffers.selectors", "rlzoo.views")
_View = TypeVar("_View", bound=type[Selector])


def register_view(view: _View) -> _View:
    """Class decorator: register a `Selector` under its ``name``. Raises UserError if another class has that name."""
    _views.add(view.name, view)
    return view


def list_views() -> list[str]:
    """The names of all registered views: built-ins and those of installed packages' entry points."""
    return _views.names()


def selector_of(which: WhichView) -> Selector:
    """The view of a selection, a name or a view object. Raises UserError for an unknown name, and for anything else.

    ``module:Name`` and ``file.py:Name`` may name a class or, for options of its own, an instance.
    """
    if isinstance(which, Selector):
        return which
    found: Any = _views.get(name_of_view(which)) if isinstance(which, Selection | str) else None
    if isinstance(found, Selector):
        return found
    if not (isinstance(found, type) and issubclass(found, Selector) and hasattr(found, "units")):
        raise UserError(f"learns_from: {which!r} is not a view: give a Selection, or a Selector with a method units")
    return found()


def builtin(which: WhichView) -> WhichView:
    """The `Selection` of a built-in view's name; any other view unchanged."""
    named = canonical(which) if isinstance(which, str) else None
    return next((selection for selection in Selection if selection.value == named), which)


def name_of_view(which: WhichView) -> str:
    """The name of a view, for messages and tables."""
    if isinstance(which, Selection):
        return which.value
    return which if isinstance(which, str) else which.name


class Coupling(Enum):
    """Which other rows of the batch a coefficient depends on."""

    NONE = "none"
    """None: only its own row."""
    PAIR = "pair"
    """The other half of its pair."""
    GROUP = "group"
    """The rows of its group."""
    BATCH = "batch"
    """All rows of the optimizer batch."""


class AbsentInputError(UserError, AttributeError):
    """An input was read from a batch that its objective's ``requires`` does not list."""


@dataclass(frozen=True, init=False)
class TokenBatch:
    """Everything an objective may read: fields of the rows, and the inputs that `Objective.requires` lists.

    An input is read by its key, ``batch["behaviour_logp"]`` or ``batch.behaviour_logp``. Reading one that was not
    requested raises `AbsentInputError`, which names it; so does reading ``logp`` before it is known, in advantages.
    """

    logp: Float[Tensor, "B T"]
    """log π_θ(y_t | x, y_<t) in nats, at the temperature of `Objective.at_sampling_temperature`; carries the graph."""
    mask: Bool[Tensor, "B T"]
    """True at completion tokens that are learned from, end of sequence included."""
    advantage: Float[Tensor, "B T"] | None
    """The advantage of each token, once `Objective.prepare` has set it."""
    reward: Float[Tensor, " B"] | None
    """The reward of each completion, in float64."""
    group: Int[Tensor, " B"] | None
    """Equal for rows of one prompt."""
    partner: Int[Tensor, " B"] | None
    """Row index of the other half of a pair."""
    chosen: Bool[Tensor, " B"] | None
    """True for the better half of a pair."""
    inputs: Mapping[str, Float[Tensor, "B T ..."] | Float[Tensor, " B"] | Float[Tensor, ""]]
    """Inputs by key, and values that `Objective.prepare` adds, such as returns."""

    def __init__(
        self,
        logp: Float[Tensor, "B T"] | None,
        mask: Bool[Tensor, "B T"],
        advantage: Float[Tensor, "B T"] | None = None,
        reward: Float[Tensor, " B"] | None = None,
        group: Int[Tensor, " B"] | None = None,
        partner: Int[Tensor, " B"] | None = None,
        chosen: Bool[Tensor, " B"] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        statistics: Mapping[str, Tensor] | None = None,
        **named: Tensor | None,
    ) -> None:
        """``statistics`` and ``named`` are further inputs; those that are None are left out. ``logp`` may be None.

        Raises ValueError for a tensor of the wrong shape.
        """
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise ValueError(f"TokenBatch needs a boolean mask [B, T], got {tuple(mask.shape)}, {mask.dtype}")
        given = {name: value for name, value in named.items() if value is not None}
        known = {**(inputs or {}), **(statistics or {}), **given}
        values: dict[str, Any] = {"mask": mask, "advantage": advantage, "reward": reward, "group": group}
        values |= {"partner": partner, "chosen": chosen, "inputs": known, **({} if logp is None else {"logp": logp})}
        vars(self).update(values)
        rows, length = mask.shape
        for name, value in self._tensors().items():
            expected = [(rows, length), *([] if name in ("logp", "advantage") else [(rows,)])]
            if name not in _OWN:  # an input may be a scalar, or have further axes
                expected += [(), (rows, length, *value.shape[2:])]
            if tuple(value.shape) not in expected:
                raise ValueError(f"TokenBatch.{name} has shape {tuple(value.shape)}, expected {expected[0]}")

    def __getitem__(self, key: str) -> Tensor:
        """The input of this key. Raises `AbsentInputError` if the batch has none."""
        if key not in self.inputs:
            raise AbsentInputError(f"the batch has no {key!r}: {_told(self.inputs)}")
        return self.inputs[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inputs" not in vars(self):  # as when copied
            raise AttributeError(name)
        if name == "logp":
            raise AbsentInputError(
                "the policy's log-probs are not known when advantages are computed: list Snapshot() in the "
                "objective's requires and read batch.snapshot_logp"
            )
        return self[name]

    def get(self, name: str) -> Tensor | None:
        """The field or input of this name; None if the batch has none."""
        found: Tensor | None = vars(self).get(name, self.inputs.get(name))
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of log-probs, and thus of advantages."""
        logp = self.get("logp")
        return torch.get_default_dtype() if logp is None else logp.dtype

    def replace(self, **values: Any) -> TokenBatch:
        """The same batch with some fields or inputs changed or added; an input that is None is left out."""
        own = {name: values.pop(name, self.get(name)) for name in _OWN}
        inputs = {**values.pop("inputs", self.inputs), **values.pop("statistics", {}), **values}
        return TokenBatch(**own, inputs={key: value for key, value in inputs.items() if value is not None})

    def _tensors(self) -> dict[str, Tensor]:
        own = {name: self.get(name) for name in _OWN}
        return {**{name: value for name, value in own.items() if value is not None}, **self.inputs}

    def detach(self) -> TokenBatch:
        """The same batch without a graph."""
        return self.replace(**{name: value.detach() for name, value in self._tensors().items()})

    def rows(self, index: Int[Tensor, " R"], length: int) -> TokenBatch:
        """The rows at ``index``, cut to ``length`` positions. Partners must be among them; they are renumbered."""

        def cut(value: Tensor) -> Tensor:
            return value if value.ndim == 0 else value[index] if value.ndim == 1 else value[index, :length]

        values = {name: cut(value) for name, value in self._tensors().items()}
        if self.partner is not None:
            place = torch.full((len(self.mask),), -1, dtype=torch.long, device=index.device)
            place[index] = torch.arange(len(index), device=index.device)
            values["partner"] = place[self.partner[index]]
        return self.replace(**values)


def over(mask: Float[Tensor, "B T"] | Bool[Tensor, "B T"], value: Float[Tensor, "B T ..."]) -> Tensor:
    """A mask or a weight per token with as many axes as a value per token, so that the two broadcast."""
    return mask[(..., *[None] * (value.ndim - 2))]


_OWN = ("logp", "mask", "advantage", "reward", "group", "partner", "chosen")


def _told(inputs: Mapping[str, Tensor]) -> str:
    there = ", ".join(inputs) or "none"
    return f"an objective gets the inputs that its requires lists, here {there}; add the input that has this key"


class Normaliser(Enum):
    """How per-token terms are reduced: Σ w_t x_t / Z, with Z over the whole optimizer step."""

    PER_TOKEN = "per_token"
    """w = 1, Z = number of completion tokens."""
    PER_SEQUENCE = "per_sequence"
    """w = 1/|y|, Z = number of sequences: the mean over sequences of the mean over tokens."""
    SEQUENCE_SUM = "sequence_sum"
    """w = 1, Z = number of sequences: the mean over sequences of the sum over tokens."""
    PER_PAIR = "per_pair"
    """w = 1, Z = number of pairs."""

    def weight(self, batch: TokenBatch) -> Float[Tensor, "B 1"]:
        """The weight w of each row's tokens."""
        length = batch.mask.sum(1, keepdim=True).to(batch.dtype)
        return 1 / length.clamp(min=1) if self is Normaliser.PER_SEQUENCE else torch.ones_like(length)

    def denominator(self, batch: TokenBatch) -> float:
        """Z of a batch. Z of an optimizer step is the sum over its micro-batches and ranks."""
        return float(self.count(batch))

    def count(self, batch: TokenBatch) -> Tensor | int:
        """The same, without waiting for a GPU: a number, or a scalar tensor on the device that holds the mask."""
        match self:
            case Normaliser.PER_TOKEN:
                return batch.mask.sum()
            case Normaliser.PER_PAIR if batch.chosen is not None:
                return batch.chosen.sum()
            case _:
                return len(batch.mask)


@dataclass(frozen=True)
class Coefficients:
    """An objective's coefficients c_t, always detached, with the loss and metrics to report."""

    values: Float[Tensor, "B T"]
    """c_t, the factor of ∇ log π_θ(y_t) in ∇J; ignored at masked positions."""
    loss: Float[Tensor, "B T"] | Float[Tensor, " B"] | None = None
    """The paper's loss before normalisation, where it is not -c·log π; for reporting only."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Metrics by name: [B, T] is averaged over completion tokens, [B] over rows; NaN entries are left out."""
    logit_weight: Float[Tensor, "B T"] | None = None
    """The weight of the objective's `logit_term` at each token; None: 1."""

    def __post_init__(self) -> None:
        own = {"values": self.values, "loss": self.loss, "logit_weight": self.logit_weight}
        given: dict[str, Any] = {name: value for name, value in own.items() if value is not None or name == "values"}
        for name, value in {**given, **{f"metrics[{name!r}]": value for name, value in self.metrics.items()}}.items():
            if not isinstance(value, Tensor):  # a number, say
                kind = type(value).__name__
                raise UserError(f"Coefficients({name}) takes a tensor with one value per token, not {kind}")
        for name, value in given.items():
            object.__setattr__(self, name, value.detach())
        object.__setattr__(self, "metrics", {k: v.detach() for k, v in self.metrics.items()})

    def weighted(self, weight: Float[Tensor, "B T"]) -> Coefficients:
        """The coefficients, and a loss per token, times a weight per token."""
        loss = self.loss if self.loss is None or self.loss.ndim < 2 else self.loss * weight
        return replace(self, values=self.values * weight, loss=loss)

    def of_term(self, term: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """A `logit_term` times its weight at each token."""
        return term if self.logit_weight is None else torch.where(mask, self.logit_weight, 0) * term


@dataclass(frozen=True)
class Trajectory:
    """One row of a buffer: a prompt, a completion, and what is known about it."""

    prompt: str
    """The text that the model saw, with the chat template applied."""
    completion: str
    """The text of the completion, without its end."""
    prompt_ids: list[int]
    """The tokens of the prompt."""
    completion_ids: list[int]
    """The tokens of the completion. Unless truncated, the last ones are its end: the end of sequence, or the end of a
    turn in the chat template. They may be several turns, with the user's or tools' between them."""
    prompt_id: str
    """Equal for completions of one prompt."""
    source: str = "demonstration"
    """``demonstration``, ``policy``, or ``preference``."""
    reward: float | None = None
    """The reward; None for none."""
    reward_components: dict[str, float | None] = field(default_factory=dict)
    """The components of the reward by name, and the metrics that it logged."""
    behaviour_logp: list[float] | None = None
    """One log-prob per completion token, in nats, of the policy that sampled: at ``temperature``, without ``top_p``."""
    sampler_logp: list[float] | None = None
    """The same as computed by the sampling engine, if that is not the trainer's."""
    reference_logp: list[float] | None = None
    """Log-probs of the frozen reference at temperature 1."""
    tempered_reference_logp: list[float] | None = None
    """Log-probs of the frozen reference at ``temperature``, if that is not 1."""
    policy_version: int = 0
    """The version of the policy that sampled: the number of batches that it had been trained on."""
    truncated: bool = False
    """Whether the completion was cut at the length limit, and so has no end."""
    temperature: float = 1.0
    """The sampling temperature; 1 for a completion that was not sampled by a known policy."""
    top_p: float = 1.0
    """The top-p of nucleus sampling; 1: the whole distribution."""
    messages: list[dict[str, Any]] | None = None
    """The conversation that ``prompt`` was rendered from, if any: ``role``, ``content`` and whatever else a message
    has, such as ``tool_calls``."""
    columns: dict[str, object] = field(default_factory=dict)
    """The problem's other columns, for rewards and inputs."""
    inputs: dict[str, list[float]] = field(default_factory=dict)
    """Other stored inputs by `Input.column`: one value per completion token, or a single one."""
    completion_mask: list[bool] | None = None
    """Which completion tokens are learned from; the others, such as a tool's result, are context. None: all."""
    completion_messages: list[dict[str, Any]] | None = None
    """The messages of the completion: several turns, or one of the assistant with more than its text, such as
    ``tool_calls``. None: one turn with the text of ``completion``, or turns that are not known."""

    def stored(self, name: str) -> Any:
        """The field or stored input of this name; None if there is none."""
        return getattr(self, name) if name in _FIELDS else self.inputs.get(name)


_FIELDS = frozenset(f.name for f in fields(Trajectory))
TEMPERED = "tempered_"
"""The prefix of a stored input at the row's sampling temperature, if that is not 1."""


def at_temperature(row: Trajectory, sampling: bool) -> Trajectory:
    """The row with log-probs and other stored inputs at its sampling temperature (``sampling``) or at 1."""
    if row.temperature == 1.0:
        return row
    if not sampling:
        return replace(row, temperature=1.0)
    tempered = {n.removeprefix(TEMPERED): v for n, v in row.inputs.items() if n.startswith(TEMPERED)}
    others = {n: v for n, v in row.inputs.items() if not n.startswith(TEMPERED) and n not in tempered}
    return replace(row, reference_logp=row.tempered_reference_logp, inputs={**others, **tempered})
