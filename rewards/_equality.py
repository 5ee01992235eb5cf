r"""Which answers are equal, whatever the form of writing: texts first, then numbers, lists and names, formulas last."""

from __future__ import annotations

import re
from itertools import pairwise
from math import gcd, perm

from rlzoo.rewards import _guards, _numbers, _symbols, _times, _units
from rlzoo.rewards._hedges import CONDITION
from rlzoo.rewards._languages import EITHER, MAYBE
from rlzoo.rewards._writing import bracketed, clean, compact, is_prose, split, words

_MOST = 50
"""Items of a list that are compared."""
_LONGEST = 2000
"""Characters beyond which answers are compared as texts."""


def all_equal(answers: list[str], golds: list[str]) -> bool:
    """Whether two lists hold the same answers, in any order: what is missing or superfluous makes them differ."""
    answers, golds = [clean(answer) for answer in answers], [clean(gold) for gold in golds]
    if any(_guards.too_deep(text) or len(text) > _LONGEST for text in (*answers, *golds)):
        return [compact(answer) for answer in answers] == [compact(gold) for gold in golds]
    if len(answers) == len(golds) == 1:
        return _equal(answers[0], golds[0])
    kind, inside = bracketed(golds[0]) or ("", "")
    if len(golds) == 1 and kind == "()":  # the coordinates of a point, each in a box
        return _same_items(answers, split(inside), ordered=True)
    return _same_items(_items(answers), _items(golds), ordered=False)


def _items(texts: list[str]) -> list[str]:
    listed = [_listed(text) for text in texts]
    each = [items if kind in ("", "{}") else [text] for (kind, items), text in zip(listed, texts, strict=True)]
    return [item for items in each for item in items]


def _equal(answer: str, gold: str) -> bool:
    """Whether two clean texts are one answer. Each step decides only what it can read."""
    answer, gold = _exact(answer, gold), _exact(gold, answer)
    if not answer or not gold:
        return False
    if compact(answer) == compact(gold) or (is_prose(gold) and words(answer) == words(gold) != ""):
        return True
    for step in (_same_quantity, _same_choice, _same_unions, _same_lists, _same_values):
        same = step(answer, gold)
        if same is not None:
            return same
    (answer, unit), (gold, wanted) = _without_unit(answer), _without_unit(gold)
    if is_prose(answer) or is_prose(gold):  # words that are not the same
        return False
    if _guards.has_both_cases(f"{answer} {gold}"):  # A + b and a + b
        return False
    return _units.ratio(unit, wanted) == 1 and _symbols.equal(gold, answer)


_BUILDER = re.compile(r"\\\{ ?[a-z](?: ?\\in ?(?:\\mathbb\{R\}|R))? ?(?:\||\\v?mid|\\vert|:) ?([^{}|]*)\\\}")


_FALLING = re.compile(r"([^<>=\\]+)(>|\\ge(?![a-z]))([^<>=\\]+)(>|\\ge(?![a-z]))([^<>=\\]+)")
_OUTWARD = re.compile(r"([\[\]])([^\[\]()]+,[^\[\]()]+)([\[\]])")
_COUNTED = re.compile(
    r"(?<![\w\\])(?:\{\})?(?:C\((\d+|[a-z]), ?(\d+|[a-z])\)|P\((\d+), ?(\d+)\)|[CPA]_\{?(\d+)\}?\^\{?(\d+)\}?"
    r"|[_^]?\{?(\d+)\}? ?[CP]_?\{?(\d+)\}?|\{?(\w+) ?\\choose ?(\w+)\}?)(?![\w(])"
)
"""How many ways there are to choose, C(5, 2), C_5^2, 5C2, and to choose in order: P(5, 2), A_5^2, 5P2."""


def _counted(match: re.Match[str]) -> str:
    n, k = filter(None, match.groups())
    if "C" in match[0] or r"\choose" in match[0]:
        return rf"\binom{{{n}}}{{{k}}}"
    return match[0] if len(n) > 3 or int(k) > int(n) else str(perm(int(n), int(k)))


_MATRIX = re.compile(r"[(\[]? ?\\begin\{([pbB]?matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\} ?[)\]]?", re.DOTALL)


