"""One call of a reward: its arguments, its logs, and hints on its errors."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import re
import threading
import warnings
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from rlzoo.errors import UserError

SIGNATURE = "reward(prompts, completions, **columns)"
"""The signature of a reward: TRL's."""
ENGINE = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments of a reward besides the data's columns, under TRL's names."""
RAISED = (Exception, SystemExit)
"""The exceptions of a reward that are caught; SystemExit would end the run silently."""
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass
class TrainerState:
    """The progress of training, with the fields of ``transformers.TrainerState``, as TRL passes it to a reward.

    ``global_step`` is the number of optimizer steps done, of ``max_steps``, and ``epoch`` the number of passes over the
    prompts. All are 0 outside training.
    """

    epoch: float = 0
    global_step: int = 0
    max_steps: int = 0
    logging_steps: int = 500
    eval_steps: int = 500
    save_steps: int = 500
    train_batch_size: int | None = None
    num_train_epochs: int = 0
    num_input_tokens_seen: int = 0
    total_flos: float = 0
    log_history: list[dict[str, float]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)


class Log:
    """What a reward logs in one call, with TRL's ``log_extra(column, values)`` and ``log_metric(name, value)``."""

    def __init__(self, reward: str, rows: int) -> None:
        self._reward, self._rows = reward, rows
        self._extra: dict[str, list[Any]] = defaultdict(list)
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """Log values of a column, one per completion, in one call or several."""
        self._extra[str(column)].extend(json.loads(json.dumps(list(values), default=_plain)))

    def metric(self, name: str, value: Any) -> None:
        """Log a number for the whole call. Raises TypeError or ValueError for anything else."""
        self._metrics[str(name)].append(float(value))

    def of_rows(self) -> list[tuple[dict[str, Any], dict[str, float]]]:
        """The extra values of each completion, with the metrics of the call.

        Columns with another number of values are ignored, with a RuntimeWarning.
        """
        for column, values in self._extra.items():
            if len(values) != self._rows:
                message = f"logged {len(values)} values of {column!r} for {self._rows} completions; they are ignored"
                warnings.warn(f"reward {self._reward!r} {message}", RuntimeWarning, stacklevel=2)
        extra = {column: values for column, values in self._extra.items() if len(values) == self._rows}
        metrics = means({name: value} for name, values in self._metrics.items() for value in values)
        return [({column: values[row] for column, values in extra.items()}, metrics) for row in range(self._rows)]


def means(rows: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean of the finite values of each name."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            if value is not None and math.isfinite(value):
                found[name].append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _plain(value: Any) -> Any:
    """Arrays, tensors and their elements as plain data; any other object as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The result of the function, awaited if it is async; it gets copies of the arguments, which it may modify."""
    given = {name: _copied(value) for name, value in arguments.items()}
    for name in {"prompts", "completions"} & set(given):
        given[name] = [Conversation(each) if isinstance(each, list) else each for each in given[name]]
    result = function(**given)
    if inspect.isawaitable(result):
        result = asyncio.run_coroutine_threadsafe(_awaited(result), _loop(os.getpid())).result()
    return list(result) if isinstance(result, Iterator) else result  # a generator runs here


class Conversation(list[Any]):
    """A list of messages. ``text in conversation`` raises TypeError, because it would always be False."""

    def __contains__(self, part: object) -> bool:
        return super().__contains__(self._no_text(part))

    def __eq__(self, other: object) -> bool:
        return super().__eq__(self._no_text(other))

    def __ne__(self, other: object) -> bool:
        return super().__ne__(self._no_text(other))

    __hash__ = None

    def _no_text(self, other: object) -> object:
        if isinstance(other, str) and other:
            raise TypeError(f"a conversation is a list of messages, and {other!r:.40} is text")
        return other


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(part) for part in value]
    return {key: _copied(part) for key, part in value.items()} if type(value) is dict else value


@lru_cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """An event loop that persists between calls, as in TRL, because a reward's clients are bound to it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


async def _awaited(result: Awaitable[Any]) -> Any:
    try:
        return await result
    except SystemExit as error:  # it would end the loop silently
        raise RuntimeError(f"SystemExit: {error}") from error


# Signatures of rewards


def innermost(function: Any) -> Any:
    """The function without its bound options."""
    while isinstance(function, partial):
        function = function.func
    return function


def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a callable; none for a builtin without a signature.

    For a decorated function, they are those of the wrapper, unless it takes only ``*args, **kwargs``.
    """
    try:
        outer = inspect.signature(function, follow_wrapped=False).parameters
        passes_on = all(p.kind in VARIADIC for p in outer.values())
        return inspect.signature(function).parameters if passes_on else outer
    except ValueError:
        return {}


