"""Problem sets: prompts with the columns that rewards need and, where they exist, worked solutions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress, islice, zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

from rlzoo.buffers.bad_rows import BadRows, collecting
from rlzoo.buffers.files import BATCH
from rlzoo.buffers.formats import Fits
from rlzoo.buffers.layouts import conversation_of
from rlzoo.buffers.spooled import kept
from rlzoo.buffers.tables import SourceTable, good_rows
from rlzoo.buffers.templates import columns_in, each_filled, filled
from rlzoo.buffers.values import find, number, own_id, plain_row, usable
from rlzoo.config.suites import INSPECT
from rlzoo.errors import UserError, kind_of, unknown
from rlzoo.policy.chat import Message, Options, messages, options_of
from rlzoo.policy.encoding import (
    SPELLED,
    Encoded,
    Special,
    encode_batch,
    encode_steps,
    got,
    prompt_steps,
    spelled,
)
from rlzoo.policy.turns import Steps
from rlzoo.reward.calling import call
from rlzoo.reward.inspect_tasks import inspect_task
from rlzoo.types import Trajectory
from rlzoo.worlds import WORLD_PREFIX, WORLDS, arithmetic, facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlzoo.config import ProblemSource

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Problem:
    """A prompt, text or conversation, with the columns that rewards need and its worked solutions."""

    id: str
    """Unique in its problem set; the ``prompt_id`` of its rows in a buffer."""
    prompt: str | list[Message]
    """Text, or the messages of a conversation."""
    columns: Mapping[str, Any]
    """Columns of the data by name, which rewards get."""
    solutions: tuple[str, ...] = ()
    """Worked solutions, from which demonstrations are made."""
    quality: float | None = None
    """The quality of the solutions, which becomes the reward of demonstrations."""
    special_tokens: Special = "reject"
    """What happens to text that spells a special token."""
    place: str = field(default="", compare=False)
    """The file and row that it is from, for errors; empty if it is not from a file."""

    @property
    def label(self) -> str:
        """Its name in messages: its id, with its file and row if it is from a file."""
        return f"problem {self.id!r}" + (f" ({self.place})" if self.place else "")


@dataclass(frozen=True)
class EncodedProblem:
    """A problem with its prompt as a policy gets it."""

    problem: Problem
    text: str
    """The rendered prompt."""
    ids: list[int] = field(repr=False)
    """The tokens of the prompt."""


def load_problems(source: ProblemSource, bad: BadRows | None = None) -> Sequence[Problem]:
    """The problems of a built-in task, a task of inspect, a local table or a Hub data set, in order, at most ``limit``.

    Many are kept in a file, and read from there when they are asked for. Raises UserError for a source that cannot be
    read, a missing column, or an empty set. Bad rows are handled by ``bad``; None does what the source's ``bad_rows``
    says.
    """
    bad = BadRows(source.bad_rows) if bad is None else bad
    if (prefix := next(filter(source.source.startswith, TASKS), None)) is not None:
        task = TASKS[prefix](source.source.removeprefix(prefix))
        made = _picked(enumerate(task), _drawn(lambda: len(task), source))
        problems = kept(_first(((f"problem {p.id!r}", _as_asked(i, p, source)) for i, p in made), source, bad))
    else:
        problems = kept(_first(_problems(source, bad), source, bad))
    bad.require_some(len(problems))
    if not problems:
        raise UserError(f"problem set {source.source!r} is empty")
    return problems


def _problems(source: ProblemSource, bad: BadRows) -> Iterator[tuple[str, Problem]]:
    """(place, problem) of each good row of a table that is drawn."""
    table = SourceTable.find(source.source, source.split)
    drawn = _drawn(lambda: sum(1 for _ in table.rows()), source)
    for place, row in good_rows(_picked(table.rows(), drawn), bad):
        problem = None
        with bad.at(place):
            number = bad.rows - 1
            problem = _problem(number if drawn is None else drawn[number], row, source)
        if problem is not None:
            yield place, replace(problem, place=place)


def _drawn(count: Callable[[], int], source: ProblemSource) -> list[int] | None:
    """The indices of the rows of a random subset, in order, of ``count()`` rows; None for all of them."""
    if source.subset_seed is None or source.limit is None or (total := count()) <= source.limit:
        return None
    return sorted(random.Random(source.subset_seed).sample(range(total), source.limit))


def _picked(rows: Iterator[T], indices: list[int] | None) -> Iterator[T]:
    wanted = None if indices is None else set(indices)
    return rows if wanted is None else (row for index, row in enumerate(rows) if index in wanted)


def _first(made: Iterator[tuple[str, Problem]], source: ProblemSource, bad: BadRows) -> Iterator[Problem]:
    """The first problems, up to the limit, with their quality. A problem with the id of an earlier one is bad."""
    places: dict[str, str] = {}
    for place, problem in made:
        good = None
        with bad.at(place):
            if problem.id in places:
                raise UserError(
                    f"the id {problem.id!r} is that of {places[problem.id]}: give each its own, or leave the column out"
                )
            good = _rated(problem, source.quality)
            places[problem.id] = place
        if good is not None:
            yield good
        if len(places) == source.limit:
            break


def _as_asked(index: int, problem: Problem, source: ProblemSource) -> Problem:
    """A problem of a built-in task with the prompt and the columns that its source asks for."""
    row = {"id": problem.id, "prompt": problem.prompt, "solution": list(problem.solutions), **problem.columns}
    made = _problem(index, row, source)
    added = {"id", "prompt", "solution"} - source.columns.keys()
    own = {name: value for name, value in made.columns.items() if name not in added}
    return replace(made, columns=own, solutions=made.solutions if source.solution else problem.solutions)


def _problem(index: int, row: Mapping[str, Any], source: ProblemSource) -> Problem:
    if columns_in(source.prompt):
        prompt: Any = filled(source.prompt, row)
    else:
        prompt = conversation_of(_found(row, source.prompt, "prompt"), source.prompt)
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        told = "null" if prompt is None else "empty or blank"
        raise UserError(f"the prompt, {source.prompt!r:.60}, is {told}: fill the column in, or drop the row")
    if not isinstance(prompt, (str, list)):
        raise UserError(f"column {source.prompt!r} is {kind_of(prompt)}: give text or a list of messages")
    if source.chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if source.system is not None:
        prompt = _instructed(prompt, source.system)
    columns = usable(row) | {new: _found(row, old, new) for new, old in source.columns.items()}
    name = own_id(columns.get("id")) or f"{source.split}-{index}"
    return Problem(name, prompt, columns, _solutions(row, source.solution), special_tokens=source.special_tokens)


def _found(row: Mapping[str, Any], column: str, name: str) -> Any:
    """`find`, whose error says how to name another column."""
    if column.partition(".")[0] in row or column in row:
        return find(row, column)
    there = ", ".join(row) or "none"
    raise UserError(
        f"no column {column!r}; it has: {there}; say which is the {name}, with --column {name}=COLUMN, or in the "
        "experiment file"
    )


def _instructed(prompt: Any, system: str) -> list[Message]:
    """The conversation with a system turn before it; an empty turn replaces the template's default."""
    if not isinstance(prompt, list):
        raise UserError("`system` is for conversations, and the prompt is plain text: add chat: true")
    if prompt and isinstance(prompt[0], Mapping) and prompt[0].get("role") == "system":
        raise UserError("the conversation already has a system turn: leave `system` out")
    return [{"role": "system", "content": system}, *prompt]


