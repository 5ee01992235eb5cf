"""Counts of drawn data without a gradient: groups of one or of equal rewards, batches, masked and left-out rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from jaxtyping import Bool
from torch import Tensor

from rlzoo.objective import Component
from rlzoo.training.batches import Drawn, Source
from rlzoo.types import Unit, selector_of

LINES = (
    ("single", "groups", "groups drawn have a single sample and therefore no gradient: "
     "sample more per prompt (rollouts.samples)"),
    ("flat", "groups", "groups drawn have equal rewards and therefore no gradient"),
    ("silent", "batches", "batches have no nonzero advantage: their rewards give no gradient"),
    ("masked", "rows", "completions drawn are truncated and masked"),
)  # fmt: skip
"""The count that a line reports, the total that it is a part of, and the text."""
Counts = dict[str, dict[str, int]]
"""Name of a component → what is counted → count."""


def with_gradient(drawn: Drawn) -> Bool[Tensor, " B"]:
    """Whether each row [B] of a prepared batch has a gradient.

    It has one if any of its tokens is neither masked nor, for an objective with advantages, has advantage 0.
    """
    mask, advantage = drawn.batch.mask, drawn.batch.advantage
    return (mask if advantage is None else mask & (advantage != 0)).any(1)


def tallied(counts: Counts | None, drawn: Drawn, has_gradient: Sequence[bool]) -> dict[str, float]:
    """`count` a prepared batch, unless ``counts`` is None, and return the metrics of a step that follow from it.

    ``zero_advantage``, for an objective with advantages: the fraction of units, such as groups, without a gradient.
    """
    if counts is not None:
        count(counts, drawn, has_gradient)
    if drawn.batch.advantage is None or not drawn.units:
        return {}
    silent = sum(not any(has_gradient[row] for row in unit) for unit in drawn.units)
    return {"zero_advantage": silent / len(drawn.units)}


def count(counts: Counts, drawn: Drawn, has_gradient: Sequence[bool]) -> None:
    """Add a prepared batch to the counts of its component; ``has_gradient`` is that of `with_gradient`, per row.

    A group of one or of equal rewards counts only if none of its rows has a gradient: a critic, for instance, gives
    such groups nonzero advantages.
    """
    objective = drawn.component.objective
    found = Counter(counts.get(name_of(drawn.component), {}))
    found["batches"] += 1
    found["silent"] += not any(has_gradient)
    if objective.truncated == "mask":
        found["rows"] += len(drawn.rows)
        found["masked"] += sum(row.truncated for row in drawn.rows)
    if selector_of(objective.learns_from).unit is Unit.GROUP:
        found["groups"] += len(drawn.units)
        for unit in drawn.units:
            if not any(has_gradient[row] for row in unit):
                found["single"] += len(unit) == 1
                found["flat"] += len(unit) > 1 and len({drawn.rows[row].reward for row in unit}) == 1
    counts[name_of(drawn.component)] = dict(found)


def lines_of(counts: Counts, components: Sequence[Component], sources: Sequence[Source]) -> list[str]:
    """One line per kind of data without a gradient, with its count over all of training; none for a count of 0."""
    lines = []
    for component, source in zip(components, sources, strict=True):
        name, own = name_of(component), counts.get(name_of(component), {})
        for kind, whole, line in LINES:
            if found := own.get(kind, 0):
                share = f"all {found:,}" if found == own[whole] > 1 else f"{found:,} of {own[whole]:,}"
                lines.append(f"{name}: {share} {line}")
        left_out: Mapping[str, int] = getattr(source, "left_out", {})
        lines += [f"{name}: left out {number:,} {what}" for what, number in left_out.items()]
    return lines


def name_of(component: Component) -> str:
    """The name of a component in counts and lines."""
    return component.label or component.objective.name
