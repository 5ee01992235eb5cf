"""Exact match: 1 if the answer is the expected text, character by character; 0 otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlzoo.reward import register_reward
from rlzoo.rewards._text import after_last, column_of, completion_text, gold_text, is_missing


@register_reward
@dataclass(frozen=True)
class ExactMatch:
    """1[answer = gold], where the answer is what follows the last ``marker``, or the whole text if there is none.

    The gold answer is read from ``column`` in the same way; a row without one (None, NaN) has the reward None.
    """

    name: ClassVar[str] = "exact-match"

    column: str = "answer"
    """The column with the gold answer."""
    marker: str = "####"
    """The text before an answer; empty: compare whole completions."""
    ignore_case: bool = False
    """Whether upper and lower case are the same."""
    any_of: bool = False
    """Whether the column may hold a list of answers, of which one is enough."""

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value per completion. Raises UserError if the data lack ``column``, TypeError as `gold_text` does."""
        golds = column_of(columns, self.column, self.name)
        return [
            None if not accepted else float(self._answer(completion_text(completion)) in accepted)
            for completion, accepted in zip(completions, map(self._accepted, golds), strict=True)
        ]

    def _accepted(self, gold: Any) -> list[str]:
        """The answers that are right; [] if the row has none."""
        golds = gold if self.any_of and isinstance(gold, list | tuple) else [gold]
        return [self._answer(gold_text(one)) for one in golds if not is_missing(one)]

    def answer_of(self, completion: Any) -> str:
        """The answer in a completion, which maj@k counts."""
        return self._answer(completion_text(completion))

    def _answer(self, text: str) -> str:
        answer = after_last(text, self.marker) if self.marker else None
        answer = text.strip() if answer is None else answer
        return answer.casefold() if self.ignore_case else answer
