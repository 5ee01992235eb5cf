"""Problems and a small base model that ship with the package, so that everything works with no network."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from rlzoo.errors import unknown
from rlzoo.worlds import arithmetic, facts

if TYPE_CHECKING:
    from rlzoo.problems import Problem

WORLD_PREFIX = "world:"
EMBEDDED_BASE = Path(__file__).parent / "base"
"""The folder of the base model; made by `rlzoo.worlds.recipe`."""

WORLDS = {
    "arithmetic": tuple(arithmetic.SPLITS),
    "facts": ("train", "validation", "test", "unseen"),
    "both": ("train", "validation", "test"),
}


def world_problems(name: str) -> list[Problem]:
    """The problems of ``arithmetic/train``, ``facts/test``, ….

    A training problem of ``arithmetic`` carries a worked solution in each style, a fact its one answer. ``both`` takes
    them from the two worlds in turn.
    """
    from rlzoo.problems import Problem

    world, _, split = name.partition("/")
    if world == "both" and split in WORLDS["both"]:
        pairs = zip_longest(*(world_problems(f"{one}/{split}") for one in ("arithmetic", "facts")))
        return [problem for pair in pairs for problem in pair if problem is not None]
    if split not in WORLDS.get(world, ()):
        raise unknown("world", name, [f"{w}/{s}" for w, splits in WORLDS.items() for s in splits])
    if world == "arithmetic":
        return [
            Problem(
                id,
                p.question,
                {"answer": str(p.answer), "terms": len(p.numbers)},
                tuple(arithmetic.solve(p, s) for s in arithmetic.STYLES),
            )
            for id, p in arithmetic.problems(split)
        ]
    return [Problem(id, q, {"answer": fact.answer}, (fact.answer,)) for id, fact, q in facts.questions(split)]
