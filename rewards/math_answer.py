r"""Mathematics: 1 if the final answer equals the expected one as mathematics, 0 if not, by math-verify.

The final answer is what the last ``\boxed{...}`` holds, else what follows the last ``####`` on its line, else
what math-verify finds in the text ("the final answer is ...", or else the last number or formula).
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from rlzoo.reward import register_reward
from rlzoo.rewards._text import after_last, column_of, completion_text, last_boxed

_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?:\\?\$)?\s*(?P<sign2>[+-]?)"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)\s*(?P<percent>(?:\\?%)?)\s*\$?\.?"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{[^{}]*\}")
_WORD = re.compile(r"(?:^|\s)[A-Za-z]{2,}\s|\s[A-Za-z]{2,}(?:\s|[.,;:!?]|$)")
"""A bare word beside a blank: what has one is prose, or a number with its unit."""

PARSE_SECONDS, VERIFY_SECONDS = 5, 5


@register_reward
@dataclass(frozen=True)
class MathAnswer:
    """1[answer = gold] up to the form of writing; None for a row whose gold answer cannot be read.

    Gold answers are numbers, LaTeX, or worked solutions that end as completions do. An answer with a
    percent sign equals the same number without one, and its hundredth.
    """

    name: ClassVar[str] = "math-answer"

    column: str = "answer"
    marked: bool = False
    """True: an answer must be marked by a box or ``####``; the last number of rambling text does not count."""

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value for each completion. Raises UserError if the data lacks ``column``."""
        golds = column_of(columns, self.column, self.name)
        return [_correct(completion_text(c), gold, self.marked) for c, gold in zip(completions, golds, strict=True)]


def _correct(completion: str, gold: Any, marked: bool) -> float | None:
    if gold is None or (isinstance(gold, float) and not math.isfinite(gold)):
        return None
    expected = _stated(str(gold))
    expected = str(gold).strip() if expected is None else expected
    answer = _stated(completion)
    known, given = _number(expected), _number(completion.strip() if answer is None else answer)
    if marked and answer is None:
        return 0.0 if known or _parsed(expected) else None
    if known and given:
        return float(_same(known, given))
    golds = _parsed(expected)
    if not golds:
        return None
    return float(_verified(golds, _parsed(completion, formula=False) if answer is None else _parsed(answer)))


def _stated(text: str) -> str | None:
    r"""The answer that a text marks as such: the last ``\boxed{}``, else the line after the last ``####``."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    rest = after_last(text, "####")
    return None if rest is None else rest.partition("\n")[0].strip()


def _number(text: str) -> tuple[Fraction, bool] | None:
    """A number in plain writing (sign, commas, $, %, full stop), and whether it is a percentage."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    digits = match["digits"].replace(",", "").rstrip(".")
    return Fraction(f"{match['sign'] or match['sign2']}{digits}"), bool(match["percent"])


def _same(one: tuple[Fraction, bool], other: tuple[Fraction, bool]) -> bool:
    (x, x_percent), (y, y_percent) = one, other
    if x_percent == y_percent:
        return x == y
    return x == y or (x / 100 == y if x_percent else y / 100 == x)


def _limit(seconds: int) -> int | None:
    """math-verify keeps time with SIGALRM, which only the main thread has: elsewhere there is no limit."""
    if threading.current_thread() is threading.main_thread():
        return seconds
    for module in ("parser", "grader"):  # they warn at every start about what is done here on purpose
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    return None


def _parsed(text: str, formula: bool = True) -> list[Any]:
    """math-verify's readings of a text; ``formula``: it is one formula if it has no bare words in it."""
    from math_verify import parse

    if formula and not _WORD.search(_TEXT.sub("", text)):
        text = rf"\boxed{{{text}}}"
    return list(parse(text, parsing_timeout=_limit(PARSE_SECONDS)))


def _verified(golds: list[Any], answers: list[Any]) -> bool:
    from math_verify import verify

    return bool(verify(golds, answers, timeout_seconds=_limit(VERIFY_SECONDS)))
