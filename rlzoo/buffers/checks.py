"""Checks of a buffer's rows, wherever they come from: they have the schema's columns, with valid values.

Values are checked on Arrow's columns; only invalid ones become Python objects.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rlzoo.buffers.bad_rows import BadRows
from rlzoo.buffers.schema import (
    ADDED,
    ADDED_FIELDS,
    CONVERSATIONS,
    LOG_PROBS,
    NULLABLE,
    SAMPLING,
    SCHEMA,
    SOURCES,
    arrow,
    to_dataset,
)
from rlzoo.errors import UserError

_NEEDED = {"reward_components": ("name",), **dict.fromkeys(CONVERSATIONS, ("role",)), "inputs": ("name", "values")}
"""Columns that hold lists of structs → the fields of these that are never null."""

Wrong = tuple[int, str]
"""The index of a row, and what is wrong with it."""


def checked(rows: datasets.Dataset, origin: str, bad: BadRows | None = None) -> datasets.Dataset:
    """The data set in the schema's columns, without rows that ``bad`` drops; ``origin`` names it in errors.

    Raises UserError for a column that is missing or has the wrong type, and for an invalid value, naming the row (from
    1), unless such rows are dropped.
    """
    rows = conform(rows, origin)
    wrong = wrong_rows(arrow(rows))
    if bad is None:  # not from a file, so no setting drops its rows
        bad = BadRows()
    else:
        bad.rows += len(rows)
    for row, reason in wrong.items():
        bad.refuse(f"row {row + 1} of {origin}", UserError(reason))
    bad.require_some(len(rows) - len(wrong))
    return rows.select(np.setdiff1d(np.arange(len(rows)), list(wrong))) if wrong else rows


def conform(rows: datasets.Dataset, origin: str) -> datasets.Dataset:
    """The data set in the schema's columns. Raises UserError for a column that is missing or has the wrong type."""
    missing = [name for name in SCHEMA if name not in rows.column_names]
    if others := [name for name in missing if name not in ADDED]:
        raise UserError(
            f"{origin} has no column {others[0]!r}, so it is not a saved buffer: import TRL data with from_trl"
        )
    if missing:
        kinds = {name: SCHEMA.arrow_schema.field(name).type for name in missing}
        table = arrow(rows)
        for name, kind in kinds.items():
            table = table.append_column(name, pa.nulls(len(table), kind))
        rows = to_dataset(table)
    if list(rows.column_names) != list(SCHEMA):
        rows = rows.select_columns(list(SCHEMA))
    if dict(rows.features) == dict(SCHEMA):
        return rows
    table, kinds = arrow(rows), SCHEMA.arrow_schema
    for name in _NEEDED:
        own, known = _fields(table.schema.field(name).type), _fields(kinds.field(name).type) or []
        if own is not None and own != [one for one in known if one in own or one not in ADDED_FIELDS]:
            raise UserError(f"{origin} is not a saved buffer: the fields of {name} have other names")
    return to_dataset(pa.table([_cast(table[field.name], field, origin) for field in kinds], schema=kinds))


def _cast(column: pa.ChunkedArray, field: pa.Field, origin: str) -> pa.ChunkedArray:
    """The column in the schema's type. Raises UserError naming the first row (from 1) that does not convert to it."""

    def reason(rows: int) -> str | None:
        try:
            column.take(np.arange(rows)).cast(field.type)  # a cast of a slice would read what is outside of it too
        except (pa.ArrowException, NotImplementedError) as error:
            return str(error).splitlines()[0]
        return None

    try:
        return column.cast(field.type)
    except (pa.ArrowException, NotImplementedError):
        pass  # reported below
    if reason(0) is not None:
        raise UserError(f"{origin} is not a saved buffer: its {field.name} cannot be {field.type}: {reason(0)}")
    first = bisect_left(range(len(column)), True, key=lambda row: reason(row + 1) is not None)
    raise UserError(f"row {first + 1} of {origin}: {field.name} cannot be {field.type}: {reason(first + 1)}")


def _fields(kind: pa.DataType) -> list[str] | None:
    """The names of the fields in a list of structs: a cast would fill fields of other names with nulls."""
    inner = getattr(kind, "value_type", kind)
    return [field.name for field in inner] if pa.types.is_struct(inner) else None


def wrong_rows(table: pa.Table) -> dict[int, str]:
    """The rows with an invalid value, in order: row index → the first thing that is wrong with it."""
    found: dict[int, str] = {}
    for row, reason in _all_wrong(table):
        found.setdefault(row, reason)
    return dict(sorted(found.items()))


