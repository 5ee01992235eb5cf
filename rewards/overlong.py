"""Overlong: 0 for completions up to a target length, falling linearly to -1 at a limit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlzoo.reward import register_reward
from rlzoo.rewards.length import Length


@register_reward
@dataclass(frozen=True)
class Overlong(Length):
    """clip((limit - n) / (limit - target), 0, 1) - 1 for a completion of n tokens: DAPO's soft overlong punishment.

    It is meant to be added to another reward. n is counted as in `Length`. Raises UserError unless 0 ≤ target < limit.
    Source: arXiv 2503.14476, eq. 13, where L_max is ``limit`` and L_cache is ``limit - target``.
    """

    name: ClassVar[str] = "overlong"

    def __call__(
        self,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One value per completion."""
        return [share - 1 for share in self.shares(completions, completion_ids)]