def is_reward(takes: Mapping[str, inspect.Parameter]) -> bool:
    """Whether parameters are those of a reward rather than of a factory; ``*args, **columns`` alone are a reward's."""
    return bool(set(takes) & set(ENGINE)) or (bool(takes) and all(p.kind in VARIADIC for p in takes.values()))


def takes_anything(takes: Mapping[str, inspect.Parameter]) -> bool:
    """Whether there are ``**options`` among the parameters."""
    return any(p.kind is p.VAR_KEYWORD for p in takes.values())


def required(takes: Mapping[str, inspect.Parameter]) -> list[inspect.Parameter]:
    """The parameters without a default."""
    return [p for p in takes.values() if p.default is p.empty and p.kind not in VARIADIC]


def unlike(found: Callable[..., Any], takes: Mapping[str, inspect.Parameter]) -> str:
    """The error message for a function with another signature, such as verl's, with a fix."""
    own = innermost(found)
    name = getattr(own, "__name__", type(own).__name__)
    stars: dict[int, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    own_parameters = ", ".join(stars.get(p.kind, "") + p.name for p in takes.values())
    return (
        f"takes ({own_parameters}) rather than completions; a reward has TRL's signature, {SIGNATURE}: wrap it, "
        f"`def reward(completions, **columns): return [{name}(...) for completion in completions]`"
    )


def accepted(function: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arguments that the reward takes; a bound option takes precedence over a column of the same name.

    Raises UserError for a column that is missing, and for a function that is not a reward.
    """
    bound = function.keywords if isinstance(function, partial) else {}
    takes = parameters(function)
    for parameter in required(takes):
        if parameter.name not in arguments:
            if not {"completions", "completion_ids"} & set(takes):
                raise UserError(f"reward {name!r} {unlike(function, takes)}")
            raise UserError(f"{missing_column(name, parameter.name, arguments)}, or use TRL's signature, {SIGNATURE}")
    anything = takes_anything(takes)
    return {n: value for n, value in arguments.items() if n not in bound and (anything or n in takes)}


def missing_column(reward: str, column: str, columns: Mapping[str, Any]) -> UserError:
    """The UserError for data without a column that a reward needs."""
    fix = f"rename one with --column {column}=COLUMN (in an experiment file, `columns: {{{column}: COLUMN}}`)"
    return UserError(f"reward {reward!r} needs the column {column!r}; the data's columns: {columns_of(columns)}; {fix}")


# Hints on errors


def advice(function: Callable[..., Any], arguments: Mapping[str, Any], error: BaseException) -> str:
    """A hint to append to an error if the form of the completions or a missing column explains it; else empty."""
    if not isinstance(error, TypeError | KeyError | AttributeError | IndexError):
        return ""
    if _wants_other_form(function, arguments, error):
        if isinstance(arguments["completions"][0], str):
            return (
                "; it expects conversations, but these prompts and completions are plain text: "
                "set `chat: true` in the problem set, or change the reward to accept plain text"
            )
        return (
            "; it expects plain text, but these completions are conversations, "
            "[{'role': 'assistant', 'content': ...}]: remove `chat: true` (or messages as prompts), or change the "
            "reward to read completion[0]['content']"
        )
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        return "" if error.args[0] in arguments else f"; the data's columns: {columns_of(arguments)}"
    return ""


def columns_of(arguments: Mapping[str, Any]) -> str:
    """The names of the data's columns, as text."""
    return ", ".join(sorted(set(arguments) - set(ENGINE))) or "none"


_OF_TEXT = re.compile(r"string indices must be|'str' object (has no attribute|does not support item)")
_OF_MESSAGES = re.compile(r"'?Conversation'?( object|$)|'dict' object|\(not \"str\"\) to list|^a conversation is")


def _wants_other_form(function: Callable[..., Any], arguments: Mapping[str, Any], error: BaseException) -> bool:
    """Whether the reward expects conversations in place of text, or vice versa: determined by trying the other form.

    A typical error of the wrong form counts as well, unless the other form raises the same error.
    """
    if not arguments.get("completions"):
        return False
    other = {**arguments, "completions": [_other_form(c, "assistant") for c in arguments["completions"]]}
    if "prompts" in other:
        other["prompts"] = [_other_form(prompt, "user") for prompt in arguments["prompts"]]
    try:
        call(function, other)
    except RAISED as second:
        typical = _OF_TEXT if isinstance(arguments["completions"][0], str) else _OF_MESSAGES
        return (type(second), str(second)) != (type(error), str(error)) and bool(typical.search(str(error)))
    return True


def _other_form(text_or_messages: Any, role: str) -> Any:
    if isinstance(text_or_messages, str):
        return [{"role": role, "content": text_or_messages}]
    return "\n".join(str(message.get("content") or "") for message in text_or_messages)