def _as_list(matrix: re.Match[str], other: str) -> str:
    """A matrix as the list that it is compared with is written: [[1, 2], [3, 4]]; of one row or column also (1, 2)."""
    rows = [row.replace("&", ",") for row in matrix[2].split(r"\\") if row.strip()]
    closing = ")" if other[0] == "(" else "]"
    if re.match(r". ?[(\[]", other):
        rows = [f"{other[0]}{row}{closing}" for row in rows]
    elif len(rows) > 1 and "," in "".join(rows):
        return matrix[0]
    return f"{other[0]}{', '.join(rows)}{closing}"


def _exact(text: str, other: str) -> str:
    r"""What is said to be approximated: \sqrt{2} \approx 1.41; or the approximation, if that is of a name.

    Of a set of numbers, \{x | x > 2\}, its condition; 2 > x > 1 upwards; ]1, 2[ as (1, 2); C(5, 2) as \binom{5}{2}, if
    that is no point; a matrix as a list, if the other answer is one.
    """
    if (matrix := _MATRIX.fullmatch(text)) and re.match(r"[(\[](?! ?\\begin)", other):
        text = clean(_as_list(matrix, other))
    if "," not in other:
        text = _COUNTED.sub(_counted, text)
    if builder := _BUILDER.fullmatch(text):
        text = builder[1].strip()
    if falling := _FALLING.fullmatch(text):
        text = " ".join(falling[part].replace(">", "<").replace(r"\ge", r"\le") for part in (5, 4, 3, 2, 1))
    if outward := _OUTWARD.fullmatch(text):
        text = f"{outward[1].replace(']', '(')}{outward[2]}{outward[3].replace('[', ')')}"
    if words(text) in ("all real numbers", "all reals"):
        return r"\mathbb{R}"
    exact, _, rounded = text.partition(r"\approx")
    return rounded.strip() if not exact.strip() or (rounded and _is_name(exact)) else exact.strip()


# Quantities


def _same_quantity(answer: str, gold: str) -> bool | None:
    """Numbers, times of the day, ratios, and numbers in a base; None unless both are the same kind of these."""
    one, other = _numbers.number(answer), _numbers.number(gold)
    if one and other:
        return _numbers.equal(one, other)
    if other and (other.decimal or answer.endswith(",00")) and (comma := _numbers.comma_decimal(answer)):
        return _numbers.equal(comma, other)
    if (time := _times.clock(answer)) and (expected := _times.clock(gold)):
        return _times.same_time(time, expected)
    if (day := _times.date(answer)) and (asked_for := _times.date(gold)):
        return _times.same_date(day, asked_for)
    if (one or other) and any(map(_is_time_only, (answer, gold))):
        return False
    if ":" in answer + gold and (given := _numbers.ratio(answer)) and (wanted := _numbers.ratio(gold)):
        return _numbers.same_ratio(given, wanted)
    if "_" in answer + gold and (digits := _numbers.based(answer)) and (asked := _numbers.based(gold)):
        return _numbers.same_in_base(digits, asked)
    return None


def _is_time_only(text: str) -> bool:
    """Whether a text with a colon is a time of the day and no ratio in lowest terms: 10:30, but not 1:10."""
    terms = _numbers.ratio(text) if _times.clock(text) else []
    return terms is None or (len(terms) > 1 and gcd(*(int(term) for term in terms)) != 1)


# Letters of a multiple choice: A, (A), A. 5

_CHOICE = re.compile(
    r"(?:(?i:option|choice|故?选[项择]?) ?)?(?:\((?P<round>[A-Ja-j])\)|(?P<half>[A-Ja-j])\)(?=\s|$)|"
    r"(?P<bare>[A-J])(?: ?[.):](?=\s|$)|$))"
    r"(?:\s+(?P<value>(?!(?:or|and)\b|\\text\{\s*(?:or|and)\b|[-+*/^=<>,]).*))?",
    re.DOTALL,
)
_LETTERS = re.compile(r"\s*[A-H](?:([\s,;]+(?:and\s+)?)?[A-H])+\s*")
"""Several choices: ABD, or A, B and D."""
_CHOICES = re.compile(r"(?<![A-Za-z\\])(?:\([A-Ja-j]\)|[A-J][.)](?=\s|$))|\b(?:or|and)\W+[A-J]\b")


