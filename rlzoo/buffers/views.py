"""Views over a buffer: which rows an objective learns from, which of them belong together, and with which weights."""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from rlzoo.buffers.selectors import rewards
from rlzoo.errors import EmptyViewError, UserError, unknown
from rlzoo.objective import Objective, is_composite, view_of
from rlzoo.registry import one_line
from rlzoo.types import Selector, Unit, Units, WhichView, builtin, name_of_view, selector_of

COUNTS = ("per_prompt", "size")
"""Options that count rows."""
TRUNCATED, FLAT = "truncated completions", "groups of equal rewards"
"""What options may leave out of a view."""
KEPT_OPTIONS = ("weighted", "truncated", "varied")
"""Options of a view that another view in its place keeps: they say what to draw, not what the view is."""
_KINDS = {Unit.ROW: "single rows", Unit.PAIR: "pairs", Unit.GROUP: "groups"}


@dataclass(frozen=True)
class View:
    """The part of a buffer that an objective learns from."""

    selection: WhichView
    """The view that was requested."""
    units: Units
    """Row indices per unit: one row, (better, worse), or all samples of one prompt."""
    weights: tuple[float, ...] | None = None
    """A weight per unit, for drawing with replacement; None: each unit is drawn once per epoch."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """How much the options left out of the view: `TRUNCATED` rows, `FLAT` groups."""

    def __len__(self) -> int:
        return len(self.units)


def select(
    rows: pa.Table, which: WhichView, options: Mapping[str, Any], release: Callable[[], None] | None = None
) -> View:
    """The view of ``rows``. Raises UserError for an unknown option, an empty view, and invalid units or weights.

    A view of rows to imitate may be ``weighted``: its weights are the rows' rewards, as quality scores.
    ``truncated="drop"`` leaves truncated rows out of any view, before anything else is selected. ``release`` is called
    repeatedly while texts are read, to release their memory.
    """
    selector = selector_of(which)
    check_options(selector, options)
    options = dict(options)
    weighted = selector.is_imitated and bool(options.pop("weighted", False))
    if "release" in inspect.signature(selector.units).parameters:
        options["release"] = release
    units = _units(selector, rows, options)
    left_out = _left_out(rows, selector, options, units)
    weights = _quality(rows, units) if weighted else _weights(selector, rows, units)
    return View(which, units, weights, left_out)


def check_options(selector: Selector, options: Mapping[str, Any]) -> None:
    """Raise UserError for an unknown option of a view, or an invalid value."""
    known = [name for name in inspect.signature(selector.units).parameters if name not in ("rows", "release")]
    known += ["weighted"] if selector.is_imitated else []
    for name, value in options.items():
        if name not in known:
            raise unknown(f"option of the view {selector.name!r}", name, known)
        if name == "truncated":
            if value not in ("keep", "drop"):
                raise unknown("value of the view's option truncated", str(value), ["keep", "drop"])
        elif name in COUNTS and value is not None and value < 1:
            raise UserError(f"the view {selector.name!r} needs {name} of at least 1, got {value}")


def _units(selector: Selector, rows: pa.Table, options: Mapping[str, Any]) -> Units:
    """The units of a view. Raises UserError naming it unless there are any, whole, and of rows that exist."""
    name = f"the view {selector.name!r}"
    try:
        given = list(selector.units(rows, **options))
        units = tuple(tuple(unit) for unit in given)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} gave no units, tuples of row indices: {one_line(error)}") from error
    if not units:
        raise EmptyViewError(f"{name} selects none of the buffer's {len(rows):,} rows")
    flat = list(itertools.chain.from_iterable(units))
    if wrong := [row for row in flat if type(row) is not int and not isinstance(row, np.integer)]:
        raise UserError(f"{name} holds {wrong[0]!r:.40}, which is not a row index")
    lengths, places = np.fromiter(map(len, units), np.int64, len(units)), np.array(flat, np.int64)
    outside = (places < 0) | (places >= len(rows))
    if outside.any():
        raise UserError(f"{name} selects row {places[outside][0]} of a buffer with rows 0 to {len(rows) - 1}")
    if (incomplete := ~_SIZES[selector.unit](lengths)).any():
        unit = units[int(np.flatnonzero(incomplete)[0])]
        raise UserError(f"{name} has the unit {unit}, of {len(unit)} rows: {_WHOLE[selector.unit]}")
    if selector.unit is not Unit.ROW:
        _require_whole(name, selector.unit, rows, units, lengths, places)
    return tuple(tuple(map(int, unit)) for unit in units) if any(type(row) is not int for row in flat) else units


_SIZES: Mapping[Unit, Callable[[Any], Any]] = {
    Unit.ROW: lambda rows: rows == 1,
    Unit.PAIR: lambda rows: rows == 2,
    Unit.GROUP: lambda rows: rows > 0,
}
_WHOLE = {
    Unit.ROW: "it must be one row, unless the view declares units of several (unit = Unit.PAIR or Unit.GROUP)",
    Unit.PAIR: "a pair is a better and a worse completion of one prompt",
    Unit.GROUP: "a group is some samples of one prompt",
}


def _require_whole(name: str, kind: Unit, rows: pa.Table, units: Units, lengths: Any, places: Any) -> None:
    """Raise UserError for a pair or a group that has a row twice or spans several prompts."""
    number = np.repeat(np.arange(len(units)), lengths)
    prompt = _prompts(rows, places)
    first = np.repeat(prompt[np.cumsum(lengths) - lengths], lengths)
    order = np.lexsort((places, number))
    again = (np.diff(places[order]) == 0) & (np.diff(number[order]) == 0)
    for wrong, problem in ((number[prompt != first], "of several prompts"), (number[order][1:][again], "a row twice")):
        if len(wrong):
            raise UserError(f"{name} has the unit {units[int(wrong[0])]!r:.80}, {problem}: {_WHOLE[kind]}")


def _prompts(rows: pa.Table, places: Any) -> Any:
    """A number for the prompt of each row at ``places``."""
    names = rows["prompt_id"].take(pa.array(places)).combine_chunks()
    return names.dictionary_encode().indices.to_numpy()


def _weights(selector: Selector, rows: pa.Table, units: Units) -> tuple[float, ...] | None:
    """The weights that a view gives its units. Raises UserError naming it for weights that cannot be drawn from."""
    name = f"the view {selector.name!r}"
    try:
        given = selector.weights(rows, units)
        weights = None if given is None else tuple(given)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} gave no weights, a number per unit: {one_line(error)}") from error
    if weights is None:
        return None
    if len(weights) != len(units):
        raise UserError(f"{name} has {len(weights):,} weights for {len(units):,} units: give one per unit, or None")
    for unit, weight in zip(units, weights, strict=True):
        if not (isinstance(weight, numbers.Real) and math.isfinite(weight) and weight >= 0):
            raise UserError(
                f"{name} gives the unit {unit!r:.40} the weight {weight!r:.40}: it must be finite and not negative"
            )
    if not any(weights):
        raise UserError(f"{name} gives all {len(units):,} units the weight 0, so none could be drawn")
    return tuple(map(float, weights))


def _left_out(rows: pa.Table, selector: Selector, options: Mapping[str, Any], units: Units) -> dict[str, int]:
    """`View.left_out`: what the view has only without an option."""
    found = {}
    if options.get("truncated") == "drop":
        truncated = rows["truncated"].to_numpy()
        everything = selector.units(rows, **{**options, "truncated": "keep"})
        found[TRUNCATED] = sum(bool(truncated[row]) for unit in everything for row in unit)
    if options.get("varied"):
        found[FLAT] = len(selector.units(rows, **{**options, "varied": False})) - len(units)
    return {what: number for what, number in found.items() if number}


def _quality(rows: pa.Table, units: Units) -> tuple[float, ...]:
    """The reward of each unit's row. Raises UserError for a reward that cannot be a weight."""
    index = np.asarray(units)[:, 0]
    quality = rewards(rows)[index]
    for wrong, problem in (
        (~np.isfinite(quality), "have no finite quality score: give each a reward"),
        (quality < 0, "have a negative quality score: shift or clip the rewards to 0 or more"),
    ):
        if wrong.any():
            first = int(index[np.flatnonzero(wrong)[0]])
            raise UserError(f"{int(wrong.sum()):,} of {len(index):,} rows to draw by quality {problem} (row {first})")
    if not quality.any():
        raise UserError(f"all {len(index):,} rows to draw by quality have a quality of 0, so none could be drawn")
    return tuple(quality.tolist())


def view_in_place(objective: Objective, other: WhichView) -> tuple[WhichView, dict[str, Any]]:
    """`view_of` with another view in place of the objective's own, with as many rows per unit.

    Raises UserError for an unknown view, for wrong options, and for a view that the objective cannot learn from.
    """
    own, options = view_of(objective)
    other, name = builtin(other), name_of_view(other)
    if is_composite(type(objective)):
        raise UserError(f"learns_from: {objective.name!r} is a composite, and each component has a view of its own")
    if other == builtin(own):
        return own, options
    it, mine = selector_of(other), selector_of(own)
    if it.unit is not mine.unit:
        wanted = _KINDS[mine.unit]
        raise UserError(
            f"learns_from: the view {name!r} has {_KINDS[it.unit]}, and {objective.name!r} learns from {wanted}: "
            f"name a view of {wanted}"
        )
    if it.is_imitated and not mine.is_imitated:
        raise UserError(
            f"learns_from: rows of the view {name!r} may have no reward, and {objective.name!r} learns from rewards"
        )
    kept = {key: value for key, value in options.items() if key in KEPT_OPTIONS and value}
    check_options(it, kept)
    return other, kept