def _solutions(row: Mapping[str, Any], column: str | None) -> tuple[str, ...]:
    """The worked solutions in a column, or that a template makes of columns: one, or a list of them; none for null."""
    if column is None:
        return ()
    named = columns_in(column)
    found = each_filled(column, row, named) if named else _found(row, column, "solution")
    solutions = [each for each in (found if isinstance(found, list) else [found]) if each is not None]
    for solution in solutions:
        if not isinstance(solution, (str, int, float)) or solution != solution:
            raise UserError(f"column {column!r} holds {kind_of(solution)}: give text")
        if not str(solution).strip():
            raise UserError(f"column {column!r} is empty or blank: fill it in, or drop the row")
    return tuple(map(str, solutions))


def _rated(problem: Problem, column: str | None) -> Problem:
    """The problem with the quality of its solutions, if there is a column for it."""
    if column is None:
        return problem
    try:
        value = find(problem.columns, column)
    except UserError:
        raise UserError(f"quality column {column!r} is missing: give a number") from None
    try:
        return replace(problem, quality=number(value))
    except ValueError:
        raise UserError(
            f"quality column {column!r} is {'null' if value is None else f'{value!r:.60}'}: give a finite number"
        ) from None


def encode_problems(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], bad: BadRows | None = None
) -> Sequence[EncodedProblem]:
    """Each problem with its rendered prompt and the tokens of that.

    Raises UserError naming a problem that cannot be encoded, unless ``bad`` drops it.
    """
    with collecting(bad) as bad:
        encoded = kept(_encoded(tokenizer, problems, bad))
        if problems:
            bad.require_some(len(encoded))
    return encoded


