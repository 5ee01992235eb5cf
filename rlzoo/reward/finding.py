"""Rewards: finding them by name, binding their options, and checking what they return.

A reward has TRL's signature, ``reward(prompts, completions, **columns) -> list[float | None]``, sync or
async, so that TRL's rewards work here and ours work there. Prompts and completions are strings or
conversations.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import typing
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Literal, TypeVar, cast

import pydantic

from rlzoo.errors import UserError, unknown
from rlzoo.registry import Registry, canonical, told
from rlzoo.reward.calling import ENGINE, RAISED, SIGNATURE, Log, TrainerState, advice, call, columns_of

OnError = Literal["fail", "null"]
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

_rewards: Registry[Callable[..., Any]] = Registry("reward", "rlzoo.rewards", "rlzoo.rewards")
_Callable = TypeVar("_Callable", bound=Callable[..., Any])


@dataclass(frozen=True)
class Score:
    """The reward of a completion; None if the reward returned none."""

    value: float | None
    parts: dict[str, float | None]
    """The value of each named part: the reward itself, or the terms of a weighted sum."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Values that the reward logged for this completion with ``log_extra``."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers that it logged for the whole call with ``log_metric``."""


class CompositeReward(ABC):
    """A reward with named parts, which reports the value of each."""

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """The values alone, in TRL's signature."""
        return [score.value for score in self.score(prompts, completions, columns, completion_ids)]

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """The names of the parts."""

    @abstractmethod
    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        on_error: OnError = "fail",
    ) -> list[Score]:
        """One `Score` per completion."""

    def answers(self, completions: Sequence[Any]) -> list[str | None]:
        """See `Reward.answers`; by default, no answers."""
        return [None] * len(completions)


@dataclass(frozen=True)
class Reward:
    """A reward ready to be called: its options are bound, and its return values are checked."""

    name: str
    function: Callable[..., Any]
    on_error: OnError = "fail"
    """What happens to a row on which the reward fails: an error that names it, or None and a warning."""
    state: TrainerState = field(default_factory=TrainerState, compare=False)
    """The argument ``trainer_state``."""

    @property
    def __name__(self) -> str:
        """TRL logs a reward under this name."""
        return self.name

    @property
    def parts(self) -> tuple[str, ...]:
        """The keys of `Score.parts`."""
        return self.function.parts if isinstance(self.function, CompositeReward) else (self.name,)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """The values alone, in TRL's signature."""
        return [score.value for score in self.score(prompts, completions, columns, completion_ids)]

    def at(self, step: int, max_steps: int, epoch: float = 0.0) -> Reward:
        """The same reward after ``step`` of ``max_steps`` optimizer steps and ``epoch`` passes over the prompts."""
        return replace(self, state=replace(self.state, global_step=step, max_steps=max_steps, epoch=epoch))

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[Score]:
        """One `Score` for each completion.

        Raises UserError for a column that is missing or of another length and, with ``on_error="fail"``,
        for a reward that raises or returns anything but one finite number or None for each completion.
        """
        if not completions:
            return []
        columns = {"trainer_state": self.state, **columns}  # TRL passes its own when it calls this
        if isinstance(self.function, CompositeReward):
            return self.function.score(prompts, completions, columns, completion_ids, self.on_error)
        arguments = {**columns, "prompts": prompts, "completions": completions}
        if completion_ids is not None:
            arguments["completion_ids"] = completion_ids
        try:
            return self._called(arguments, len(completions))
        except UserError:  # the data lacks something: not the fault of a row
            raise
        except RAISED as error:
            return self._one_by_one(arguments, len(completions), error)

    def answers(self, completions: Sequence[Any]) -> list[str | None]:
        """The answer that each completion commits to, by the reward's method ``answer_of(completion)``.

        Empty if a completion has no answer, None if the reward has no such method. With ``on_error="fail"``, raises
        UserError if the method raises.
        """
        answer_of = getattr(_innermost(self.function), "answer_of", None)
        try:
            if isinstance(self.function, CompositeReward):
                return self.function.answers(completions)
            if answer_of is not None:
                return [str(answer_of(completion) or "") for completion in completions]
        except UserError as error:
            failed(str(error), self.on_error, error)
        except RAISED as error:
            failed(f"reward {self.name!r}: answer_of raised {told(error)}", self.on_error, error)
        return [None] * len(completions)

    def _called(self, arguments: Mapping[str, Any], rows: int, first: int = 0) -> list[Score]:
        """The scores of ``rows`` completions, of which the first is row ``first``."""
        log = Log(self.name, rows)
        values = self._checked(call(self.function, self._given(arguments, log, rows)), rows, first)
        return [Score(v, {self.name: v}, *logged) for v, logged in zip(values, log.of_rows(), strict=True)]

    def _given(self, arguments: Mapping[str, Any], log: Log, rows: int) -> dict[str, Any]:
        """The arguments that the reward takes, TRL's logging functions included."""
        arguments = {"log_extra": log.extra, "log_metric": log.metric, **arguments}
        given = _accepted(self.function, arguments, self.name)
        for name, values in given.items():
            if _is_column(values) and len(values) != rows:
                raise UserError(f"reward {self.name!r}: {name!r} has {len(values)} values for {rows} completions")
        return given

    def _one_by_one(self, arguments: Mapping[str, Any], rows: int, whole: BaseException) -> list[Score]:
        """Call the reward on each row alone, to find the offending rows."""
        scores: list[Score] = []
        hint: str | None = None
        for row, alone in enumerate(one_by_one(arguments, rows)):
            try:
                scores += self._called(alone, 1, first=row)
            except UserError:
                raise
            except RAISED as error:
                if hint is None:  # it takes another call of the reward
                    hint = advice(self.function, self._given(alone, Log(self.name, 1), 1), error)
                failed(f"reward {self.name!r} raised on row {row}: {told(error)}{hint}", self.on_error, error)
                scores.append(Score(None, {self.name: None}))
        if self.on_error == "fail":
            message = f"raised on {rows} rows together and on none of them alone: {told(whole)}"
            raise UserError(f"reward {self.name!r} {message}") from whole
        return scores

    def _checked(self, result: Any, rows: int, first: int = 0) -> list[float | None]:
        """The result as ``rows`` floats or None, of which the first is row ``first``."""
        wanted = f"for {rows} completions: return one number or None per completion"
        if hasattr(result, "tolist"):  # an array or a tensor
            result = result.tolist()
        if not isinstance(result, Iterable) or isinstance(result, str | bytes | Mapping | Set):
            failed(f"reward {self.name!r} returned {type(result).__name__} {wanted}", self.on_error)
            return [None] * rows
        result = list(result)
        if len(result) != rows:
            failed(f"reward {self.name!r} returned {len(result)} values {wanted}", self.on_error)
            return [None] * rows
        return [self._number(value, first + row) for row, value in enumerate(result)]

    def _number(self, value: Any, row: int) -> float | None:
        if hasattr(value, "tolist"):  # an element of an array or a tensor
            value = value.tolist()
        if value is None:
            return None
        if isinstance(value, numbers.Real) and math.isfinite(value):
            return float(value)
        message = f"{value!r:.60} on row {row}: return a finite number, or None for no reward"
        failed(f"reward {self.name!r} returned {message}", self.on_error)
        return None


