r"""Where math-verify is not to be trusted, as tables of rules.

`TEXTS` keeps formulas from it that it reads wrongly or that no machine should compute; `VERDICTS` are asked about
every pair that it finds equal, and each may object. `UNTIMED` joins `TEXTS` outside the main thread.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

_POWER = re.compile(r"(?P<after>[)\]}!])?\s*\^\s*\{?\s*[+-]?(?P<exponent>\d+)")


class TextRule(NamedTuple):
    """Formulas that are compared as texts only."""

    why: str
    applies: Callable[[str], bool]


class VerdictRule(NamedTuple):
    """Expressions that differ although math-verify finds them equal."""

    why: str
    differ: Callable[[Any, Any], bool]


def too_deep(text: str) -> bool:
    """Whether brackets are nested beyond what any answer needs, and any grammar reads in seconds."""
    depth = deepest = 0
    for sign in re.findall(r"\\[{}]|[{}()\[\]]", text):
        depth += 1 if sign[-1] in "{([" else -1
        deepest = max(deepest, depth)
    return deepest > 15


def has_both_cases(text: str) -> bool:
    """Whether a letter of a formula is there in both cases; that of an added constant has either."""
    text = re.sub(r"\+ ?[Cc](?= |$)", "", text)
    letters = set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)))
    return any(letter.swapcase() in letters for letter in letters)


def _too_great(text: str) -> bool:
    """A power, factorial or the like with so many digits that to compute it takes seconds, or for ever."""
    if re.search(r"\^\s*\{?[^{}+*/\-\s]*\^\s*\{?[^{}+*/\-\s]*\^", text):  # three storeys
        return True
    towers = re.findall(r"(\d+)\s*\^\s*\{?\s*\(?(\d+)\s*\^\s*\{?\s*(\d+)", text)
    if any(int(c) > 20 or int(b) ** int(c) > 10_000 for _, b, c in ((a, b[:9], c[:9]) for a, b, c in towers)):
        return True
    powers = [(match["after"], min(int(match["exponent"][:9]), 10**9)) for match in _POWER.finditer(text)]
    onto = math.prod(max(1, exponent) for after, exponent in powers if after)
    alone = max((exponent for after, exponent in powers if not after), default=1)
    if onto * alone > 20_000 or any(len(digits) > 400 for digits in re.findall(r"\d+", text)):
        return True
    if re.search(r"!\s*[!^]|[)}\]]\s*!", re.sub(r"\([A-Za-z][^()\d]*(?:[+-]\s*\d{1,3})?\)\s*!", "", text)):
        return True
    if any(len(digits) > 4 for digits in re.findall(r"(\d+)\s*!", text)):
        return True
    if re.search(r"\\prod(?![A-Za-z])", text) and any(len(digits) > 3 for digits in re.findall(r"\d+", text)):
        return True
    counted = r"\\(?:d|t)?binom|\\choose|\\sum|\\prod|\\int|\\operatorname|\\gcd|\\lcm|\\bmod"
    return re.search(counted, text) is not None and any(len(digits) > 5 for digits in re.findall(r"\d+", text))


TEXTS = (
    TextRule("too long to be a final answer", lambda text: len(text) > 1000),
    TextRule("brackets nested too deep", too_deep),
    TextRule("two signs are one or none: --5 reads as 5", lambda text: re.match(r"[-+] ?[-+]", text) is not None),
    TextRule("too great to be computed (Math-Verify#14: 1/2004!)", _too_great),
    TextRule("capital and small letters are one variable: A + a reads as 2a", has_both_cases),
    TextRule("dots are dropped: 1+2+...+10 reads as 13", lambda text: r"\ldots" in text),
    TextRule(
        "congruences are read as products of letters: 2 mod 5",
        lambda t: re.search(r"mod(?![A-Za-z])|\\equiv", t) is not None,
    ),
    TextRule(
        "numbers side by side are added or multiplied: 3 4 reads as 7",
        lambda t: re.search(r"(?<![_^\d])\d+ \d", t) is not None,
    ),
    TextRule(
        "one digit without braces is taken where people mean the number: \\sqrt21 and \\frac{1}21",
        lambda t: re.search(r"\\sqrt ?\d\d|\\frac ?(?:\{[^{}]*\}|\d) ?\d\d", t) is not None,
    ),
    TextRule(
        "dates are read as differences and quotients: 2024-01-05 as 2018",
        lambda t: re.search(r"(?<!\d)(?:\d{4}-\d\d?-\d\d?|\d\d?[-/]\d\d?[-/]\d{4})(?!\d)", t) is not None,
    ),
    TextRule("a number's base is dropped: 52_8 equals 52_7", lambda text: re.search(r"\d_", text) is not None),
    TextRule("a repeating decimal loses its bar", lambda t: re.search(r"\.\d*\\(?:overline|bar|dot)", t) is not None),
)


UNTIMED = (
    TextRule(
        "sums, products, integrals, limits and determinants take any time",
        lambda text: re.search(r"\\(?:sum|prod|i*nt|oint|lim|det|binom|Gamma|zeta)(?![A-Za-z])", text) is not None,
    ),
    TextRule(
        "great powers are expanded",
        lambda text: any(int(match["exponent"][:9]) > 50 for match in _POWER.finditer(text)),
    ),
    TextRule("too long to be simplified in a second", lambda text: len(text) > 150),
)
"""What is compared as texts only where no time limit can be kept."""


def _of_other_size(gold: Any, answer: Any) -> bool:
    """Closed numbers that differ by more than rounding, in proportion to their size."""
    from sympy import Float, MatrixBase, Rational

    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return gold.shape == answer.shape and any(map(_of_other_size, gold.flat(), answer.flat()))
    if not all(getattr(one, "is_number", False) and not getattr(one, "is_infinite", False) for one in (gold, answer)):
        return False
    x, y = gold.doit(), answer.doit()
    if x == y:
        return False
    if isinstance(x, Rational) and isinstance(y, Rational):
        return not _is_percentage_of(x, y, gold, answer)
    rounded = x.has(Float) or y.has(Float)
    size = max(abs(x.evalf(30)), abs(y.evalf(30)))
    return bool(abs((x - y).evalf(30)) > size * (1e-6 if rounded else 1e-12))


def _is_percentage_of(x: Any, y: Any, gold: Any, answer: Any) -> bool:
    """Whether one is 100 times the other and was read from a percentage, which math-verify keeps unevaluated."""
    from sympy import UnevaluatedExpr

    return bool(x == 100 * y or y == 100 * x) and (gold.has(UnevaluatedExpr) or answer.has(UnevaluatedExpr))


def _is_other_side(gold: Any, answer: Any) -> bool:
    """A value, and an equation that has it on its right although the left is no name for it: 3x + 2y = 6, or 3 = 4."""
    from sympy import Dummy, Eq, Number
    from sympy.core.function import AppliedUndef

    if isinstance(gold, Eq) or not isinstance(answer, Eq):
        return False
    left = answer.lhs.replace(lambda part: isinstance(part, AppliedUndef), lambda part: Dummy())
    if not left.free_symbols and left == answer.lhs:
        return bool(abs((answer.lhs - answer.rhs).evalf()) > 0.01 * abs(answer.rhs.evalf()))
    return any(number != -1 for number in left.atoms(Number))


def _is_other_collection(gold: Any, answer: Any) -> bool:
    """A set and a tuple, which is read as an open interval."""
    from sympy import FiniteSet, Interval, Tuple

    kinds = [isinstance(one, FiniteSet) - isinstance(one, (Interval, Tuple)) for one in (gold, answer)]
    return kinds[0] * kinds[1] < 0


VERDICTS = (
    VerdictRule("a difference is rounded to 15 places: 1/2^99 and 1/2^98 (Math-Verify#14)", _of_other_size),
    VerdictRule("an equation is worth its right side: 3x + 2y = 6 for 6 (Math-Verify#26)", _is_other_side),
    VerdictRule("{1, 2} equals (1, 2) (Math-Verify#56)", _is_other_collection),
)
