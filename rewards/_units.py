"""Units of measurement, and words after a number in general: what they are called, and which of them agree."""

from __future__ import annotations

import re

_MEASURES = {
    "m": "metre meter",
    "cm": "centimetre centimeter",
    "mm": "millimetre millimeter",
    "km": "kilometre kilometer",
    "inch": "in \" ''",
    "foot": "ft feet '",
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

CONJUNCTIONS: tuple[str, ...] = (
    "and",
    "or",
    "und",
    "oder",
    "et",
    "ou",
    "и",
    "или",
    "і",
    "або",
    "och",
    "og",
    "eller",
    "lub",
    "albo",
    "veya",
)
CONJUNCTIONS += ("hoặc", "atau", "vagy", "tai", "ή", "أو", "या", "או")
"""And, and or, of languages that put blanks around words."""
_LINKING = frozenset([*CONJUNCTIONS, "not", "but", "to", "than", "either", "nor", "between", "through"])
"""Words by which a number with words after it is not one number with its unit: 5 or more."""
_LINKING |= {"is", "if", "unless", "when", "wrong", "incorrect", "maybe", "perhaps", "possibly"}
_LINKING |= {"squared", "cubed", "factorial", "below", "above", "times", "fold", "out", "halves", "thirds", "tenths"}
_SCALES = frozenset(["hundred", "thousand", "million", "billion", "trillion", "dozen", *"百千万亿"])
"""Words that multiply the number before them: one that has such a word is no number without it."""
_IDLE = frozenset(["of", "the", "a", "an", "per", "each", "about", "in", "total", "for", "altogether"])
_IDLE |= {"left", "remaining", "more", "now", "away"}
_DIMENSIONS = frozenset("23")


def canonical(words: list[str]) -> frozenset[str] | None:
    """The words of a unit as they are compared: singular, one name for each measure. None if this is no unit."""
    if any(word.lower() in _LINKING or re.match("分之|以上|以下|左右", word) for word in words):
        return None
    named = (_CANONICAL.get(word.lower()) or _singular(word.lower()) for word in words)
    found = frozenset(word for name in named for word in name.split()) - _IDLE
    return found | {word[0] for word in found if word[0] in _SCALES}  # 万元


def _singular(word: str) -> str:
    for plural, end in ((r"ies$", "y"), (r"(?<=x|s)es$|(?<=ch|sh)es$", ""), (r"(?<=[^\Wsu])s$", "")):
        if re.search(plural, word):
            word = re.sub(plural, end, word)
            break
    return _CANONICAL.get(word) or re.sub(r"ie$", "y", word)


def agree(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two units may be the same: one of them says no more than the other, or nothing at all."""
    if one & _SCALES != other & _SCALES or (one and other and one & _DIMENSIONS != other & _DIMENSIONS):
        return False
    return one <= other or other <= one


def names_unit(words: str) -> bool:
    """Whether words after a number may say of what: they have a measure, or a noun in the plural."""
    return any(
        word.lower() in _CANONICAL or word.lower() in _SCALES or re.fullmatch(r"[a-z]{2,}[a-rt-z]s", word)
        for word in re.findall("[A-Za-z]+", words)
    )
