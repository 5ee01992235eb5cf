"""What a run drew and could not learn from: groups of one, groups of equal rewards, whole batches, rows left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from jaxtyping import Bool
from torch import Tensor

from rlzoo.objective import Part
from rlzoo.training.batches import Drawn, Source
from rlzoo.types import Unit, selector_of

LINES = (
    ("single", "groups", "groups drawn have one sample and nothing to compare it with, so they teach nothing: "
     "sample more per prompt (rollouts.samples)"),
    ("flat", "groups", "groups drawn have equal rewards and teach nothing"),
    ("silent", "batches", "batches have no advantage other than 0: nothing is learned from their rewards"),
    ("masked", "rows", "completions drawn are truncated and masked"),
)  # fmt: skip
"""The count that a line reports, out of which other count, and what it says."""
Counts = dict[str, dict[str, int]]
"""By the name of a part, then by what is counted."""


def teaches(drawn: Drawn) -> Bool[Tensor, " B"]:
    """Whether each row of a prepared batch has a token that is learned from.

    Such a token is not masked and, where an objective has advantages, has one other than 0.
    """
    mask, advantage = drawn.batch.mask, drawn.batch.advantage
    return (mask if advantage is None else mask & (advantage != 0)).any(1)


def count(counts: Counts, drawn: Drawn, teaches: Sequence[bool]) -> None:
    """Add a prepared batch to the counts of its part.

    A group of one or of equal rewards is counted where none of its rows ``teaches``: what gives such groups advantages,
    as a critic does, learns from them.
    """
    objective = drawn.part.objective
    found = Counter(counts.get(name_of(drawn.part), {}))
    found["batches"] += 1
    found["silent"] += not any(teaches)
    if objective.truncated == "mask":
        found["rows"] += len(drawn.rows)
        found["masked"] += sum(row.truncated for row in drawn.rows)
    if selector_of(objective.learns_from).unit is Unit.GROUP:
        found["groups"] += len(drawn.units)
        for unit in drawn.units:
            if not any(teaches[row] for row in unit):
                found["single"] += len(unit) == 1
                found["flat"] += len(unit) > 1 and len({drawn.rows[row].reward for row in unit}) == 1
    counts[name_of(drawn.part)] = dict(found)


def told(counts: Counts, parts: Sequence[Part], sources: Sequence[Source]) -> list[str]:
    """A line for each kind of what could not be learned from, with its count over the whole run; none for a 0."""
    lines = []
    for part, source in zip(parts, sources, strict=True):
        name, own = name_of(part), counts.get(name_of(part), {})
        for some, whole, line in LINES:
            if found := own.get(some, 0):
                share = f"all {found:,}" if found == own[whole] > 1 else f"{found:,} of {own[whole]:,}"
                lines.append(f"{name}: {share} {line}")
        left_out: Mapping[str, int] = getattr(source, "left_out", {})
        lines += [f"{name}: left out {number:,} {what}" for what, number in left_out.items()]
    return lines


def name_of(part: Part) -> str:
    """How a part is called in its lines."""
    return part.label or part.objective.name