_NO_VALUE = re.compile(rf"{EITHER}|{MAYBE}|(?:an)?other\b|(?-i:[A-J])$", re.IGNORECASE)
"""What follows a letter and is no value of it, but another choice."""


def choice(text: str) -> tuple[str, str] | None:
    """A letter, and what it stands for or an empty text; None for anything else."""
    match = _CHOICE.fullmatch(text)
    if match is None or _CHOICES.search(match["value"] or "") or _NO_VALUE.match(match["value"] or ""):
        return None
    return (match["round"] or match["half"] or match["bare"]).upper(), clean(match["value"] or "")


def _same_choice(answer: str, gold: str) -> bool | None:
    """The same letter and, where both give one, the same value; or the value of the only one that has a letter."""
    one, other = choice(answer), choice(gold)
    given, wanted = (_LETTERS.fullmatch(re.sub(r"\\text|[{}]", " ", text)) for text in (answer, gold))
    if given and wanted and bool(given[1]) != bool(wanted[1]):
        return sorted(re.findall("[A-H]", given[0])) == sorted(re.findall("[A-H]", wanted[0]))
    if one and other:
        return one[0] == other[0] and (not one[1] or not other[1] or _equal(one[1], other[1]))
    if len(answer) == len(gold) == 1:  # of one case only, as math-verify would have it
        return False
    if one and one[1]:
        return _equal(one[1], gold)
    return _equal(answer, other[1]) if other and other[1] else None


# Lists: 1, 2 and 3; (1, 2); \{1, 2\}


_ELEMENT = re.compile(r"[A-Za-z] ?\\in ?(?=\\\{)")
_OR = re.compile(r"\\(?:cup|lor|vee)(?![A-Za-z])|(?<![^\W\d_\\])or(?![^\W\d_])")


def _same_unions(answer: str, gold: str) -> bool | None:
    r"""Intervals \cup others, and inequalities with "or" between; None for all else."""
    if sum(r"\cup" in text for text in (answer, gold)) != 1:
        return None
    given, wanted = (split(re.sub(r"\\text\{\s*or\s*\}", " or ", text), _OR) for text in (answer, gold))
    if len(given) != len(wanted) or len(given) < 2:
        return None
    return _same_items(given, wanted, ordered=False)


def _same_lists(answer: str, gold: str) -> bool | None:
    """Lists of equal items, in order within round or square brackets; None if neither is a list.

    A bare list may stand for a set or for a tuple. An interval may equal an inequality, which is for formulas.
    """
    (kind, given), (asked, wanted) = _listed(answer), _listed(gold)
    if len(given) <= 1 and len(wanted) <= 1:
        inside = _alone(answer, kind, given), _alone(gold, asked, wanted)
        return None if inside == (answer, gold) else _equal(*inside)
    if len(given) <= 1 or len(wanted) <= 1:
        single, brackets, items = (answer, asked, wanted) if len(given) <= 1 else (gold, kind, given)
        if brackets not in ("", "{}") or _RELATION.search(single):
            return None
        return not _without_name(items)[1] and all(_equal(single, item) for item in items)  # one answer, written twice
    if kind != asked and ((kind and asked) or ((kind or asked) not in ("()", "{}", "[]"))):
        return False
    if kind != asked and (kind or asked) == "[]" and len(wanted) == 2:  # an interval
        return False
    return _same_items(given, wanted, ordered=(kind or asked) not in ("", "{}"))


def _listed(text: str) -> tuple[str, list[str]]:
    """The kind of the brackets around a text, and the items in it."""
    set_of = _ELEMENT.match(text)
    kind, inside = bracketed(text[set_of.end() :] if set_of else text) or ("", text)
    if _numbers.number(inside):  # its commas list nothing
        return kind, [inside]
    return kind, split(inside)


def _alone(text: str, kind: str, items: list[str]) -> str:
    """The only item in parentheses, or of a set."""
    return items[0] if kind in ("()", "{}") and items else text


def _same_items(answers: list[str], golds: list[str], ordered: bool) -> bool:
    if max(len(answers), len(golds)) > _MOST or not answers or not golds:
        return False
    (answers, given), (golds, wanted) = _without_name(answers), _without_name(golds)
    if ordered or given != wanted:  # values of x and y without their names: in their order
        return len(answers) == len(golds) and all(map(_equal, answers, golds))
    if {compact(answer) for answer in answers} == {compact(gold) for gold in golds}:
        return True
    return all(any(_equal(answer, gold) for answer in answers) for gold in golds) and all(
        any(_equal(answer, gold) for gold in golds) for answer in answers
    )


