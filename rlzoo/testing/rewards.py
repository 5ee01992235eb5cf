"""`check_reward`: what sampling, evaluation and training expect of a reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlzoo.errors import UserError
from rlzoo.reward import Reward, get_reward

ODD = ("", " \n", "\\boxed{" * 50, "x" * 20_000, "\u202e\u0000\ufffd 答案")
"""Unusual completions: empty, unfinished, very long, or not text in any language."""


def check_reward(reward: Any, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> None:
    """Check that a reward gives one finite number or None per completion, whatever else is in its batch.

    ``reward`` is anything that `get_reward` takes; ``columns`` are those that it needs, with one value per completion.
    It must return the same values in a second call, in another order, and for each completion separately, and must
    accept completions that are empty, unfinished, very long, or not text in any language. Raises AssertionError, which
    says in one line what failed; UserError for a reward that cannot be found or built; ValueError for fewer than two
    completions.
    """
    if len(completions) < 2:
        raise ValueError(f"check_reward needs at least 2 completions to compare, got {len(completions)}")
    found = get_reward(reward)

    def values(places: Sequence[int]) -> list[float | None]:
        given = {name: [column[i] for i in places] for name, column in columns.items()}
        return _values(found, [prompts[i] for i in places], [completions[i] for i in places], given)

    places = list(range(len(completions)))
    first = values(places)
    _same(found, first, values(places), "the second time; draw nothing at random, and keep nothing between calls")
    _same(found, first, values(places[::-1])[::-1], "with its batch in another order; look at one completion at a time")
    alone = [values([place])[0] for place in places]
    _same(found, first, alone, "in a batch of its own; look at one completion at a time")
    for text in ODD:
        odd = text if isinstance(completions[0], str) else [{"role": "assistant", "content": text}]
        _values(found, [prompts[0]], [odd], {name: [column[0]] for name, column in columns.items()})


def _values(
    reward: Reward, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, list[Any]]
) -> list[float | None]:
    """One value per completion."""
    try:
        values = [score.value for score in reward.score(prompts, completions, columns)]
    except UserError as error:
        shown = "" if len(completions) > 1 else f" (the completion is {completions[0]!r:.60})"
        raise AssertionError(f"{error}{shown}") from error
    if len(values) != len(completions):
        raise AssertionError(f"reward {reward.name!r} gives {len(values)} values for {len(completions)} completions")
    for value in values:
        if value is not None and not math.isfinite(value):
            raise AssertionError(f"reward {reward.name!r} gives {value}: return a finite number, or None")
    return values


def _same(reward: Reward, values: Sequence[float | None], others: Sequence[float | None], when: str) -> None:
    for row, (value, other) in enumerate(zip(values, others, strict=True)):
        if value != other:
            raise AssertionError(f"reward {reward.name!r} gives completion {row} first {value}, then {other} {when}")
