"""Format: 1 if a completion matches a pattern; 0 otherwise."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlzoo.errors import UserError
from rlzoo.reward import register_reward
from rlzoo.rewards._text import completion_text

ANSWERED = r"(?m:^)####[ \t]*\S[^\n]*\s*\Z|\\boxed\s*\{[^}]"
r"""A last line ``#### answer``, or a ``\boxed{answer}`` anywhere."""


@register_reward
@dataclass(frozen=True)
class Format:
    r"""1[``pattern`` is found in the completion].

    The pattern may match anywhere (`re.search`): write ``\A...\Z`` to match the whole text, and put flags into the
    pattern, as in ``(?is)<answer>.*</answer>``. Raises UserError for an invalid regular expression.
    """

    name: ClassVar[str] = "format"

    pattern: str = ANSWERED
    """A regular expression."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                f"reward {self.name!r}: pattern {self.pattern!r} is not a regular expression: {error}"
            ) from None

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value per completion."""
        return [float(re.search(self.pattern, completion_text(c)) is not None) for c in completions]
