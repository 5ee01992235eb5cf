"""Units of measurement, and words after a number in general: what they are called, and which of them agree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from rlzoo.rewards._languages import CONJUNCTIONS

_MEASURES = {
    "m": "metre meter",
    "cm": "centimetre centimeter",
    "mm": "millimetre millimeter",
    "km": "kilometre kilometer",
    "inch": "in",
    "foot": "ft feet",
    "yard": "yd",
    "mile": "mi",
    "kg": "kilogram kilo",
    "g": "gram gm",
    "mg": "milligram",
    "pound": "lb",
    "ounce": "oz",
    "ton": "tonne",
    "l": "litre liter",
    "ml": "millilitre milliliter",
    "gallon": "gal",
    "s": "sec second",
    "minute": "min",
    "hour": "h hr",
    "day": "",
    "week": "wk",
    "year": "yr",
    "dollar": "$ us$ usd buck",
    "cent": "¢",
    "euro": "€ eur",
    "pound sterling": "£ gbp",
    "rupee": "₹ rs inr",
    "yen": "¥ jpy",
    "yuan": "元 rmb cny",
    "degree": "deg",
    "radian": "rad",
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "mile hour": "mph",
    "km hour": "kmh kph kmph",
    "hertz": "hz",
    "2": "square sq",
    "3": "cubic cube",
    "pascal": "pa",
    "celsius": "c centigrade",
    "fahrenheit": "f",
}
_CANONICAL = {other: unit for unit, others in _MEASURES.items() for other in (unit, *others.split())}

SHORT = {f"{unit}{plural}" for unit in _CANONICAL for plural in ("", "s") if unit.isalpha() and len(unit) > 1}
"""Units of few letters, which are no product of variables even without ``\\text`` around them."""
SHORT |= {"am", "pm", "sq", "box", "units"}
SHORT |= {"atm", "cal", "dyn", "erg", "mol", "kj", "kw", "nm", "ohm", "rpm"}
SHORT |= {f"{prefix}{unit}" for prefix in ("", "k", "m", "g") for unit in ("ev", "hz", "pa", "wh")}
SHORT |= {
    f"{noun}{plural}" for noun in ("bag", "car", "cat", "cup", "dog", "egg", "pen", "toy") for plural in ("", "s")
}

SYMBOLS = frozenset("mgshlL")
"""Units of one letter, which are taken for such after a number."""

_LINKING = frozenset([*CONJUNCTIONS, "not", "but", "to", "than", "either", "nor", "between", "through"])
"""Words by which a number with words after it is not one number with its unit: 5 or more."""
_LINKING |= {"is", "if", "unless", "when", "wrong", "incorrect", "maybe", "perhaps", "possibly"}
_LINKING |= {"squared", "cubed", "factorial", "below", "above", "times", "fold", "out", "halves", "thirds", "tenths"}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SCALES |= {"百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
"""Words that multiply the number before them."""
_SIZES: dict[str, tuple[str, Fraction | int]] = {
    **{"mm": ("m", Fraction(1, 1000)), "cm": ("m", Fraction(1, 100)), "m": ("m", 1), "km": ("m", 1000)},
    **{"inch": ("inch", 1), "foot": ("inch", 12), "yard": ("inch", 36), "mile": ("inch", 63360)},
    **{"mg": ("g", Fraction(1, 1000)), "g": ("g", 1), "kg": ("g", 1000), "ounce": ("ounce", 1), "pound": ("ounce", 16)},
    **{"ml": ("l", Fraction(1, 1000)), "l": ("l", 1), "cent": ("dollar", Fraction(1, 100)), "dollar": ("dollar", 1)},
    **{"s": ("s", 1), "minute": ("s", 60), "hour": ("s", 3600), "day": ("s", 86400), "week": ("s", 604800)},
}
"""Units that convert exactly: to which, and how many of it they are."""
_SIGNS = {"'": ("foot", "minute"), "''": ("inch", "s"), '"': ("inch", "s")}
"""Signs that stand for either of two units."""
_IDLE = frozenset(["of", "the", "a", "an", "per", "each", "about", "in", "total", "for", "altogether"])
_IDLE |= {"left", "remaining", "more", "now", "away"}
_DIMENSIONS = frozenset("23")


def canonical(words: list[str]) -> frozenset[str] | None:
    """The words of a unit as they are compared: singular, one name for each measure. None if this is no unit."""
    if any(word.lower() in _LINKING or re.match("分之|以上|以下|左右", word) for word in words):
        return None
    named = (_CANONICAL.get(word.lower()) or _singular(word.lower()) for word in words)
    return frozenset(word for name in named for word in name.split()) - _IDLE


def scaled(unit: frozenset[str]) -> tuple[int, frozenset[str]]:
    """What the words of a unit multiply the number before them by, and the unit without them: million dollars, 万元."""
    scale, rest = 1, set[str]()
    for word in unit:
        spelled = word if word in _SCALES else word[:1]
        scale *= _SCALES.get(spelled, 1)
        rest.add(word.removeprefix(spelled) if spelled in _SCALES else word)
    return scale, frozenset(_CANONICAL.get(word, word) for word in rest if word)


def _singular(word: str) -> str:
    for plural, end in ((r"ies$", "y"), (r"(?<=x|s)es$|(?<=ch|sh)es$", ""), (r"(?<=[^\Wsu])s$", "")):
        if re.search(plural, word):
            word = re.sub(plural, end, word)
            break
    return _CANONICAL.get(word) or re.sub(r"ie$", "y", word)


def ratio(one: frozenset[str], other: frozenset[str]) -> Fraction | None:
    """How many of another unit one is: 1 where one of them says no more than the other, or nothing; None if none."""
    for given in _readings(one):
        for wanted in _readings(other):
            if (given <= wanted or wanted <= given) and _same_dimension(given, wanted):
                return Fraction(1)
            if (size := _size(given)) and (per := _size(wanted)) and size[0] == per[0]:
                return size[1] / per[1]
    return None


def _same_dimension(one: frozenset[str], other: frozenset[str]) -> bool:
    return not one or not other or one & _DIMENSIONS == other & _DIMENSIONS


def _readings(unit: frozenset[str]) -> Iterator[frozenset[str]]:
    """A unit with each sign in it spelled out in both ways."""
    sign = next((word for word in sorted(unit) if word in _SIGNS), None)
    if sign is None:
        yield unit
    else:
        for name in _SIGNS[sign]:
            yield from _readings(unit - {sign} | {name})


def _size(unit: frozenset[str]) -> tuple[tuple[str, str], Fraction] | None:
    """The measure that a unit converts to, with its dimension, and how many of it the unit is."""
    words, dimension = unit - _DIMENSIONS, "".join(unit & _DIMENSIONS)
    found = _SIZES.get("".join(words)) if len(words) == 1 else None
    return ((found[0], dimension), Fraction(found[1]) ** int(dimension or 1)) if found else None


def names_unit(words: str) -> bool:
    """Whether words after a number may say of what: they have a measure, or a noun in the plural."""
    return any(
        word.lower() in _CANONICAL or word.lower() in _SCALES or re.fullmatch(r"[a-z]{2,}[a-rt-z]s", word)
        for word in re.findall("[A-Za-z]+", words)
    )
