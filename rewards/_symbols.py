"""Formulas compared by math-verify, behind the rules of `_guards`."""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from rlzoo.rewards import _guards

SECONDS = 2
"""What a comparison may take in all, about: math-verify keeps time in whole seconds, one at least for each step."""


@lru_cache(4096)
def equal(gold: str, answer: str) -> bool:
    """Whether two clean formulas are equal as mathematics; False where neither math-verify nor a rule can tell."""
    limited = _limited()
    rules = _guards.TEXTS if limited else (*_guards.TEXTS, *_guards.UNTIMED)
    if any(rule.applies(text) for rule in rules for text in (gold, answer)):
        return False
    started = time.monotonic()
    expected, given = _parsed(gold, limited), _parsed(answer, limited)
    if expected is None or given is None or _within(limited, _differ_at_a_point, expected, given):
        return False
    from math_verify import verify

    seconds = max(1, SECONDS - int(time.monotonic() - started)) if limited else None
    if not verify([expected], [given], allow_set_relation_comp=True, timeout_seconds=seconds):
        return False
    return not any(_within(limited, rule.differ, expected, given) for rule in _guards.VERDICTS)


@lru_cache(4096)
def _parsed(text: str, limited: bool) -> Any | None:
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
    found = parse(rf"\boxed{{{text}}}", [config], fallback_mode="no_fallback", parsing_timeout=1 if limited else None)
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


def _within(limited: bool, question: Callable[[Any, Any], bool], gold: Any, answer: Any) -> bool:
    """The answer to a question about two expressions; no if sympy fails on it, or takes too long."""
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout

    try:
        return bool(timeout(1 if limited else None)(question)(gold, answer))
    except (Exception, TimeoutException):
        return False


def _limited() -> bool:
    """math-verify keeps time with SIGALRM, which only the main thread has: elsewhere what may take long is left out."""
    if threading.current_thread() is threading.main_thread():
        return True
    for module in ("parser", "grader"):  # they warn at every start about what is done here on purpose
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    return False
