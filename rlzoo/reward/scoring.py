"""Scoring completions with a reward; errors name the offending row."""

from __future__ import annotations

import math
import numbers
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlzoo.errors import UserError
from rlzoo.registry import one_line
from rlzoo.reward.calling import RAISED, Log, TrainerState, accepted, advice, call, innermost

OnError = Literal["fail", "null"]
"""What happens to a row on which a reward fails: an error that names the row, or a warning and the value None."""


@dataclass(frozen=True)
class Score:
    """What a reward returns for one completion."""

    value: float | None
    """The reward; None if the function returned None."""
    components: dict[str, float | None]
    """The value of each component by name: the reward itself, or the terms of a weighted sum."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Values that the reward logged for this completion with ``log_extra``."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers that the reward logged for the whole call with ``log_metric``."""


class CompositeReward(ABC):
    """The base class of rewards that report the values of named components."""

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """The rewards without their components, in TRL's signature. Raises UserError as `score` does."""
        return [score.value for score in self.score(prompts, completions, columns, completion_ids)]

    @property
    @abstractmethod
    def components(self) -> tuple[str, ...]:
        """The names of the components."""

    @abstractmethod
    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        on_error: OnError = "fail",
    ) -> list[Score]:
        """One `Score` per completion. ``on_error`` determines what happens to a row on which a component fails."""

    def answers(self, completions: Sequence[Any]) -> list[str | None]:
        """See `Reward.answers`; by default, no answers."""
        return [None] * len(completions)


@dataclass(frozen=True)
class Reward:
    """A reward with bound options, whose return values are checked."""

    name: str
    """The name in messages, reports and logs."""
    function: Callable[..., Any]
    """The function to call, in TRL's signature."""
    on_error: OnError = "fail"
    """What happens to a row on which the reward fails: an error that names the row, or a warning and the value None."""
    state: TrainerState = field(default_factory=TrainerState, compare=False)
    """The argument ``trainer_state`` of the reward."""

    @property
    def __name__(self) -> str:
        """The name under which TRL logs the reward."""
        return self.name

    @property
    def components(self) -> tuple[str, ...]:
        """The keys of `Score.components`."""
        return self.function.components if isinstance(self.function, CompositeReward) else (self.name,)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """The rewards without their components, in TRL's signature; raises UserError as `score` does."""
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
        """One `Score` per completion. ``columns`` are the data's columns, with one value per completion.

        Raises UserError for a column that is missing or of the wrong length and, with ``on_error="fail"``, for a reward
        that raises, or returns anything other than one finite number or None per completion.
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
        except UserError:  # about the data as a whole, not about a row
            raise
        except RAISED as error:
            return self._one_by_one(arguments, len(completions), error)

    def answers(self, completions: Sequence[Any]) -> list[str | None]:
        """The final answer in each completion, found by the reward's method ``answer_of(completion)``.

        Empty if a completion has no answer, and None if the reward has no such method. With ``on_error="fail"``, raises
        UserError if the method raises.
        """
        answer_of = getattr(innermost(self.function), "answer_of", None)
        try:
            if isinstance(self.function, CompositeReward):
                return self.function.answers(completions)
            if answer_of is not None:
                return [str(answer_of(completion) or "") for completion in completions]
        except UserError as error:
            failed(str(error), self.on_error, error)
        except RAISED as error:
            failed(f"reward {self.name!r}: answer_of raised {one_line(error)}", self.on_error, error)
        return [None] * len(completions)

    def _called(self, arguments: Mapping[str, Any], rows: int, first: int = 0) -> list[Score]:
        """The scores of ``rows`` completions, numbered from ``first``."""
        log = Log(self.name, rows)
        values = self._checked(call(self.function, self._given(arguments, log, rows)), rows, first)
        return [Score(v, {self.name: v}, *logged) for v, logged in zip(values, log.of_rows(), strict=True)]

    def _given(self, arguments: Mapping[str, Any], log: Log, rows: int) -> dict[str, Any]:
        """The arguments that the reward takes, including TRL's logging functions."""
        arguments = {"log_extra": log.extra, "log_metric": log.metric, **arguments}
        given = accepted(self.function, arguments, self.name)
        for name, values in given.items():
            if _is_column(values) and len(values) != rows:
                raise UserError(f"reward {self.name!r}: {name!r} has {len(values)} values for {rows} completions")
        return given

    def _one_by_one(self, arguments: Mapping[str, Any], rows: int, whole: BaseException) -> list[Score]:
        """Call the reward on each row separately, to find the offending rows."""
        scores: list[Score] = []
        hint: str | None = None
        for row, alone in enumerate(one_by_one(arguments, rows)):
            try:
                scores += self._called(alone, 1, first=row)
            except UserError:
                raise
            except RAISED as error:
                if hint is None:  # only once, because it calls the reward again
                    hint = advice(self.function, self._given(alone, Log(self.name, 1), 1), error)
                is_empty = alone["completions"][0] in ("", [{"role": "assistant", "content": ""}])
                empty = ", an empty completion" if is_empty else ""
                message = f"reward {self.name!r} raised on row {row}{empty}: {one_line(error)}{hint}"
                failed(message, self.on_error, error)
                scores.append(Score(None, {self.name: None}))
        if self.on_error == "fail":
            message = f"raised on {rows} rows together, but on none of them alone: {one_line(whole)}"
            raise UserError(f"reward {self.name!r} {message}") from whole
        return scores

    def _checked(self, result: Any, rows: int, first: int = 0) -> list[float | None]:
        """The result as ``rows`` values, each a float or None, numbered from ``first``."""
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
    """Raise UserError or warn, depending on ``on_error``."""
    if on_error == "fail":
        raise UserError(message) from cause
    warnings.warn(f"{message}; scored as null", RuntimeWarning, stacklevel=2)


def _is_column(value: Any) -> bool:
    """Whether an argument has one value per row, unlike TRL's ``trainer_state``."""
    return (isinstance(value, Sequence) and not isinstance(value, str)) or getattr(value, "ndim", 0) > 0


def one_by_one(arguments: Mapping[str, Any], rows: int) -> Iterator[dict[str, Any]]:
    """The arguments of a reward for each row alone."""
    for row in range(rows):
        yield {n: value[row : row + 1] if _is_column(value) else value for n, value in arguments.items()}
