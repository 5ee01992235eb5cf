"""Chain sums with worked solutions: the built-in task with many valid derivations.

A problem is ``17+25-8=?``; a worked solution rewrites it, lists intermediate results, or phrases it in words, and ends
with ``#### 34``. All three styles are correct, so a demonstration is one of many valid solutions: the regime in which
the DFT paper (arXiv 2508.05629) reports gains of DFT over SFT.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

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


def problems(split: str) -> Iterator[tuple[str, ChainSum]]:
    """The problems of a split with their ids; the same on every machine, and disjoint between splits."""
    taken: set[ChainSum] = set()
    for name, (count, terms, largest, seed) in SPLITS.items():
        rng = random.Random(seed)
        mine: list[ChainSum] = []
        while len(mine) < count:
            problem = draw(rng, rng.choice(terms), largest)
            if problem not in taken:
                taken.add(problem)
                mine.append(problem)
        if name == split:
            yield from ((f"arithmetic-{split}-{i}", problem) for i, problem in enumerate(mine))
            return
