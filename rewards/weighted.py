"""Weighted: a weighted sum of other rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Any, ClassVar

from rlzoo.errors import UserError
from rlzoo.reward import CompositeReward, OnError, Reward, Score, get_reward, register_reward
from rlzoo.reward.calling import means


@register_reward
@dataclass(frozen=True)
class Weighted(CompositeReward):
    """Σ_k w_k r_k over the rewards of ``of``; None if any of them is None.

    Each of ``of`` is anything that `get_reward` takes; a mapping may include a ``"weight"`` (default 1). A list given
    to `get_reward` is this reward. Raises UserError for an empty list, and for a weight that is not a finite number.
    """

    name: ClassVar[str] = "weighted"

    of: tuple[Any, ...]
    """The rewards to add up."""

    def __post_init__(self) -> None:
        if not self.of:
            raise UserError(f"reward {self.name!r} needs at least one reward in 'of'")
        _ = self.terms  # so that a wrong term is found when the sum is built, not when it is first used

    @cached_property
    def terms(self) -> dict[str, tuple[float, Reward]]:
        """The weight and reward of each term by name.

        Further terms of the same name get the next number that no term has, as in format-2.
        """
        found = [self._term(spec) for spec in self.of]
        names = {reward.name for _, reward in found}
        terms: dict[str, tuple[float, Reward]] = {}
        for weight, reward in found:
            numbered = (f"{reward.name}-{number}" for number in count(2))
            free = (name for name in numbered if name not in names and name not in terms)
            terms[next(free) if reward.name in terms else reward.name] = weight, reward
        return terms

    def _term(self, spec: Any) -> tuple[float, Reward]:
        if not isinstance(spec, Mapping):
            return 1.0, get_reward(spec)
        weight = spec.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UserError(f"reward {self.name!r}: the weight of {spec.get('name')!r} is {weight!r}, not a number")
        return float(weight), get_reward({key: value for key, value in spec.items() if key != "weight"})

    @property
    def components(self) -> tuple[str, ...]:
        """The names of the terms."""
        return tuple(self.terms)

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        on_error: OnError = "fail",
    ) -> list[Score]:
        """One `Score` per completion, with the values of all terms. Raises UserError as `Reward.score` does."""
        weights = [weight for weight, _ in self.terms.values()]
        scored = [
            replace(reward, on_error=on_error).score(prompts, completions, columns, completion_ids)
            for _, reward in self.terms.values()
        ]
        scores = []
        for row in zip(*scored, strict=True):
            values = [score.value for score in row]
            known = [w * v for w, v in zip(weights, values, strict=True) if v is not None]
            total = sum(known) if len(known) == len(values) else None
            extra = {column: value for score in row for column, value in score.extra.items()}
            metrics = means(score.metrics for score in row)
            scores.append(Score(total, dict(zip(self.components, values, strict=True)), extra, metrics))
        return scores

    def answers(self, completions: Sequence[Any]) -> list[str | None]:
        """The answers of the first reward that finds any."""
        of_terms = (reward.answers(completions) for _, reward in self.terms.values())
        return next((found for found in of_terms if None not in found), [None] * len(completions))
