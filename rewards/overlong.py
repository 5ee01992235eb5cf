"""Overlong: 0 for a completion that is short enough, falling linearly to -1 for one that is too long."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlzoo.reward import register_reward
from rlzoo.rewards.length import Length


@register_reward
@dataclass(frozen=True)
class Overlong(Length):
    """clip((limit - n) / (limit - target), 0, 1) - 1 for a completion of n tokens: DAPO's soft overlong punishment.

    It is added to another reward. Of eq. 13 (arXiv:2503.14476), L_max is ``limit`` and L_cache ``limit - target``. n is
    counted as `Length` counts it. Raises UserError unless 0 ≤ target < limit.
    """

    name: ClassVar[str] = "overlong"

    def __call__(
        self,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One value for each completion."""
        return [share - 1 for share in self.shares(completions, completion_ids)]