def failed(message: str, on_error: OnError, cause: BaseException | None = None) -> None:
    """Raise UserError, or warn, as ``on_error`` says."""
    if on_error == "fail":
        raise UserError(message) from cause
    warnings.warn(f"{message}; scored as null", RuntimeWarning, stacklevel=2)


def register_reward(reward: _Callable) -> _Callable:
    """Decorator: register a reward function or class under its ``name``, or its own name with dashes."""
    _rewards.add(_name_of(reward), reward)
    return reward


def list_rewards() -> list[str]:
    """The names of all registered rewards: built-ins and those of installed packages' entry points."""
    return _rewards.names()


def get_reward(spec: Any, on_error: OnError = "fail") -> Reward:
    """The reward that ``spec`` describes.

    A spec is a name, ``package.module:Name``, ``path/to/file.py:Name``, a callable, a mapping ``{"name": any of these,
    **options}``, or a list of these, each with an optional ``"weight"``, for their weighted sum. Options are passed to
    the constructor of a class, bound to a function that takes completions, and passed to any other function, which is
    a factory. A `Reward` is returned unchanged. Raises UserError for an unknown name or option, and for anything that
    is not a reward.
    """
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, Sequence) and not isinstance(spec, str):
        spec = {"name": "weighted", "of": spec}
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    if "name" not in options:
        raise UserError(f"reward {options!r:.200} has no name: write {{'name': ..., options}}")
    which = options.pop("name")
    found = _rewards.get(which) if isinstance(which, str) else which
    if isinstance(found, Reward) and not options:
        return found
    if not callable(found):
        raise UserError(f"reward {which!r:.200} is {type(found).__name__}, not something that can be called")
    function = _built(found, options)
    return Reward(_name_of(function), function, on_error)


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name_of(reward: Any) -> str:
    reward = _innermost(reward)
    given = getattr(reward, "name", None)
    own = given if isinstance(given, str) else getattr(reward, "__name__", type(reward).__name__)
    return canonical(own)


