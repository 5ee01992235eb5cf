"""Numbers as people write them, with currency, percent sign and unit; ratios; numbers in a base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from rlzoo.rewards import _units
from rlzoo.rewards._writing import is_word

_CURRENCY = r"(?P<currency>US\$|[$€£¥₹]|USD|EUR|GBP|Rs\.?)"
_BEFORE = re.compile(
    r"(?:\\approx |\\sim |(?:\\text\{ ?)?(?:approximately|about|roughly|exactly|only)(?: ?\})? )?"
    rf"(?P<sign>negative|minus|[+-]?) ?{_CURRENCY}? ?(?P<sign2>[+-]?) ?"
)
_POWER = r"10\^(?:\{ ?(?P<%s>[+-]?\d+) ?\}|(?P<%s>[+-]?\d+))"
_WRITTEN = [
    re.compile(pattern)
    for pattern in (
        # 1/2, \frac12, and mixed: 5 1/2, 5\frac{1}{2}
        r"(?:(?P<whole>\d+) ?)?\\frac ?(?:\{(?P<a1>-?\d+)\}|(?P<a2>\d)) ?(?:\{(?P<b1>\d+)\}|(?P<b2>\d))",
        r"(?:(?P<whole>\d+) )?(?P<a1>\d{1,3}(?:,\d{3})+|\d+) ?/ ?(?P<b1>\d{1,3}(?:,\d{3})+|\d+)(?![\d.])",
        # 0.1\bar{6}
        r"(?P<before>\d*\.\d*)\\(?:overline|bar)(?:\{(?P<bar1>\d+)\}|(?P<bar2>\d))",
        # 1.234,56 and 1.234.567
        r"(?P<dotted>\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,})(?![\d.])",
        # 12, 1.5, .5, 1,234.5, 1 234, 1'234; 1.5e3, 1.5 \times 10^3
        r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:[ ']\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)"
        r"(?:[eE](?P<e0>[+-]?\d+)(?![\w.])| ?(?:\\times|\\cdot|\*|x) ?" + _POWER % ("e1", "e2") + ")?",
    )
]
_WRITTEN.insert(0, re.compile(_POWER % ("e1", "e2")))  # 10^{6}
_PERCENT = re.compile(r" ?(?:%|\(%\)|\\text\{ ?(?:%|percent|per cent|pct) ?\}|(?:percent|per cent|pct)\b)")
_ORDINAL = re.compile(r"(?:\^\{?)?(?:\\text\{)?(?:st|nd|rd|th)\}?\}?(?![A-Za-z])")
_UNIT = re.compile(
    r"\s*(?:\\text\{(?P<text>[^{}\d]*)\}|(?P<degree>\^\\circ ?)|\^\{?(?P<power>-?\d)\}?|\((?P<round>[^\W\d_][^()\d]*)\)"
    r"|(?P<link>[/.-]|\\cdot)|(?P<sign>[€£¥₹¢$]|''?|\")|(?P<word>[^\W\d_]+(?:'[^\W\d_]+)?))"
)
_UNIT_FRACTION = re.compile(r"\\frac\{(\\text\{[^{}\d]*\})\}\{((?:\\text\{[^{}\d]*\}|[A-Za-z])(?:\^\{?\d\}?)?)\}")
_ADJECTIVE = re.compile(r" ?(?=[a-z]*[aeiou])[a-z]{2,3} [a-z]{4,}")
"""A short word that is no product of variables, for another follows: red marbles."""
_EXTREME, _UNITS_OF_ONE = 400, 4
"""Digits, and powers of ten, beyond which a number is left to the comparison of texts; units of one quantity."""


@dataclass(frozen=True)
class Number:
    """A number as it was written."""

    value: Fraction
    percent: bool
    decimal: bool
    """Written with decimals, and so perhaps rounded."""
    unit: frozenset[str]


_COMPOUND = re.compile(r"(?:(?<=[^\W\d_])(?:,? and |,? )|(?<=') ?)(?=\d)")


@lru_cache(4096)
def number(text: str) -> Number | None:
    """The number that a clean text is, of a quantity in two units in the larger one; None for anything else."""
    return _simple(text) or _compound(text)


def _compound(text: str) -> Number | None:
    """A quantity of several units of one measure, 2 hours 30 minutes."""
    text = " ".join(re.sub(r"\\text\{([^{}\d]*)\}", r" \1 ", text).split())
    parts = [_simple(part) for part in _COMPOUND.split(text)[:_UNITS_OF_ONE]]
    if len(parts) < 2 or parts[0] is None:
        return None
    total, largest = Fraction(0), parts[0].unit
    for part in parts:
        size = _units.ratio(part.unit, largest) if part and part.unit and not part.percent else None
        if part is None or size is None or (size == 1 and part is not parts[0]):
            return None
        total += part.value * size
    return Number(total, False, parts[-1] is not None and parts[-1].decimal, largest)


def _simple(text: str) -> Number | None:
    before = _BEFORE.match(text)
    assert before is not None  # all of it is optional
    written = next((found for p in _WRITTEN if (found := p.match(text, before.end()))), None)
    if written is None or len(written[0]) > _EXTREME or (before["sign"] and before["sign2"]):
        return None
    value = _value(written.groupdict())
    if value is None:
        return None
    after = _PERCENT.match(text, written.end())
    percent = after is not None
    after = after or _ORDINAL.match(text, written.end()) or written
    unit = unit_of(text[after.end() :])
    if unit is None:
        return None
    if before["currency"]:
        unit |= _units.canonical([before["currency"].rstrip(".")]) or frozenset()
    scale, unit = _units.scaled(unit)
    value *= scale
    negative = before["sign"] in ("-", "negative", "minus") or before["sign2"] == "-"
    exact = any(written.groupdict().get(part) for part in ("b1", "b2", "bar1", "bar2"))
    decimal = value.denominator > 1 and not exact
    return Number(-value if negative else value, percent, decimal, unit)


def _value(parts: dict[str, str | None]) -> Fraction | None:
    def part(*names: str) -> str:
        return next((found for name in names if (found := parts.get(name))), "")

    above, below = part("a1", "a2").replace(",", ""), part("b1", "b2").replace(",", "")
    if above:
        return None if not int(below) else Fraction(int(above), int(below)) + int(part("whole") or 0)
    if part("dotted"):
        return Fraction(part("dotted").replace(".", "").replace(",", "."))
    if repeated := part("bar1", "bar2"):
        places = len(part("before").partition(".")[2])
        return Fraction(part("before") + "0") + Fraction(int(repeated), (10 ** len(repeated) - 1) * 10**places)
    exponent = int(part("e0", "e1", "e2") or 0)
    digits = re.sub("[, ']", "", part("digits")).rstrip(".") or "1"
    return Fraction(digits) * Fraction(10) ** exponent if abs(exponent) <= _EXTREME else None


def unit_of(text: str) -> frozenset[str] | None:
    """The words of the unit after a number, none for no text; None if that is no unit but part of a formula."""
    found, at, text = list[str](), 0, _UNIT_FRACTION.sub(r"\1/\2", text)
    while at < len(text):
        match = _UNIT.match(text, at)
        if match is None:
            return None if text[at:].strip() else _units.canonical(found)
        at = match.end()
        spelled = match["text"] if match["text"] is not None else match["round"] or match["word"] or match["sign"] or ""
        named = re.findall(r"[€£¥₹¢$]|''?|\"|[^\W\d_]+(?:'[^\W\d_]+)?", spelled)
        if match["word"] and not (
            found or is_word(match["word"]) or match["word"] in _units.SYMBOLS or _ADJECTIVE.match(text, match.start())
        ):
            return None  # a variable
        if match["round"] and any(len(word) < 3 and not is_word(word) and word not in _units.SYMBOLS for word in named):
            return None  # a factor
        if match["round"] and re.search(r"[^\w\s/.,'-]", match["round"]):
            return None
        if (match["power"] or match["link"]) and not found:
            return None
        found += ["degree"] if match["degree"] else [match["power"]] if match["power"] else named
    return _units.canonical(found)


def comma_decimal(text: str) -> Number | None:
    """A number with a decimal comma, ``1000,99``; None for what may be thousands, 1,234."""
    match = re.match(r"([+-]?[€£$]? ?(?:\d{1,3}(?:[ ']\d{3})+|\d+)),(\d+)(?!\d|,)", text)
    if match is None or (len(match[2]) == 3 and len(re.sub(r"\D", "", match[1])) <= 3):
        return None
    return number(f"{match[1]}.{match[2]}{text[match.end() :]}")


def equal(one: Number, other: Number) -> bool:
    """Equal numbers in the same or in convertible units; p % also equals p/100 and, from 1 % on, p without the sign."""
    size = _units.ratio(one.unit, other.unit)
    if size is None:
        return False
    rounded = one.decimal or other.decimal
    x, y = one.value * size, other.value
    if close(x, y, rounded) and (one.percent == other.percent or abs(x) >= 1):
        return True
    return one.percent != other.percent and (close(x / 100, y, True) if one.percent else close(x, y / 100, True))


def close(x: Fraction, y: Fraction, rounded: bool) -> bool:
    """Equality; of decimals, to the six places that math-verify rounds to, and as many digits for small ones."""
    if x == y:
        return True
    return rounded and round(x, 6) == round(y, 6) and abs(x - y) <= max(abs(x), abs(y)) / 10**6


def ratio(text: str) -> list[Fraction] | None:
    """The terms of a ratio such as 3:4; None for anything else."""
    terms = [number(term.strip()) for term in re.split(r":|\\colon(?![A-Za-z])|\\text\{ ?to ?\}|\bto\b", text)]
    if len(terms) < 2 or re.search(r"\b0\d", text) or any(term is None or term.unit or term.percent for term in terms):
        return None
    return [term.value for term in terms if term]


def same_ratio(one: list[Fraction], other: list[Fraction]) -> bool:
    """Whether the terms of two ratios are proportional."""
    if len(one) != len(other) or not one[0] or not other[0]:
        return one == other
    return all(x * other[0] == y * one[0] for x, y in zip(one, other, strict=True))


def based(text: str) -> tuple[str, int | None] | None:
    """The digits of a number and its base, 1010_2, or None where it says none; None for all else, such as A_{12}."""
    match = re.fullmatch(r"([0-9]|[0-9A-Z]{2,})(?:_(?:\{(\d+)\}|(\d)))?", text)
    return (match[1], int(match[2] or match[3]) if match[2] or match[3] else None) if match else None


def same_in_base(one: tuple[str, int | None], other: tuple[str, int | None]) -> bool:
    """Equal values in bases that both name; equal digits where one of them leaves its base out."""
    if one[1] is None or other[1] is None or not all(2 <= (base or 0) <= 36 for _, base in (one, other)):
        return one[0] == other[0] and (one[1] is None or other[1] is None or one[1] == other[1])
    try:
        return int(one[0], one[1]) == int(other[0], other[1])
    except ValueError:  # a digit that the base has not, or thousands of them
        return False
