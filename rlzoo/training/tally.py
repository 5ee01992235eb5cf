"""Counts of drawn data that teaches nothing: groups of one, groups of equal rewards, batches, rows left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from jaxtyping import Bool
from torch import Tensor

from rlzoo.objective import Component
from rlzoo.training.batches import Drawn, Source
from rlzoo.types import Unit, selector_of

LINES = (
    ("single", "groups", "groups drawn have one sample and nothing to compare it with, so they teach nothing: "
     "sample more per prompt (rollouts.samples)"),
    ("flat", "groups", "groups drawn have equal rewards and teach nothing"),
    ("silent", "batches", "batches have no advantage other than 0: nothing is learned from their rewards"),
    ("masked", "rows", "completions drawn are truncated and masked"),
)  # fmt: skip
"""The count that a line reports, the count it is part of, and the text."""
Counts = dict[str, dict[str, int]]
"""Name of a component → what is counted → count."""


def teaches(drawn: Drawn) -> Bool[Tensor, " B"]:
    """Whether each row of a prepared batch has a token that is learned from.

    Such a token is not masked and, where an objective has advantages, has one other than 0.
    """
    mask, advantage = drawn.batch.mask, drawn.batch.advantage
    return (mask if advantage is None else mask & (advantage != 0)).any(1)


def count(counts: Counts, drawn: Drawn, teaches: Sequence[bool]) -> None:
    """Add a prepared batch to the counts of its component.

    A group of one or of equal rewards is counted where none of its rows ``teaches``: what gives such groups advantages,
    as a critic does, learns from them.
    """
    objective = drawn.component.objective
    found = Counter(counts.get(name_of(drawn.component), {}))
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
    counts[name_of(drawn.component)] = dict(found)


def told(counts: Counts, components: Sequence[Component], sources: Sequence[Source]) -> list[str]:
    """One line per kind of data that taught nothing, with its count over the whole training; none for a count of 0."""
    lines = []
    for component, source in zip(components, sources, strict=True):
        name, own = name_of(component), counts.get(name_of(component), {})
        for some, whole, line in LINES:
            if found := own.get(some, 0):
                share = f"all {found:,}" if found == own[whole] > 1 else f"{found:,} of {own[whole]:,}"
                lines.append(f"{name}: {share} {line}")
        left_out: Mapping[str, int] = getattr(source, "left_out", {})
        lines += [f"{name}: left out {number:,} {what}" for what, number in left_out.items()]
    return lines


def name_of(component: Component) -> str:
    """The name of a component in its lines."""
    return component.label or component.objective.name
