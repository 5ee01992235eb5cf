r"""Mathematics: 1 if the final answer equals the expected one as mathematics, 0 if not.

The final answer is what the last ``\boxed{...}``, ``<answer>...</answer>`` or ``####`` holds, else what follows "the
answer is", in any of many languages, else the last number or formula of the text. Texts are compared before
numbers, and those before formulas, which are left to math-verify.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlzoo.reward import register_reward
from rlzoo.rewards import _symbols
from rlzoo.rewards._answers import announced, first_value, last_value, marked
from rlzoo.rewards._numbers import (
    based,
    clock,
    comma_decimal,
    equal,
    number,
    ratio,
    same_in_base,
    same_ratio,
    same_time,
    unit_of,
)
from rlzoo.rewards._text import column_of, completion_text
from rlzoo.rewards._units import agree
from rlzoo.rewards._writing import bracketed, clean, compact, is_prose, split, words

_LONG = 100
"""Characters from which a gold answer in words is taken for a worked solution."""
_BLANKS = re.compile(r"[^\S\n]{3,}|\n{3,}")
_MOST = 50
"""Items of a list that are compared."""


@register_reward
@dataclass(frozen=True)
class MathAnswer:
    """1[answer = gold] up to the form of writing; None for a row without a gold answer.

    A gold answer is a number, LaTeX, words, a list of them, all of which are asked for, or a worked solution that
    ends as completions do. An answer with a percent sign equals the same number without one, and its hundredth.
    """

    name: ClassVar[str] = "math-answer"

    column: str = "answer"
    marked: bool = False
    """True: an answer must be in a box, a tag or after ``####``; the last number of rambling text does not count."""

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value for each completion. Raises UserError if the data lacks ``column``."""
        golds = column_of(columns, self.column, self.name)
        values = [_score(completion_text(c), gold, self.marked) for c, gold in zip(completions, golds, strict=True)]
        if None in values:
            first = values.index(None)
            told = f"{values.count(None)} of {len(values)} rows have no gold answer in column {self.column!r}"
            example = f"the first is row {first}, {golds[first]!r:.60}"
            warnings.warn(f"reward {self.name!r}: {told} and are worth None; {example}", UserWarning, stacklevel=2)
        return values


def _score(completion: str, gold: Any, must_be_marked: bool) -> float | None:
    expected = gold_answers(gold)
    if not expected:
        return None
    completion = _BLANKS.sub(lambda run: run[0][:2], completion)
    said = completion.rpartition("</think>")[2]
    for text in (said, completion) if said.strip() and said != completion else (completion,):
        answers = marked(text)
        if answers:
            return float(all(answers) and _all_equal(answers, expected))
        if not must_be_marked and (found := _unmarked(text, expected)) is not None:
            return float(found)
    return 0.0


def gold_answers(gold: Any) -> list[str]:
    """The answers that a row asks for, all of them; [] if there is none to compare with."""
    if hasattr(gold, "tolist"):  # numpy's arrays and numbers
        gold = gold.tolist()
    if isinstance(gold, Sequence) and not isinstance(gold, str):
        each = [gold_answers(one) for one in gold]
        return [answer for answers in each for answer in answers] if all(each) else []
    if gold is None or (isinstance(gold, float) and not math.isfinite(gold)):
        return []
    text = str(gold).strip()
    found = marked(text)
    if not found and (len(text) > _LONG or "\n" in text) and is_prose(clean(text)):  # a worked solution
        found = (announced(text) or [last_value(text) or text])[:1]
    return [answer for answer in found or [text] if clean(answer)]


def _unmarked(text: str, golds: list[str]) -> bool | None:
    """Whether a text without marks ends in the gold answers; None if it gives no answer at all."""
    wanted_words = all(is_prose(clean(gold)) and number(clean(gold)) is None for gold in golds)
    for clause in announced(text):
        if _all_equal([clause], golds):
            return True
        if not is_prose(clean(clause)) or number(clean(clause)) or wanted_words:
            return False
        value = first_value(clause)
        if value is not None:
            return _all_equal([value], golds)
    lines = text.strip().splitlines()
    if lines and (_all_equal([lines[-1]], golds) or not is_prose(clean(lines[-1]))):
        return _all_equal([lines[-1]], golds)
    value = last_value(text)
    if wanted_words and value and not is_prose(clean(value)):
        return None
    return None if value is None else _all_equal([value], golds)


# What is equal to what


def _all_equal(answers: list[str], golds: list[str]) -> bool:
    """Whether two lists hold the same answers, in any order: what is missing or superfluous makes them differ."""
    if len(answers) == len(golds) == 1:
        return _equal(clean(answers[0]), clean(golds[0]))
    kind, inside = bracketed(clean(golds[0])) or ("", "")
    if len(golds) == 1 and kind == "()":  # the coordinates of a point, each in a box
        return _same_items([clean(answer) for answer in answers], split(inside), ordered=True)
    return _same_items([i for a in answers for i in _items(a)], [i for g in golds for i in _items(g)], ordered=False)


def _items(text: str) -> list[str]:
    """The items of a list; a number with commas is one number."""
    text = clean(text)
    kind, inside = bracketed(text) or ("", text)
    return [text] if number(text) else split(inside if kind == "{}" else text)


def _same_items(answers: list[str], golds: list[str], ordered: bool) -> bool:
    if max(len(answers), len(golds)) > _MOST or not answers or not golds:
        return False
    (answers, given), (golds, wanted) = _unlabelled(answers), _unlabelled(golds)
    if ordered or given != wanted:  # values of x and y without their names: in their order
        return len(answers) == len(golds) and all(map(_equal, answers, golds))
    if {compact(a) for a in answers} == {compact(g) for g in golds}:
        return True
    asked = (
        [any(_equal(answer, gold) for answer in answers) for gold in golds] if len(answers) >= len(golds) else [False]
    )
    return all(asked) and all(any(_equal(answer, gold) for gold in golds) for answer in answers)


def _equal(answer: str, gold: str) -> bool:
    """Whether two clean texts are one answer: by text, as numbers, as words, item by item, and last as formulas."""
    answer, gold = _exact(answer), _exact(gold)
    if not answer or not gold:
        return False
    if compact(answer) == compact(gold) or (words(answer) == words(gold) != "" and is_prose(gold)):
        return True
    for read, same in ((number, equal), (clock, same_time), (ratio, same_ratio)):
        one, other = read(answer), read(gold)
        if one is not None and other is not None:
            return bool(same(one, other))  # type: ignore[operator]
    if "_" in answer + gold and (one := based(answer)) and (other := based(gold)):
        return same_in_base(one, other)
    given, asked = _choice(answer), _choice(gold)
    if given or asked:
        return _same_choice(given, asked, gold if given else answer)
    decimal, expected = comma_decimal(answer), number(gold)
    if decimal and expected and expected.decimal:
        return equal(decimal, expected)
    lists = _same_lists(answer, gold)
    if lists is not None:
        return lists
    values = _same_values(answer, gold)
    if values is not None:
        return values
    (answer, unit), (gold, unit_asked) = _without_unit(answer), _without_unit(gold)
    if is_prose(answer) or is_prose(gold):
        return False
    return agree(unit, unit_asked) and _symbols.equal(gold, answer)


_CHOICE = re.compile(
    r"(?:(?i:option|choice|选项) ?)?(?:\((?P<round>[A-J])\)|(?P<bare>[A-J])(?:[.):](?=\s|$)|$))(?:\s+(?P<value>(?!(?:or|and)\b|\\text\{\s*(?:or|and)\b|[-+*/^=<>,]).*))?",
    re.DOTALL,
)
_CHOICES = re.compile(r"(?<![A-Za-z\\])(?:\([A-J]\)|[A-J][.)](?=\s|$))|\b(?:or|and)\W+[A-J]\b")


def _choice(text: str) -> tuple[str, str] | None:
    """A letter of several, alone or before what it stands for: A, (A), A. 5; None for anything else."""
    match = _CHOICE.fullmatch(text)
    if match is None or _CHOICES.search(match["value"] or ""):
        return None
    return match["round"] or match["bare"], clean(match["value"] or "")


def _same_choice(one: tuple[str, str] | None, other: tuple[str, str] | None, text: str) -> bool:
    """Whether two choices are the same, or the value of the only one is the ``text`` that is none."""
    if one and other:
        return one[0] == other[0] and (not one[1] or not other[1] or _equal(one[1], other[1]))
    value = (one or other or ("", ""))[1]
    return value != "" and _equal(value, text)


def _same_lists(answer: str, gold: str) -> bool | None:
    """Whether two lists are equal: items in order within round or square brackets; None if neither is a list.

    A bare list may stand for a set or for a tuple. An interval may equal an inequality, which is for symbols to say.
    """
    (kind, given), (asked, wanted) = _listed(answer), _listed(gold)
    if len(given) <= 1 and len(wanted) <= 1:
        inside = [items[0] if brackets in ("()", "{}") and items else text
                  for brackets, items, text in ((kind, given, answer), (asked, wanted, gold))]  # fmt: skip
        return None if inside == [answer, gold] else _equal(*inside)
    if len(given) <= 1 or len(wanted) <= 1:
        (single, brackets), items = ((answer, asked), wanted) if len(given) <= 1 else ((gold, kind), given)
        if brackets not in ("", "{}") or _is_relation(single):
            return None
        return all(_equal(single, item) for item in items)  # one and the same answer, written twice
    if kind != asked and ((kind and asked) or (kind or asked) not in ("()", "{}")):
        return False
    return _same_items(given, wanted, ordered=(kind or asked) not in ("", "{}"))


def _listed(text: str) -> tuple[str, list[str]]:
    kind, inside = bracketed(text) or ("", text)
    return kind, [inside] if number(inside) else split(inside)  # the commas of a number list nothing


# Names for values: x = 5, f(x) = x^2, x \in (0, 1)

_EQUALS = re.compile(r"(?<![<>!:=\\])=(?!=)|\\in(?![A-Za-z])")
_RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|in|lt|gt|subset)(?![A-Za-z])")


def _is_relation(text: str) -> bool:
    return _RELATION.search(text) is not None


def _is_name(side: str) -> bool:
    """Whether a side of an equation names a value and does not compute one: x, f(2), a + b, |AB|, but not 2x."""
    bare = re.sub(r"_(?:\w|\{[^{}]*\})|(?<=[A-Za-z}'])\([^()]*\)", "", side)
    return re.search(r"[^\W\d_]", bare) is not None and re.search(r"[\d^]|\\infty", bare) is None


def _named(text: str) -> tuple[str, str] | None:
    """The name and the value of x = 5 or 5 = x; an empty name before the result of arithmetic, 5 + 3 = 8."""
    sides = split(text, _EQUALS)
    if len(sides) < 2:
        return None
    if _is_name(sides[0]):
        return sides[0], sides[-1]
    if len(sides) == 2 and _is_name(sides[1]):
        return sides[1], sides[0]
    if re.search(r"[^\W\d_]", re.sub(r"\\[A-Za-z]+", "", text)) is None:
        numbers = [number(side) for side in sides[-2:]]
        if all(numbers) and not _equal(*sides[-2:]):
            return None  # 3 = 4 is no arithmetic
        return "", sides[-1]
    return None


def _unlabelled(items: list[str]) -> tuple[list[str], bool]:
    """The items without a name that is that of all, n = 2, 3 or x = 1, x = 2; and whether they have different ones."""
    named = [_named(item) for item in items]
    names = {compact(one[0]) for one in named if one and one[0]}
    if len(names) == 1 and named[0]:
        return [one[1] if one else item for one, item in zip(named, items, strict=True)], False
    return items, len(names) > 1


def _same_values(answer: str, gold: str) -> bool | None:
    """Whether the values of two named answers are equal, or that of the only one; None if there is no name."""
    given, wanted = _named(answer), _named(gold)
    if given and wanted:
        if compact(given[0]) == compact(wanted[0]) or is_prose(given[0]) != is_prose(wanted[0]):
            return _equal(given[1], wanted[1])
        return None
    if given and not _is_relation(gold):
        return _equal(given[1], gold)
    if wanted and not _is_relation(answer):
        return _equal(answer, wanted[1])
    return None


def _exact(text: str) -> str:
    r"""What is said to be approximated: \sqrt{2} \approx 1.41; or the approximation, if that is of a name."""
    exact, _, rounded = text.partition(r"\approx")
    return rounded.strip() if not exact.strip() or (rounded and _is_name(exact)) else exact.strip()


_WITH_UNIT = re.compile(
    r"(?P<body>.*?[\w})\]!])\s*(?P<unit>(?:\\text\{[^{}\d]*\}|(?<=[\s\d})])[A-Za-z]{2,})"
    r"(?:\^\{?\d\}?|[\s/.]|\\text\{[^{}\d]*\}|[A-Za-z]{2,})*)",
    re.DOTALL,
)


def _without_unit(text: str) -> tuple[str, frozenset[str]]:
    r"""A formula and the unit after it: 3\sqrt{2} \text{ cm}."""
    match = _WITH_UNIT.fullmatch(text)
    unit = unit_of(match["unit"]) if match else None
    return (match["body"], unit) if match and unit else (text, frozenset())
