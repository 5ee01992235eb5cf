"""Length: 1 for completions up to a target length, falling linearly to 0 at a limit."""

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

    n is the number of ``completion_ids`` (end of sequence included) if they are passed, else of words. Raises UserError
    unless 0 ≤ target < limit.
    """

    name: ClassVar[str] = "length"

    target: int = 256
    """The largest number of tokens with a reward of 1."""
    limit: int = 512
    """The smallest number of tokens with a reward of 0."""

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
        """One value per completion."""
        return list(self.shares(completions, completion_ids))

    def shares(self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None) -> list[float]:
        """clip((limit - n) / (limit - target), 0, 1) for each completion."""
        if completion_ids is None:
            lengths = [len(completion_text(c).split()) for c in completions]
        else:
            lengths = [len(ids) for ids in completion_ids]
        return [min(max((self.limit - n) / (self.limit - self.target), 0.0), 1.0) for n in lengths]