def _encoded(tokenizer: Any, problems: Sequence[Problem], bad: BadRows) -> Iterator[EncodedProblem]:
    for problem, found in _in_batches(tokenizer, problems, lambda problem: _prompt_steps(tokenizer, problem, bad)):
        made = None
        with bad.at(problem.label):
            made = got(found)
        if made is not None:
            yield made


def demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    max_tokens: int | None = None,
    bad: BadRows | None = None,
    fits: Fits | None = None,
    max_length: int | None = None,
) -> list[Trajectory]:
    """One row per worked solution. A completion longer than ``max_tokens``, or than what its prompt leaves of
    ``max_length``, is cut and marked as truncated.

    A problem with a solution that does not fit the model (``fits``, as from `Policy.row_check`) is a bad row. Raises
    UserError for a bad row, unless ``bad`` drops it.
    """
    with collecting(bad) as bad:
        return list(each_demonstration(tokenizer, problems, max_tokens, bad, fits, max_length))


def each_demonstration(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    max_tokens: int | None,
    bad: BadRows,
    fits: Fits | None = None,
    max_length: int | None = None,
) -> Iterator[Trajectory]:
    """`demonstrations`, `BATCH` rows in memory at a time, after all prompts have been checked."""
    checks = _in_batches(tokenizer, problems, lambda problem: _prompt_steps(tokenizer, problem, bad))
    good = bytearray(len(problems))
    for place, (problem, found) in enumerate(checks):
        with bad.at(problem.label):
            got(found)
            good[place] = True
    if problems:
        bad.require_some(sum(good))
    solutions = (
        (problem, nth, solution)
        for problem in compress(problems, good)
        for nth, solution in enumerate(problem.solutions, 1)
    )
    limits = max_length, max_tokens
    every = _in_batches(tokenizer, solutions, lambda one: _solution_steps(tokenizer, one[0], one[2], limits, fits))
    for (problem, nth, solution), outcome in every:
        with bad.at(problem.label):
            own, made = got(outcome)
            bad.note(problem.label + (f", solution {nth}" if nth > 1 else ""), made.notes)
            text = made.completion if made.truncated else solution
            yield trajectory(own, text, made.completion_ids, truncated=made.truncated, reward=problem.quality)


def _in_batches(
    tokenizer: Any, items: Iterable[T], steps: Callable[[T], Steps[U]]
) -> Iterator[tuple[T, U | UserError]]:
    """Each item with the result, or the error, of its steps."""
    left = iter(items)
    for batch in iter(lambda: list(islice(left, BATCH)), []):
        yield from zip(batch, encode_batch(tokenizer, map(steps, batch)), strict=True)


def _prompt_steps(tokenizer: Any, problem: Problem, bad: BadRows) -> Steps[EncodedProblem]:
    prompt = problem.prompt if isinstance(problem.prompt, str) else messages(problem.prompt)
    if problem.special_tokens == "allow" and (found := spelled(tokenizer, prompt)):
        bad.note(problem.label, {SPELLED: found})
    text, ids = yield from prompt_steps(tokenizer, prompt, problem.special_tokens, _options(problem))
    return EncodedProblem(replace(problem, prompt=prompt), text, ids)


