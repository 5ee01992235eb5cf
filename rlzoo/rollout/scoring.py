"""Scoring samples with a reward; a reward in separate processes scores while sampling continues."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from typing import Any

from rlzoo.buffers.problems import EncodedProblem
from rlzoo.errors import UserError
from rlzoo.jobs.ranks import gathered, rank, world_size
from rlzoo.reward import Reward, Score
from rlzoo.reward.calling import ENGINE
from rlzoo.reward.isolation import RewardProcess, RewardProcesses, renumbered
from rlzoo.rollout.sampler import Sample

CHUNK = 64
"""The minimum number of completions per call of a reward in a separate process; those of a prompt are in one call."""

Answered = Sequence[tuple[EncodedProblem, Sample]]
Scored = tuple[Score, str | None]
"""A score, and the answer that the reward found in the completion, if requested."""
Place = tuple[int, int]
"""The index of a problem, and its number of samples."""


class Scorer:
    """Scores the samples of problems; all samples of a problem are scored in the same call of the reward.

    A reward in separate processes scores samples while others are still being sampled, at least `CHUNK` at a time; any
    other is called once, at the end. In a distributed run, each process scores the samples of its share of problems.
    """

    def __init__(self, reward: Reward, problems: Sequence[EncodedProblem], with_answers: bool = False) -> None:
        self._reward, self._problems, self._with_answers = reward, problems, with_answers
        self._columns = columns_of(problems)
        self._apart = reward.function if isinstance(reward.function, RewardProcesses) else None
        self._samples: dict[int, list[Sample]] = {}
        self._waiting: list[int] = []
        self._running: list[tuple[list[Place], Future[list[Scored]]]] = []
        self._checked = 0

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: Any) -> None:
        for _places, future in self._running:
            future.cancel()

    def begin(self, place: int, samples: list[Sample]) -> None:
        """Start scoring the samples of the problem with index ``place``, unless that has been started already.

        Raises UserError as `Reward.score` does for samples of earlier calls; in a distributed run, only `end` does.
        """
        begun = self._samples.get(place, [])
        if place % world_size() != rank() or [(s.ids, s.text) for s in begun] == [(s.ids, s.text) for s in samples]:
            return
        self._samples[place] = samples
        self._waiting.append(place)
        if self._apart is not None and len(self._waiting) * len(samples) >= CHUNK:
            self._submit(self._apart)
        self._check()

    def begin_all(self, sampled: Sequence[list[Sample]]) -> None:
        """`begin` for all problems, without waiting for more samples to fill a chunk."""
        for place, samples in enumerate(sampled):
            self.begin(place, samples)
        if self._apart is None:
            self._score_here()
        elif self._waiting:
            self._submit(self._apart)
        self._check()

    def end(self) -> list[Scored]:
        """The scores of all samples, in the order of the problems. Raises UserError as `Reward.score` does."""
        try:
            own, failure = self._own(), None
        except UserError as error:
            if world_size() == 1:
                raise
            own, failure = {}, str(error)
        of_all = gathered((own, failure))
        for _, failure in of_all:
            if failure is not None:
                raise UserError(failure)
        every = {place: scored for some, _ in of_all for place, scored in some.items()}
        return [one for place in sorted(every) for one in every[place]]

    def _own(self) -> dict[int, list[Scored]]:
        """The scores of this process's share of the problems, by their place."""
        found: dict[int, list[Scored]] = {}
        for places, future in self._running:
            scored = iter(future.result())
            found |= {place: list(islice(scored, samples)) for place, samples in places}
        return found

    def _check(self) -> None:
        """Raise the first error of a finished call, unless other processes of the run would then wait for this one."""
        while world_size() == 1 and self._checked < len(self._running) and self._running[self._checked][1].done():
            self._running[self._checked][1].result()
            self._checked += 1

    def _score_here(self) -> None:
        places, answered, rows = self._of(sorted(self._samples))
        future = Future[list[Scored]]()
        try:
            future.set_result(self._scored(self._reward, answered))
        except UserError as error:
            error.args = (renumbered(str(error), rows),)
            future.set_exception(error)
        self._running.append((places, future))

    def _submit(self, processes: RewardProcesses) -> None:
        """Score the waiting samples in a separate process of the reward."""
        places, answered, rows = self._of(self._waiting)
        self._waiting = []

        def score(process: RewardProcess) -> list[Scored]:
            with process.numbering(rows):
                return self._scored(replace(self._reward, function=process), answered)

        self._running.append((places, processes.submit(score)))

    def _scored(self, reward: Reward, answered: Answered) -> list[Scored]:
        scores = score_samples(reward, answered, self._columns)
        answers = reward.answers(completions_of(answered)) if self._with_answers else [None] * len(answered)
        return list(zip(scores, answers, strict=True))

    def _of(self, places: Sequence[int]) -> tuple[list[Place], list[tuple[EncodedProblem, Sample]], list[int]]:
        """The samples of some problems: the number per problem, the samples, and their indices among all samples."""
        numbered = [(place, n, one) for place in places for n, one in enumerate(self._samples[place])]
        answered = [(self._problems[place], one) for place, _, one in numbered]
        rows = [place * len(self._samples[place]) + n for place, n, _ in numbered]
        return [(place, len(self._samples[place])) for place in places], answered, rows


def completions_of(answered: Answered) -> list[Any]:
    """Completions as arguments of a reward: conversations for conversational problems, as in TRL."""
    return [
        sample.text
        if isinstance(encoded.problem.prompt, str)
        else sample.messages or [{"role": "assistant", "content": sample.text}]
        for encoded, sample in answered
    ]


def columns_of(problems: Iterable[EncodedProblem]) -> list[str]:
    """The names of the problems' columns that are passed to a reward."""
    return sorted({name for problem in problems for name in problem.problem.columns} - set(ENGINE))


def score_samples(reward: Reward, answered: Answered, names: Sequence[str]) -> list[Score]:
    """One `Score` per completion. The reward gets the columns ``names``, with None where a problem lacks one.

    Raises UserError as `Reward.score` does.
    """
    prompts = [encoded.problem.prompt for encoded, _ in answered]
    columns = {name: [encoded.problem.columns.get(name) for encoded, _ in answered] for name in names}
    ids = [sample.ids for _, sample in answered]
    return reward.score(prompts, completions_of(answered), columns, completion_ids=ids)
