"""Exact match: 1 if the answer, letter by letter, is the expected one; 0 otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlzoo.reward import register_reward
from rlzoo.rewards._text import after_last, column_of, completion_text, gold_text, is_missing


@register_reward
@dataclass(frozen=True)
class ExactMatch:
    """1[answer = gold], the answer being what follows the last ``marker``, or all of a text that has none.

    The gold answer is read from ``column`` in the same way; a row without one (None, NaN) is worth None.
    """

    name: ClassVar[str] = "exact-match"

    column: str = "answer"
    marker: str = "####"
    """Empty: compare whole completions."""
    ignore_case: bool = False

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value for each completion. Raises UserError if the data lacks ``column``, TypeError as `gold_text`."""
        golds = column_of(columns, self.column, self.name)
        return [
            None
            if is_missing(gold)
            else float(self._answer(completion_text(completion)) == self._answer(gold_text(gold)))
            for completion, gold in zip(completions, golds, strict=True)
        ]

    def answer_of(self, completion: Any) -> str:
        """What the completion answers."""
        return self._answer(completion_text(completion))

    def _answer(self, text: str) -> str:
        answer = after_last(text, self.marker) if self.marker else None
        answer = text.strip() if answer is None else answer
        return answer.casefold() if self.ignore_case else answer