def _all_wrong(table: pa.Table) -> Iterator[Wrong]:
    for name in SCHEMA:
        if name not in NULLABLE:
            yield from ((row, f"{name} is null: every row needs one") for row in _rows(table[name].is_null()))
    source, reward = table["source"], table["reward"]
    for row in _rows(pc.invert(pc.is_in(source, pa.array(SOURCES)))):
        yield row, f"source is {source[row].as_py()!r}: it must be one of {', '.join(SOURCES)}"
    for row in _rows(pc.invert(pc.is_finite(reward))):
        yield row, f"reward is {reward[row]}: it must be a finite number, or null"
    for name, (most, bounds) in SAMPLING.items():
        inside = pc.and_(pc.greater(table[name], 0.0), pc.less_equal(table[name], most))
        yield from ((row, f"{name} is {table[name][row]}: it must be {bounds}") for row in _rows(pc.invert(inside)))
    tokens = pc.list_value_length(table["completion_ids"])
    for name in ("prompt_ids", "completion_ids"):
        empty = pc.equal(pc.list_value_length(table[name]), 0)
        yield from ((row, f"{name} is empty: a row needs a token or more there") for row in _rows(empty))
        for row, value in _inside(table[name], lambda ids: pc.less(ids, 0)):
            yield row, f"{name} holds {value}, which is not a token id"
    for name in LOG_PROBS:
        for row, value in _inside(table[name], lambda logp: pc.invert(pc.less(logp, math.inf))):
            yield row, f"{name} holds {value}, which is not a log-prob"
        own = pc.list_value_length(table[name])
        for row in _rows(pc.not_equal(own, tokens)):
            yield row, f"{name} has {own[row]} values for {tokens[row]} completion tokens: compute them again"
    yield from _wrong_masks(table["completion_mask"], tokens)
    for name, fields in _NEEDED.items():
        for row, _ in _inside(table[name], lambda one, fields=fields: _lacks(one, fields)):  # type: ignore[misc]
            yield row, f"{name} has an entry without {' or '.join(fields)}"
    for name in CONVERSATIONS:
        for row, _ in _inside(table[name], _without_content):
            yield row, f"{name} has a message without content"
        for row, _ in _inside(table[name], lambda one: _no_objects(one.field("extra"))):
            yield row, f"{name} has a message whose other keys are not a JSON object"
    yield from _wrong_inputs(table["inputs"], tokens)
    yield from _wrong_columns(table["columns"])


def _wrong_masks(column: pa.ChunkedArray, tokens: pa.ChunkedArray) -> Iterator[Wrong]:
    """Masks that hold a null, are not of the completion's length, or leave no token to learn from."""
    for row, _ in _inside(column, pc.is_null):
        yield row, "completion_mask holds null: give true or false per completion token"
    own = pc.list_value_length(column)
    for row in _rows(pc.not_equal(own, tokens)):
        yield row, f"completion_mask has {own[row]} values for {tokens[row]} completion tokens: give one per token"
    before = 0
    for chunk in column.chunks:
        learned = np.zeros(len(chunk), np.bool_)
        kept = pc.fill_null(chunk.flatten(), False).to_numpy(zero_copy_only=False)
        learned[pc.list_parent_indices(chunk).to_numpy()[kept]] = True
        for place in np.flatnonzero(chunk.is_valid().to_numpy(zero_copy_only=False) & ~learned):
            yield before + int(place), "completion_mask is false for all tokens: a row needs one to learn from"
        before += len(chunk)


def _wrong_inputs(column: pa.ChunkedArray, tokens: pa.ChunkedArray) -> Iterator[Wrong]:
    """Stored inputs that are neither one value per completion token nor one."""
    before = 0
    for chunk in column.chunks:
        entries, parents = chunk.flatten(), pc.list_parent_indices(chunk).to_numpy()
        if len(entries):
            own = pc.list_value_length(entries.field("values")).to_numpy(zero_copy_only=False)
            expected = tokens.slice(before, len(chunk)).to_numpy()[parents]
            for place in np.flatnonzero((own != 1) & (own != expected)):
                told = f"the input {entries.field('name')[place]} has {own[place]:g} values"
                yield before + int(parents[place]), f"{told} for {expected[place]:g} completion tokens"
        before += len(chunk)


def _wrong_columns(column: pa.ChunkedArray) -> Iterator[Wrong]:
    before = 0
    for chunk in column.chunks:
        for row in _rows(_no_objects(chunk)):
            yield before + row, f"columns is {chunk[row].as_py()!r:.60}, which is not a JSON object"
        before += len(chunk)


def _no_objects(texts: pa.Array) -> pa.BooleanArray:
    """Which texts are not JSON objects; a null is none."""
    wrong = [text for text in texts.unique().to_pylist() if text is not None and not _is_object(text)]
    return pc.is_in(texts, pa.array(wrong, pa.string()))


def _is_object(text: str) -> bool:
    try:
        return text == "{}" or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _lacks(entries: pa.StructArray, fields: tuple[str, ...]) -> pa.BooleanArray:
    """Which entries lack one of their fields."""
    lacking = entries.is_null()
    for field in fields:
        lacking = pc.or_(lacking, entries.field(field).is_null())
    return lacking


def _without_content(messages: pa.StructArray) -> pa.BooleanArray:
    """Which messages have neither a text nor anything else, such as tool calls or a list of parts."""
    return pc.and_(messages.field("content").is_null(), messages.field("extra").is_null())


def _inside(column: pa.ChunkedArray, wrong: Callable[[pa.Array], pa.BooleanArray]) -> Iterator[tuple[int, object]]:
    """Each row with a ``wrong`` value, or a null, in its list, and the first such value."""
    before = 0
    for chunk in column.chunks:
        values = chunk.flatten()
        found = pc.fill_null(wrong(values), True)
        if pc.any(found).as_py():
            places = np.flatnonzero(found)
            parents, first = np.unique(pc.list_parent_indices(chunk).to_numpy()[places], return_index=True)
            for row, place in zip(parents, places[first], strict=True):
                value = values[place].as_py()
                yield before + int(row), "null" if value is None else value
        before += len(chunk)


def _rows(mask: pa.ChunkedArray | pa.Array) -> list[int]:
    """Where a mask is true."""
    if not pc.any(mask).as_py():
        return []
    found: list[int] = np.flatnonzero(pc.fill_null(mask, False)).tolist()
    return found
