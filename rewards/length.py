"""Length: 1 for a completion that is short enough, falling linearly to 0 for one that is too long."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlzoo.errors import UserError
from rlzoo.reward import register_reward
from rlzoo.rewards._text import completion_text


@register_reward
@dataclass(frozen=True)
class Length:
    """clip((limit - n) / (limit - target), 0, 1) for a completion of n tokens.

    n counts ``completion_ids`` (end of sequence included) where they are passed, else words between blanks.
    Raises UserError unless 0 ≤ target < limit.
    """

    name: ClassVar[str] = "length"

    target: int = 256
    """Tokens up to which a completion earns 1."""
    limit: int = 512
    """Tokens from which on it earns 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.target < self.limit:
            raise UserError(
                f"reward {self.name!r}: target {self.target}, limit {self.limit}: must be 0 <= target < limit"
            )

    def __call__(
        self,
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One value for each completion."""
        return list(self.shares(completions, completion_ids))

    def shares(self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None) -> list[float]:
        """How much of the way from ``limit`` down to ``target`` each completion is, in [0, 1]."""
        if completion_ids is None:
            lengths = [len(completion_text(c).split()) for c in completions]
        else:
            lengths = [len(ids) for ids in completion_ids]
        return [min(max((self.limit - n) / (self.limit - self.target), 0.0), 1.0) for n in lengths]
