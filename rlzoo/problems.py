"""Problem sets: prompts with what a reward needs to judge an answer, and worked solutions where there are some."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rlzoo.buffers.encoding import SPELLED, Notes, Special, encode, encode_prompt, spelled
from rlzoo.buffers.tables import load_table
from rlzoo.chat import Message, Options, messages, options_of
from rlzoo.errors import UserError
from rlzoo.types import Trajectory
from rlzoo.worlds import WORLD_PREFIX, world_problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlzoo.config import ProblemSource


@dataclass(frozen=True)
class Problem:
    """A prompt, text or conversation, with the columns that rewards ask for and its demonstrations."""

    id: str
    prompt: str | list[Message]
    columns: Mapping[str, Any]
    solutions: tuple[str, ...] = ()
    quality: float | None = None
    """Of its solutions; the reward of the demonstrations that they become."""
    special_tokens: Special = "reject"
    """What happens to text that spells a special token."""


@dataclass(frozen=True)
class Encoded:
    """A problem in a policy's tokens."""

    problem: Problem
    text: str
    ids: list[int] = field(repr=False)


def load_problems(source: ProblemSource) -> list[Problem]:
    """The problems of an embedded world, a local table or a Hub data set, in their order, cut to ``limit``.

    Raises UserError for a source that cannot be read, a missing column, or an empty set.
    """
    if source.source.startswith(WORLD_PREFIX):
        made = world_problems(source.source.removeprefix(WORLD_PREFIX))[: source.limit]
        problems = [_as_asked(index, problem, source) for index, problem in enumerate(made)]
    else:
        rows = load_table(source.source, source.split)
        limit = len(rows) if source.limit is None else min(source.limit, len(rows))
        problems = [_problem(index, rows[index], source) for index in range(limit)]
    if not problems:
        raise UserError(f"problem set {source.source!r} is empty")
    problems = problems[: source.limit]
    if source.quality is not None:
        problems = [replace(p, quality=_quality(source, i, p.columns)) for i, p in enumerate(problems)]
    first: dict[str, int] = {}
    for index, problem in enumerate(problems):
        if first.setdefault(problem.id, index) != index:
            raise UserError(
                f"problem set {source.source!r}: rows {first[problem.id]} and {index} have the same id "
                f"{problem.id!r}: give each problem its own, or leave the column out"
            )
    return problems


def _as_asked(index: int, problem: Problem, source: ProblemSource) -> Problem:
    """A problem of a built-in task with the prompt and the columns that its source asks for."""
    made = _problem(index, {"id": problem.id, "prompt": problem.prompt, **problem.columns}, source)
    own = {name: value for name, value in made.columns.items() if name not in ("id", "prompt")}
    return replace(made, columns=own, solutions=made.solutions if source.solution else problem.solutions)


def _problem(index: int, row: Mapping[str, Any], source: ProblemSource) -> Problem:
    def column(name: str) -> Any:
        if name not in row:
            raise UserError(f"problem set {source.source!r}, row {index}: no column {name!r}; it has: {', '.join(row)}")
        return row[name]

    names = _placeholders(source.prompt)
    if names:
        prompt: Any = source.prompt.format(**{name: column(name) for name in names})
    else:
        prompt = column(source.prompt)
    if source.chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if source.system is not None:
        prompt = _instructed(prompt, source.system, f"problem set {source.source!r}, row {index}")
    columns = dict(row) | {new: column(old) for new, old in source.columns.items()}
    solution = None if source.solution is None else column(source.solution)
    solutions = () if solution is None else (str(solution),)
    own = row.get("id")
    id = f"{source.split}-{index}" if own is None else str(own)
    return Problem(id, prompt, columns, solutions, special_tokens=source.special_tokens)


def _instructed(prompt: Any, system: str, where: str) -> list[Message]:
    """The conversation behind a system turn; an empty one too, which keeps the template's default away."""
    if not isinstance(prompt, list):
        raise UserError(f"{where}: `system` is for conversations, and the prompt is plain text: add chat: true")
    if prompt and isinstance(prompt[0], Mapping) and prompt[0].get("role") == "system":
        raise UserError(f"{where}: the conversation has a system turn of its own: leave `system` out")
    return [{"role": "system", "content": system}, *prompt]


def _quality(source: ProblemSource, index: int, columns: Mapping[str, Any]) -> float:
    assert source.quality is not None
    try:
        return float(columns[source.quality])
    except (KeyError, TypeError, ValueError):
        what = repr(columns[source.quality])[:60] if source.quality in columns else "not there"
        raise UserError(
            f"problem set {source.source!r}, row {index}: quality column {source.quality!r} is {what}: give a number"
        ) from None


def _placeholders(template: str) -> list[str]:
    """The columns that a prompt template names; none for a plain column name."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"prompt {template!r}: {error}: write {{{{ and }}}} for braces that are text") from None
    if "" in names:
        raise UserError(f"prompt {template!r} has {{}}: name a column in it, or write {{{{}}}} for text")
    return names


def encode_problems(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> list[Encoded]:
    """Each problem with its rendered prompt and prompt ids. Raises UserError naming a problem that has none."""
    encoded, notes = [], Notes("problem")
    for problem in problems:
        with naming(problem):
            prompt = problem.prompt if isinstance(problem.prompt, str) else messages(problem.prompt)
            if problem.special_tokens == "allow" and (found := spelled(tokenizer, prompt)):
                notes.add(problem.id, {SPELLED: found})
            text, ids = encode_prompt(tokenizer, prompt, problem.special_tokens, _options(problem))
            encoded.append(Encoded(replace(problem, prompt=prompt), text, ids))
    notes.tell()
    return encoded


def demonstrations(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], max_tokens: int | None = None
) -> list[Trajectory]:
    """One row a worked solution. A completion over ``max_tokens`` is cut: it loses its end and is marked so."""
    rows, notes = [], Notes("problem")
    for encoded in encode_problems(tokenizer, problems):
        problem = encoded.problem
        for solution in problem.solutions:
            with naming(problem):
                how = problem.special_tokens, _options(problem)
                made = encode(tokenizer, problem.prompt, solution, None, max_tokens, *how)
            notes.add(problem.id, made.notes)
            own = replace(encoded, text=made.prompt, ids=made.prompt_ids)
            text = made.completion if made.truncated else solution
            ids = made.completion_ids
            rows.append(trajectory(own, text, ids, truncated=made.truncated, reward=problem.quality))
    notes.tell()
    return rows


def _options(problem: Problem) -> Options:
    return {} if isinstance(problem.prompt, str) else options_of(problem.columns)


@contextmanager
def naming(problem: Problem) -> Iterator[None]:
    """Errors about a problem say which one it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"problem {problem.id!r}: {error}") from None


def trajectory(
    encoded: Encoded, completion: str, ids: list[int], logged: Mapping[str, Any] | None = None, **known: Any
) -> Trajectory:
    """A buffer row for one completion of a problem, with what a reward ``logged`` of it in columns of its own."""
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
