"""New rewards for the rows of a buffer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np

from rlzoo.buffers import Buffer, OfflineBuffer
from rlzoo.buffers.problems import EncodedProblem, Problem
from rlzoo.buffers.values import Columns, renamed
from rlzoo.errors import UserError
from rlzoo.reward import Reward, Score, get_reward
from rlzoo.reward.calling import ENGINE
from rlzoo.reward.isolation import RewardProcess, RewardProcesses, renumbered
from rlzoo.rollout.sampler import Sample
from rlzoo.rollout.scoring import CHUNK, score_samples
from rlzoo.types import Trajectory

AHEAD = 4
"""How many calls of a reward wait per process."""


def rescored(buffer: Buffer, reward: Any, columns: Columns | None = None) -> OfflineBuffer:
    """The buffer's rows with the rewards, and their components, that ``reward`` (see `get_reward`) gives now.

    All rows of a prompt are scored in one call. The reward gets the rows' columns, renamed by ``columns`` (new
    name → a column, or a field in one); values that it logs become further columns of the rows. Raises
    UserError as `Reward.score` does, with rows numbered from 1, and for a column that a row lacks.
    """
    reward, columns = get_reward(reward), columns or {}
    scores: list[Score | None] = [None] * len(buffer)
    for places, found in _scored(buffer, reward, columns):
        for place, score in zip(places, found, strict=True):
            scores[place] = score
    return OfflineBuffer.from_trajectories(_with_score(row, score) for row, score in zip(buffer, scores, strict=True))


def _with_score(row: Trajectory, score: Score | None) -> Trajectory:
    assert score is not None
    own = {f"logged_{name}" if name in row.columns else name: value for name, value in score.extra.items()}
    components = {**score.metrics, **score.components}
    return replace(row, reward=score.value, reward_components=components, columns={**row.columns, **own})


def _scored(buffer: Buffer, reward: Reward, columns: Columns) -> Iterator[tuple[list[int], list[Score]]]:
    """Places of rows, and their scores."""
    names = sorted({name for row in buffer.column("columns") for name in row}.union(columns) - set(ENGINE))
    apart = reward.function if isinstance(reward.function, RewardProcesses) else None
    waiting: deque[tuple[list[int], Future[list[Score]]]] = deque()
    for places in _calls(buffer):
        answered, numbers = _answered(buffer, places, columns), [place + 1 for place in places]
        if apart is None:
            try:
                yield places, score_samples(reward, answered, names)
            except UserError as error:
                raise UserError(renumbered(str(error), numbers)) from error
            continue

        def score(process: RewardProcess, answered: Any = answered, numbers: list[int] = numbers) -> list[Score]:
            with process.numbering(numbers):
                return score_samples(replace(reward, function=process), answered, names)

        waiting.append((places, apart.submit(score)))
        if len(waiting) > AHEAD * len(apart.processes):
            places, future = waiting.popleft()
            yield places, future.result()
    for places, future in waiting:
        yield places, future.result()


def _calls(buffer: Buffer) -> Iterator[list[int]]:
    """The places of the rows of each call: whole groups of a prompt, in the order of their first rows."""
    _, first, prompt = np.unique(buffer.column("prompt_id"), return_index=True, return_inverse=True)
    order = np.argsort(first[prompt], kind="stable")
    places: list[int] = []
    for number, place in enumerate(order.tolist()):
        if len(places) >= CHUNK and prompt[place] != prompt[order[number - 1]]:
            yield places
            places = []
        places.append(place)
    if places:
        yield places


def _answered(buffer: Buffer, places: Sequence[int], columns: Columns) -> list[tuple[EncodedProblem, Sample]]:
    """The rows as samples of problems, as rewards get them."""
    answered = []
    for place, row in zip(places, buffer.at(places), strict=True):
        try:
            known = renamed(row.columns, columns) if columns else row.columns
        except UserError as error:
            raise UserError(f"row {place + 1} of the buffer: {error}") from None
        problem = Problem(row.prompt_id, row.messages or row.prompt, known)
        sample = Sample(
            row.completion_ids, row.completion, row.truncated, mask=row.completion_mask,
            messages=row.completion_messages,
        )  # fmt: skip
        answered.append((EncodedProblem(problem, row.prompt, row.prompt_ids), sample))
    return answered
