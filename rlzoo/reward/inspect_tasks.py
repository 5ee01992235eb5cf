"""Tasks of inspect (inspect_ai): the prompts of their samples, and their scorers.

A task runs as in inspect, but for the model: its solver is run up to the one call of ``generate``, whose messages are
the prompt, and again with a given completion, which its scorer then scores. Written for and tested with inspect_ai
0.3.285 (November 2026).
"""

from __future__ import annotations

import copy
import math
import os
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from rlzoo.errors import UnreachableError, UserError, unknown
from rlzoo.registry import one_line
from rlzoo.reward.calling import RAISED


class _Off:
    """A context in which inspect calls no model, in all threads; several may overlap."""

    VARIABLE = "INSPECT_DISABLE_MODEL_API"

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, dict[str, str]()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = {name: value for name, value in os.environ.items() if name == self.VARIABLE}
                os.environ[self.VARIABLE] = "1"
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                del os.environ[self.VARIABLE]
                os.environ.update(self._before)


_MODELS_ARE_OFF = _Off()
_Found = tuple[Any, str | None]
"""A value of inspect's, and the answer that the scorer found in the completion."""


@dataclass(frozen=True)
class InspectTask:
    """A task of inspect, as loaded by `inspect_task`."""

    label: str
    """Its name in messages."""
    samples: Mapping[str, Any] = field(repr=False)
    """inspect's samples by id; one without an id has its number, as in inspect."""
    solvers: Sequence[Any] = field(repr=False)
    scorers: Mapping[str, Any] = field(repr=False)
    """Its scorers by name."""
    stop: tuple[str, ...] = ()
    """Texts at which inspect's model would stop."""

    def sample(self, name: str) -> Any:
        """The sample with an id. Raises UserError for an unknown one."""
        if name not in self.samples:
            raise UserError(f"{self.label} has no sample {name!r}: has it changed, or is its data shuffled anew?")
        return self.samples[name]

    def columns(self, name: str) -> dict[str, Any]:
        """A sample's ``target`` and, where it has them, its ``choices``, ``metadata`` and ``input`` as text."""
        sample = self.sample(name)
        text = sample.input if isinstance(sample.input, str) else None
        own = {"target": sample.target, "choices": sample.choices, "metadata": sample.metadata, "input": text}
        return {column: value for column, value in own.items() if value is not None}

    async def prompt(self, name: str) -> str | list[dict[str, str]]:
        """The prompt of a sample: text, or a conversation if it has more than a user turn.

        Raises UserError for a solver that does more than ask the model once, in text that is always the same.
        """
        (first, _), (second, _) = [await self._solved(name, "") for _ in range(2)]
        if first != second:
            raise UserError(
                f"{self.label}: its solver makes another prompt of sample {name!r} each time: shuffle in its data set, "
                "with a seed"
            )
        return first[0]["content"] if [turn["role"] for turn in first] == ["user"] else first

    async def score(self, name: str, completion: str, which: str | None = None) -> tuple[float | None, str | None]:
        """The value of a completion, and the answer that the scorer found in it.

        As in inspect's accuracy, C is 1, P is ½, I and N are 0; a sample left unscored has None. ``which`` names one of
        several scorers, or ``scorer.key`` one of several values. Raises UserError for a scorer that fails or asks a
        model, and for several values without ``which``.
        """
        from inspect_ai.scorer import value_to_float

        _, state = await self._solved(name, completion)
        chosen = None if which is None else which.partition(".")[0]
        if chosen is not None and chosen not in self.scorers:
            raise unknown(f"scorer of {self.label}", chosen, self.scorers)
        found: dict[str, _Found] = {}
        for scorer, function in self.scorers.items():
            if chosen in (None, scorer):
                with self._running(f"its scorer {scorer!r}", name):
                    found |= self._values(scorer, await function(state, state.target))
        value, answer = self._chosen(found, which)
        number = math.nan if value is None else float(value_to_float()(value))
        return number if math.isfinite(number) else None, answer

    def _chosen(self, found: Mapping[str, _Found], which: str | None) -> _Found:
        """The only value, or the one of a name."""
        if which is None and len(found) == 1:
            (which,) = found
        if which is None:
            hint = f"{{name: inspect-task, score: {next(iter(found), 'NAME')}}}"
            raise UserError(f"{self.label} has the scores {', '.join(found)}: say which, as in {hint}")
        if which not in found:
            raise unknown(f"score of {self.label}", which, found)
        return found[which]

    def _values(self, scorer: str, score: Any) -> dict[str, _Found]:
        """The values of a score by name, with the answer."""
        if score is None:
            return {scorer: (None, None)}
        if score.reason in ("grader_failed", "scoring_failed"):
            raise UserError(f"{score.reason}: {score.explanation or 'it says no more'}")
        if isinstance(score.value, Mapping):
            return {f"{scorer}.{key}": (value, score.answer) for key, value in score.value.items()}
        if isinstance(score.value, Sequence) and not isinstance(score.value, str):
            raise UserError("it returned a list: return a number, or numbers by name")
        return {scorer: (score.value, score.answer)}

    async def _solved(self, name: str, completion: str) -> tuple[list[dict[str, str]], Any]:
        """The messages with which the solver asks the model, and its state at the end if the model says so."""
        from inspect_ai.model import ChatMessageUser, ModelName, ModelOutput
        from inspect_ai.scorer import Target
        from inspect_ai.solver import TaskState

        asked: list[list[dict[str, str]]] = []

        async def generate(state: Any, *_: Any, **config: Any) -> Any:
            if asked:
                raise self._refused("its solver calls the model more than once")
            if state.tools:
                raise self._refused("its solver gives the model tools")
            asked.append([self._plain(message) for message in state.messages])
            stops = [
                end for text in (*self.stop, *(config.get("stop_seqs") or ())) if (end := completion.find(text)) >= 0
            ]
            state.output = ModelOutput.from_content("rlzoo", completion[: min(stops, default=len(completion))])
            state.messages.append(state.output.message)
            return state

        sample = copy.deepcopy(self.sample(name))
        messages = [ChatMessageUser(content=sample.input)] if isinstance(sample.input, str) else sample.input
        state: Any = TaskState(
            ModelName("none/none"), name, 1, sample.input, messages, Target(sample.target), sample.choices,
            metadata=sample.metadata,
        )  # fmt: skip
        with self._running("its solver", name):
            for solver in self.solvers:
                state = await solver(state, generate)
                if state.completed:
                    break
        if not asked:
            raise self._refused("its solver never calls generate(), as agents do not")
        return asked[0], state

    def _plain(self, message: Any) -> dict[str, str]:
        """A message as plain data, with its parts joined. Raises UserError for one that is not text."""
        from inspect_ai.model import ContentText

        parts = [ContentText(text=message.content)] if isinstance(message.content, str) else message.content
        if message.role == "tool" or getattr(message, "tool_calls", None):
            raise self._refused("its prompts have calls of tools")
        if other := [part.type for part in parts if part.type != "text"]:
            raise self._refused(f"its prompts have {other[0]} content, and only text is sampled")
        return {"role": message.role, "content": "".join(part.text for part in parts)}

    @contextmanager
    def _running(self, part: str, sample: str) -> Iterator[None]:
        """A context for the task's own code, in which no model is called. Its exceptions become a UserError."""
        try:
            with _MODELS_ARE_OFF:
                yield
        except RAISED as error:
            if isinstance(error, UserError) and str(error).startswith(self.label):
                raise
            if _asks_a_model(error):
                raise self._refused(f"{part} asks a model of its own") from error
            reason = str(error) if isinstance(error, UserError) else one_line(error)
            raise UserError(f"{self.label}: {part} failed on sample {sample!r}: {reason}") from error

    def _refused(self, reason: str) -> UserError:
        return UserError(
            f"{self.label}: {reason}: use a task whose solver asks the model once, in text, and whose scorer asks none"
        )


