"""Formulas compared by math-verify, behind the rules of `_guards`, within a limit of processor time."""

from __future__ import annotations

import logging
import random
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from types import FrameType
from typing import Any

from rlzoo.rewards import _guards

SECONDS = 1.5
"""Processor time that a comparison may take. Most take 10 ms, so that no grade depends on what else a machine does."""


class _OutOfTimeError(BaseException):
    """Not an Exception, for sympy catches those."""


@lru_cache(4096)
def equal(gold: str, answer: str) -> bool:
    """Whether two clean formulas are equal as mathematics; False where neither math-verify nor a rule can tell."""
    limited = threading.current_thread() is threading.main_thread()  # others have no signals
    rules = _guards.TEXTS if limited else (*_guards.TEXTS, *_guards.UNTIMED)
    if any(rule.applies(text) for rule in rules for text in (gold, answer)):
        return False
    try:
        with _processor_time(SECONDS) if limited else nullcontext():
            return _equal(gold, answer)
    except _OutOfTimeError:
        return False


def _equal(gold: str, answer: str) -> bool:
    for module in ("parser", "grader"):  # they warn at every start that their own limits, of wall-clock time, are off
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    expected, given = _parsed(gold), _parsed(answer)
    if expected is None or given is None or _holds(_differ_at_a_point, expected, given):
        return False
    from math_verify import verify

    if not verify([expected], [given], allow_set_relation_comp=True, timeout_seconds=None):
        return False
    return not any(_holds(rule.differ, expected, given) for rule in _guards.VERDICTS)


@contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """A limit on the processor time that the process spends in a block. Raises _OutOfTimeError, again and again."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)  # again, for what swallows the first
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)


@lru_cache(4096)
def _parsed(text: str) -> Any | None:
    """The one expression that all of the text is; None if math-verify cannot read it.

    It is not asked to search for a number in what it cannot read, nor to drop what it takes for units.
    """
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    normal = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last")
    config = LatexExtractionConfig(
        try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=normal
    )
    text = re.sub(r"(?<=\d)i(?![A-Za-z])", " i", text)  # next to a digit it is taken for a real variable
    found = parse(rf"\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if found else None


def _differ_at_a_point(gold: Any, answer: Any) -> bool:
    """Whether two terms have clearly different values at random values of their variables: faster than algebra."""
    from sympy import Expr, Float

    if not (isinstance(gold, Expr) and isinstance(answer, Expr)):
        return False
    draw = random.Random(0)
    variables = sorted(gold.free_symbols | answer.free_symbols, key=str)
    point = {variable: Float(draw.uniform(0.3, 0.9)) for variable in variables}
    one, other = gold.subs(point).evalf(15), answer.subs(point).evalf(15)
    return bool(abs(one - other) > 0.01 * max(abs(one), abs(other)))


def _holds(question: Callable[[Any, Any], bool], gold: Any, answer: Any) -> bool:
    """The answer to a question about two expressions; no if sympy fails on it."""
    try:
        return bool(question(gold, answer))
    except Exception:
        return False
