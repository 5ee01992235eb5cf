"""Chain sums with worked solutions: the built-in task with many valid derivations.

A problem is ``17+25-8=?``; a worked solution rewrites it, lists intermediate results, or phrases it in words, and ends
with ``#### 34``. All three styles are correct, so a demonstration is one of many valid solutions: the regime in which
the DFT paper (arXiv 2508.05629) reports gains of DFT over SFT. Options of a split, as in
``arithmetic/train?terms=2,4&styles=words``, change how hard its problems are and how they are demonstrated: see
`Variant`.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from rlzoo.errors import UserError, unknown

STYLES = ("rewriting", "running", "words")
FORMS = {
    "rewriting": r"(=-?\d+([+-]\d+)*)+",
    "running": r"-?\d+[+-]\d+=-?\d+(;-?\d+[+-]\d+=-?\d+)*",
    "words": r"start \d+( (plus|minus) \d+ makes -?\d+)+",
}
"""The form of a worked solution in each of `STYLES`, without its answer."""
SPLITS = {
    # name: (number of problems, terms, largest term, seed). Splits are disjoint: see `problems`.
    "test": (200, (3,), 99, 11),
    "longer": (200, (4,), 99, 12),
    "validation": (100, (3,), 99, 13),
    "train": (4000, (2, 3), 99, 14),
}
SHARES = ("test", "longer", "validation", "train", "train", "train", "train", "train")
"""The split that a problem may belong to where `Variant` changes the problems, by its hash."""
FRUITLESS = 2000
"""The number of draws without a new problem after which a split has all that there are."""


@dataclass(frozen=True)
class Variant:
    """The options of a split, in a name such as ``arithmetic/train?terms=2,4&largest=20&styles=words&solutions=1``."""

    terms: tuple[int, ...] | None = None
    """The numbers of terms, 2 to 9; each is equally frequent. None: those of the split."""
    largest: int | None = None
    """The largest term, 1 to 999; None: 99."""
    styles: tuple[str, ...] = STYLES
    """The styles of worked solutions."""
    solutions: int | None = None
    """The number of worked solutions per problem, whose styles alternate from problem to problem; None: one in each of
    the styles."""

    def styles_of(self, index: int) -> tuple[str, ...]:
        """The styles in which the problem with this index is solved."""
        if self.solutions is None:
            return self.styles
        return tuple(self.styles[(index + i) % len(self.styles)] for i in range(self.solutions))


def variant(options: str) -> Variant:
    """The options in the part of a name after the question mark. Raises UserError for a wrong one."""
    found: dict[str, str] = {}
    for option in options.split("&") if options else ():
        name, _, value = option.partition("=")
        if name not in Variant.__dataclass_fields__:
            raise unknown("option of arithmetic", name, Variant.__dataclass_fields__)
        if name in found:
            raise UserError(f"the option {name} of arithmetic is given twice: give it once")
        found[name] = value
    styles, terms = (tuple(found[name].split(",")) if name in found else None for name in ("styles", "terms"))
    for name, several in (("styles", styles or ()), ("terms", terms or ())):
        if len(set(several)) < len(several):
            raise UserError(f"the option {name} of arithmetic repeats a value: {found[name]}")
    for style in styles or ():
        if style not in STYLES:
            raise unknown("style of arithmetic", style, STYLES)
    return Variant(
        None if terms is None else tuple(_number("terms", number, 2, 9) for number in terms),
        _number("largest", found["largest"], 1, 999) if "largest" in found else None,
        styles or STYLES,
        _number("solutions", found["solutions"], 1, len(styles or STYLES)) if "solutions" in found else None,
    )


def _number(name: str, text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise UserError(f"the option {name} of arithmetic is a whole number from {low} to {high}, not {text!r}")
    return int(text)


@dataclass(frozen=True, slots=True)
class ChainSum:
    """``numbers[0] ± numbers[1] ± …`` with one sign (+1 or -1) for each number after the first."""

    numbers: tuple[int, ...]
    signs: tuple[int, ...]

    @property
    def question(self) -> str:
        """The prompt."""
        return f"{self.expression()}=?\n"

    @property
    def answer(self) -> int:
        """The value of the sum."""
        return self.numbers[0] + sum(sign * number for sign, number in zip(self.signs, self.numbers[1:], strict=True))

    def expression(self, start: int | None = None, done: int = 0) -> str:
        """The rest of the sum after ``done`` operations with the result ``start``; None: the first number."""
        head = str(self.numbers[0] if start is None else start)
        rest = zip(self.signs[done:], self.numbers[done + 1 :], strict=True)
        return head + "".join(f"{'+' if sign > 0 else '-'}{number}" for sign, number in rest)


def draw(rng: random.Random, terms: int, largest: int) -> ChainSum:
    """A random chain of ``terms`` numbers in 1..``largest`` whose intermediate results are never negative."""
    numbers = [rng.randint(1, largest)]
    signs: list[int] = []
    total = numbers[0]
    for _ in range(terms - 1):
        number = rng.randint(1, largest)
        sign = 1 if number > total else rng.choice((1, -1))
        total += sign * number
        numbers.append(number)
        signs.append(sign)
    return ChainSum(tuple(numbers), tuple(signs))


def _slip(rng: random.Random, result: int) -> int:
    """A plausible wrong result: off by 1, 2, 10 or 20, and never negative."""
    wrong = result + rng.choice((-20, -10, -2, -1, 1, 2, 10, 20))
    return wrong if wrong >= 0 else result + 1


def solve(problem: ChainSum, style: str, rng: random.Random | None = None, slip_rate: float = 0.0) -> str:
    """A worked solution in one of `STYLES`; each result is wrong with probability ``slip_rate``, and carried forward.

    Raises ValueError for an unknown style.
    """
    results: list[int] = []
    total = problem.numbers[0]
    for sign, number in zip(problem.signs, problem.numbers[1:], strict=True):
        total += sign * number
        if rng is not None and rng.random() < slip_rate:
            total = _slip(rng, total)
        total = max(total, 0)
        results.append(total)
    if style == "rewriting":
        worked = "=".join(problem.expression(result, done) for done, result in enumerate(results, 1))
        return f"={worked}\n#### {results[-1]}"
    starts = [problem.numbers[0], *results[:-1]]
    steps = list(zip(starts, problem.signs, problem.numbers[1:], results, strict=True))
    if style == "running":
        worked = ";".join(
            f"{start}{'+' if sign > 0 else '-'}{number}={result}" for start, sign, number, result in steps
        )
        return f"{worked}\n#### {results[-1]}"
    if style == "words":
        worked = "".join(f"{' plus ' if s > 0 else ' minus '}{number} makes {result}" for _, s, number, result in steps)
        return f"start {problem.numbers[0]}{worked}\n#### {results[-1]}"
    raise ValueError(f"unknown style {style!r}; known: {', '.join(STYLES)}")


def style_of(text: str) -> str | None:
    """The style of a worked solution, right or wrong, by its form; None if it has none of `STYLES` throughout."""
    worked = text.partition("\n####")[0]
    return next((style for style, form in FORMS.items() if re.fullmatch(form, worked)), None)


def problems(split: str, options: Variant = Variant()) -> Iterator[tuple[str, ChainSum]]:
    """The problems of a split with their ids; the same on every machine, and disjoint between splits, whatever their
    options.

    Options that change the problems are part of the ids. There are then fewer problems than in the split without
    options if no others exist.
    """
    count, terms, largest, seed = SPLITS[split]
    asked = options.terms or terms, options.largest or largest
    made, mark = _without_options()[split], ""
    if asked != (terms, largest):
        made = _drawn(split, count, *asked, seed)
        mark = f"?terms={','.join(map(str, asked[0]))}&largest={asked[1]}"
    yield from ((f"arithmetic-{split}{mark}-{i}", problem) for i, problem in enumerate(made))


@cache
def _without_options() -> dict[str, Sequence[ChainSum]]:
    """The problems of each split without options: those of earlier splits are left out."""
    taken: set[ChainSum] = set()
    found: dict[str, Sequence[ChainSum]] = {}
    for name, (count, terms, largest, seed) in SPLITS.items():
        rng = random.Random(seed)
        mine: list[ChainSum] = []
        while len(mine) < count:
            problem = draw(rng, rng.choice(terms), largest)
            if problem not in taken:
                taken.add(problem)
                mine.append(problem)
        found[name] = mine
    return found


def _drawn(split: str, count: int, terms: Sequence[int], largest: int, seed: int) -> list[ChainSum]:
    """At most ``count`` problems whose hash assigns them to the split, and that no split has without options."""
    taken = {problem for name, some in _without_options().items() if name != split for problem in some}
    rng, mine, fruitless = random.Random(seed), list[ChainSum](), 0
    while len(mine) < count and fruitless < FRUITLESS:
        problem = draw(rng, rng.choice(terms), largest)
        fruitless += 1
        place = hashlib.sha256(problem.question.encode()).digest()[0] % len(SHARES)
        if problem not in taken and SHARES[place] == split:
            taken.add(problem)
            mine.append(problem)
            fruitless = 0
    return mine