def inspect_task(spec: str) -> InspectTask:
    """The task ``file.py@name``, or ``package/name`` of an installed package, with arguments as in
    ``inspect_evals/gsm8k?fewshot=0&shuffle_fewshot=false``.

    This runs the task's code. Raises UserError without the package inspect-ai, for an unknown task, for one that cannot
    be loaded, and for one that needs a sandbox or has no scorer; UnreachableError if its data cannot be reached.
    """
    return _loaded(spec, str(Path.cwd()))


@lru_cache(maxsize=32)
def _loaded(spec: str, _folder: str) -> InspectTask:
    label, (place, _, options) = f"inspect task {spec!r}", spec.partition("?")
    task = _created(label, place, options)
    samples = _samples(task)
    if task.dataset.shuffled and _samples(_created(label, place, options)) != samples:
        raise UserError(f"{label}: its data is in another order each time: shuffle it with a seed")
    if len(samples) < len(task.dataset):
        raise UserError(f"{label}: two of its samples have the same id: give each its own")
    boxed = task.sandbox or any(one.sandbox or one.files or one.setup for one in samples.values())
    if boxed or not task.scorer:
        raise UserError(f"{label} {'needs a sandbox, and rlzoo has none' if boxed else 'has no scorer'}: use another")
    from inspect_ai.util import registry_info

    steps = [each for part in (task.setup, task.solver) if part is not None for each in _in_order(part)]
    scorers = {registry_info(scorer).name.rpartition("/")[2]: scorer for scorer in task.scorer}
    return InspectTask(label, samples, steps, scorers, tuple(task.config.stop_seqs or ()))


def _created(label: str, place: str, options: str) -> Any:
    """A new instance of a task."""
    try:
        from inspect_ai._eval.loader import load_tasks
        from inspect_ai._util.registry import registry_params
        from inspect_ai.util import registry_info
    except ImportError as error:
        raise UserError(f"{label}: {error}: pip install rlzoo[inspect]") from None
    if place.endswith(".py"):
        raise UserError(f"{label}: write {place}@TASK")
    given = {}
    for text in filter(None, options.split("&")):
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UserError(f"{label}: {text!r} is not an argument: write NAME=VALUE")
        given[name] = yaml.safe_load(value)
    try:
        found = load_tasks([str(Path(place).expanduser())], given)
    except ConnectionError as error:
        raise UnreachableError(f"{label}: its data cannot be reached: {one_line(error)}") from None
    except RAISED as error:
        raise UserError(f"{label} cannot be loaded: {one_line(error)}") from error
    if not found:
        raise UserError(
            f"{label} is not there: write file.py@TASK, or package/TASK of a package that is installed (for example "
            "inspect_evals/TASK, after pip install inspect-evals)"
        )
    if len(found) > 1:
        raise UserError(f"{label}: {place} has {', '.join(one.name for one in found)}: write {place}@{found[0].name}")
    if unused := given.keys() - registry_params(found[0]).keys():
        raise unknown(f"argument of {label}", min(unused), registry_info(found[0]).metadata["params"])
    return found[0]


def _samples(task: Any) -> dict[str, Any]:
    return {str(number if one.id is None else one.id): one for number, one in enumerate(task.dataset, 1)}


def _in_order(solver: Any) -> list[Any]:
    """The solvers of a chain."""
    return list(solver) if isinstance(solver, Sequence) else [solver]


def _asks_a_model(error: BaseException) -> bool:
    """Whether an exception came up in an agent of inspect, or where inspect looks for a model or calls one."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith(("inspect_ai.model._model", "inspect_ai.agent")) for name in frames)