def _without_name(items: list[str]) -> tuple[list[str], bool]:
    """The items without a name that all share, n = 2, 3 or x = 1, x = 2; and whether their names are different."""
    named = [_named(item) for item in items]
    names = {compact(one[0]) for one in named if one and one[0]}
    if len(names) == 1 and named[0]:
        return [one[1] if one else item for one, item in zip(named, items, strict=True)], False
    return items, len(names) > 1


# Names for values: x = 5, f(x) = x^2, x \in (0, 1), P(3, 4)

_EQUALS = re.compile(r"(?<![<>!:=\\])=(?!=)|\\in(?![A-Za-z])")
_POINT = re.compile(r"([A-Z]'?) ?(\([^()]*,[^()]*\))")
_RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|in|lt|gt|subset)(?![A-Za-z])")


def _same_values(answer: str, gold: str) -> bool | None:
    """The values of two answers of one name, or of the only one that has a name; None where that says nothing."""
    if _contradicts_itself(answer):
        return False
    given, wanted = _named(answer), _named(gold)
    if given and wanted:
        in_words = is_prose(given[0]) != is_prose(wanted[0])  # Area = 5 and A = 5
        one, other = (re.sub(r"[a-z]\(x\)", "y", compact(name).casefold()) for name, _ in (given, wanted))
        return _equal(given[1], wanted[1]) if in_words or one == other else None
    if given and not _RELATION.search(gold):
        return _equal(given[1], gold)
    if wanted and not _RELATION.search(answer):
        return _equal(answer, wanted[1])
    if len(sides := split(answer, _EQUALS)) > 1 and not _RELATION.search(gold):  # an identity
        return all(_equal(side, gold) for side in sides)
    return None


def _named(text: str) -> tuple[str, str] | None:
    """The name and the value of x = 5 or 5 = x; an empty name before the result of arithmetic, 5 + 3 = 8."""
    if point := _POINT.fullmatch(text):
        return point[1], point[2]
    sides = split(text, _EQUALS)
    if len(sides) < 2:
        return None
    if _is_name(sides[0]):
        return sides[0], sides[-1]
    if len(sides) == 2 and _is_name(sides[1]):
        return sides[1], sides[0]
    computed = "".join(sides[:-1]) if _numbers.number(sides[-1]) else text  # = 12 apples
    return None if re.search(r"[^\W\d_]", re.sub(r"\\[A-Za-z]+", "", computed)) else ("", sides[-1])


def _contradicts_itself(text: str) -> bool:
    """Whether an equation gives different numbers, one of which could be the answer: 3 = 4, x = 3 = 4."""
    read = [_numbers.number(side) for side in split(text, _EQUALS)]
    return any(one and other and not _numbers.equal(one, other) for one, other in pairwise(read))


def _is_name(side: str) -> bool:
    """Whether a side of an equation names a value and does not compute one: x, f(2), a + b, |AB|, but not 2x."""
    bare = re.sub(r"_(?:\w|\{[^{}]*\})|(?<=[A-Za-z}'])\([^()]*\)", "", side)
    if CONDITION.search(side):  # if x = 5
        return False
    return re.search(r"[^\W\d_]", bare) is not None and re.search(r"[\d^]|\\infty", bare) is None


# Units after formulas: 3\sqrt{2} \text{ cm}

_WITH_UNIT = re.compile(
    r"(?P<body>.*?[\w})\]!])\s*(?P<unit>(?:\\text\{[^{}\d]*\}|(?<=[\s\d})])[A-Za-z]{2,}+)"
    r"(?:\^\{?\d\}?|[\s/.]|\\text\{[^{}\d]*\}|[A-Za-z]{2,}+)*)",
    re.DOTALL,
)


def _without_unit(text: str) -> tuple[str, frozenset[str]]:
    match = _WITH_UNIT.fullmatch(text)
    measured = match is not None and re.search(r"[\d\\^+*/-]", match["body"])  # A student: no A in students
    unit = _numbers.unit_of(match["unit"]) if match and measured else None
    return (match["body"], unit) if match and unit else (text, frozenset())