def _solution_steps(
    tokenizer: Any, problem: Problem, solution: str, limits: tuple[int | None, int | None], fits: Fits | None
) -> Steps[tuple[EncodedProblem, Encoded]]:
    """The problem with its tokens before this solution, and the solution's."""
    prompt = problem.prompt if isinstance(problem.prompt, str) else messages(problem.prompt)
    how = problem.special_tokens, _options(problem)
    made = yield from encode_steps(tokenizer, prompt, solution, *limits, *how)
    if fits is not None:
        fits(made.prompt_ids, made.completion_ids)
    return EncodedProblem(replace(problem, prompt=prompt), made.prompt, made.prompt_ids), made


def _options(problem: Problem) -> Options:
    return {} if isinstance(problem.prompt, str) else options_of(problem.columns)


def trajectory(
    encoded: EncodedProblem, completion: str, ids: list[int], logged: Mapping[str, Any] | None = None, **known: Any
) -> Trajectory:
    """The buffer row of a completion of a problem; values that a reward ``logged`` for it become further columns."""
    problem = encoded.problem
    own = {f"logged_{n}" if n in problem.columns else n: value for n, value in (logged or {}).items()}
    return Trajectory(
        prompt=encoded.text,
        completion=completion,
        prompt_ids=encoded.ids,
        completion_ids=ids,
        prompt_id=problem.id,
        messages=None if isinstance(problem.prompt, str) else problem.prompt,
        columns={**problem.columns, **own},
        **known,
    )


def world_problems(name: str) -> list[Problem]:
    """The problems of a built-in task, named ``arithmetic/train``, ``facts/test``, ….

    A training problem of ``arithmetic`` has a worked solution in each style, one of ``facts`` its one answer. ``both``
    alternates between the two tasks. ``arithmetic`` has options, as in ``arithmetic/train?terms=4&styles=words``: see
    `rlzoo.worlds.arithmetic.Variant`. Raises UserError for an unknown name and a wrong option.
    """
    place, asked, options = name.partition("?")
    world, _, split = place.partition("/")
    if split not in WORLDS.get(world, ()):
        raise unknown("world", place, [f"{w}/{s}" for w, splits in WORLDS.items() for s in splits])
    if world == "arithmetic":
        how = arithmetic.variant(options)
        return [
            Problem(
                id,
                p.question,
                {"answer": str(p.answer), "terms": len(p.numbers)},
                tuple(arithmetic.solve(p, style) for style in how.styles_of(index)),
            )
            for index, (id, p) in enumerate(arithmetic.problems(split, how))
        ]
    if asked:
        raise UserError(f"world {place!r} has no options: leave out {asked + options!r}")
    if world == "both":
        pairs = zip_longest(*(world_problems(f"{one}/{split}") for one in ("arithmetic", "facts")))
        return [problem for pair in pairs for problem in pair if problem is not None]
    return [Problem(id, q, {"answer": fact.answer}, (fact.answer,)) for id, fact, q in facts.questions(split)]


class InspectProblems(Sequence[Problem]):
    """The samples of a task of inspect, whose scorer the reward ``inspect-task`` finds by ``task`` and ``sample``.

    Raises UserError as `inspect_task` does.
    """

    def __init__(self, name: str) -> None:
        self._name, self._task = name, inspect_task(name)
        self._samples = list(self._task.samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: Any) -> Any:
        id = self._samples[index]
        columns = {**usable(plain_row(self._task.columns(id))), "task": self._name, "sample": id}
        return Problem(id, call(self._task.prompt, {"name": id}), columns)


TASKS: Mapping[str, Callable[[str], Sequence[Problem]]] = {WORLD_PREFIX: world_problems, INSPECT: InspectProblems}
"""What a source may begin with, if it names a task rather than data, with the function from the rest to problems."""