def _built(found: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """The scoring callable, built from the object that a spec names and its options."""
    name, takes = _name_of(found), _parameters(found)
    scores = not isinstance(found, type) and _is_reward(takes)
    options = _checked_options(found, name, takes, options, anything=not scores and _takes_anything(takes))
    if scores:
        return functools.partial(found, **options) if options else found
    missing = [p.name for p in _required(takes) if p.name not in options]
    if missing:
        message = f"needs the option {missing[0]!r}: {{'name': ..., {missing[0]!r}: ...}}"
        if not isinstance(found, type):
            message = f"{_unlike(found, takes)}; if it builds a reward, it {message}"
        raise UserError(f"reward {name!r} {message}")
    try:
        built = found(**options)
    except UserError:
        raise
    except RAISED as error:
        raise UserError(f"reward {name!r} cannot be built: {told(error)}") from error
    if not callable(built):
        raise UserError(
            f"reward {name!r} {_unlike(found, takes)}; if it builds a reward, it must return a callable, "
            f"not {type(built).__name__}"
        )
    return cast(Callable[..., Any], built)


def _unlike(found: Callable[..., Any], takes: Mapping[str, inspect.Parameter]) -> str:
    """The error for a function with another signature, such as verl's, and its fix."""
    own = _innermost(found)
    name = getattr(own, "__name__", type(own).__name__)
    stars: dict[int, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    own_parameters = ", ".join(stars.get(p.kind, "") + p.name for p in takes.values())
    return (
        f"takes no completions but ({own_parameters}); a reward has TRL's signature, {SIGNATURE}: wrap it, "
        f"`def reward(completions, **columns): return [{name}(...) for completion in completions]`"
    )


def _checked_options(
    found: Any, name: str, takes: Mapping[str, inspect.Parameter], options: Mapping[str, Any], anything: bool
) -> dict[str, Any]:
    known = [n for n, p in takes.items() if p.kind not in _VARIADIC and n not in ENGINE]
    hints = _hints(found) if options else {}
    checked = {}
    for option, value in options.items():
        if option not in known and not anything:
            raise unknown(f"option of reward {name!r}", str(option), known)
        checked[option] = _typed(value, hints.get(option, Any), f"reward {name!r}: option {option!r}")
    return checked


def _typed(value: Any, hint: Any, what: str) -> Any:
    """The value validated by its annotation; an annotation unknown to pydantic accepts anything."""
    try:
        return pydantic.TypeAdapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        raise UserError(f"{what} = {value!r:.60}: {error.errors()[0]['msg']}") from None
    except pydantic.errors.PydanticUserError:
        return value


def _hints(found: Any) -> dict[str, Any]:
    try:
        plain_class = isinstance(found, type) and not is_dataclass(found)
        return typing.get_type_hints(vars(found).get("__init__", found) if plain_class else found)
    except (NameError, TypeError):  # names for type checkers only, or a callable without annotations
        return {}


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a callable; none for a builtin without a signature.

    For a decorated function, those of the wrapper, unless it passes on all arguments.
    """
    try:
        outer = inspect.signature(function, follow_wrapped=False).parameters
        passes_on = all(p.kind in _VARIADIC for p in outer.values())
        return inspect.signature(function).parameters if passes_on else outer
    except ValueError:
        return {}


def _is_reward(takes: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a function scores completions, rather than being a factory. One of just ``*args, **columns`` scores."""
    return bool(set(takes) & set(ENGINE)) or (bool(takes) and all(p.kind in _VARIADIC for p in takes.values()))


def _takes_anything(takes: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in takes.values())


def _required(takes: Mapping[str, inspect.Parameter]) -> list[inspect.Parameter]:
    return [p for p in takes.values() if p.default is p.empty and p.kind not in _VARIADIC]


def _accepted(function: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arguments that the reward takes. A bound option takes precedence over a column of the same name."""
    bound = function.keywords if isinstance(function, functools.partial) else {}
    takes = _parameters(function)
    for parameter in _required(takes):
        if parameter.name not in arguments:
            if not {"completions", "completion_ids"} & set(takes):
                raise UserError(f"reward {name!r} {_unlike(function, takes)}")
            fix = f"rename one with `columns: {{{parameter.name}: ...}}`, or keep to TRL's signature, {SIGNATURE}"
            raise UserError(f"{missing_column(name, parameter.name, arguments)}; {fix}")
    anything = _takes_anything(takes)
    return {n: value for n, value in arguments.items() if n not in bound and (anything or n in takes)}


def missing_column(reward: str, column: str, columns: Mapping[str, Any]) -> UserError:
    """The error for data without a column that a reward needs."""
    return UserError(f"reward {reward!r} needs the column {column!r}; the data's columns: {columns_of(columns)}")


def _is_column(value: Any) -> bool:
    """Whether an argument has one value per row, unlike TRL's ``trainer_state``."""
    return (isinstance(value, Sequence) and not isinstance(value, str)) or getattr(value, "ndim", 0) > 0


def one_by_one(arguments: Mapping[str, Any], rows: int) -> Iterator[dict[str, Any]]:
    """The arguments of a reward for each row alone."""
    for row in range(rows):
        yield {n: value[row : row + 1] if _is_column(value) else value for n, value in arguments.items()}
