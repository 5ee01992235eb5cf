"""A row's values as plain data, and finding one by its name.

Plain data are what JSON holds. Dates, times and decimals become the text that says the same, and bytes the text
that they encode; anything else is `Unusable`: no error unless somebody asks for it.
"""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlzoo.errors import UserError, kind_of

Row = Mapping[str, Any]
Columns = Mapping[str, str | list[str] | None]
"""New name → the column that it stands for, a list of columns, or None to leave a column out."""


@dataclass(frozen=True)
class Unusable:
    """A value that cannot be plain data."""

    reason: str
    """What follows "column 'x' ": what is wrong with it and the fix."""


def plain_row(row: Row) -> dict[str, Any]:
    """The row with plain values; a value that contains anything else, however deeply nested, becomes `Unusable`."""
    plain = {}
    for name, value in row.items():
        if not isinstance(name, str) or _is_broken(name):
            continue  # nothing can refer to it
        try:
            plain[name] = _plain(value)
        except UserError as error:
            plain[name] = Unusable(str(error))
        except RecursionError:
            plain[name] = Unusable("is nested too deep: flatten it, or name another column")
    return plain


def usable(row: Row) -> dict[str, Any]:
    """The columns that are plain data."""
    return {name: value for name, value in row.items() if not isinstance(value, Unusable)}


def find(row: Row, name: str) -> Any:
    """The value of a column, or of a field within one: ``reward_model.ground_truth``, ``choices.0.text``.

    A column whose own name contains dots takes precedence. A field of a list of objects is the list of their fields;
    JSON text has the fields of its value. Raises UserError for a column or field that is missing or not plain data.
    """
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (column := ".".join(parts[:end])) in row:
            value = row[column]
            for place in range(end, len(parts)):
                value = _field(value, parts[place], ".".join(parts[:place]), name)
            if isinstance(value, Unusable):
                raise UserError(f"column {name!r} {value.reason}")
            return value
    raise UserError(f"no column {name!r}; it has: {', '.join(row) or 'none'}")


def renamed(row: Row, columns: Columns) -> dict[str, Any]:
    """The row with its columns renamed. Raises UserError as `find` does."""
    found = {new: _found(row, old) for new, old in columns.items() if old is not None}
    return {name: value for name, value in row.items() if columns.get(name, name) is not None} | found


def read_json(text: str) -> dict[str, Any] | list[Any] | None:
    """The object or list of a JSON text, as plain data; None for any other text."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        found: dict[str, Any] | list[Any] = _plain(json.loads(text))
    except (ValueError, RecursionError):
        return None
    return found


def number(value: Any) -> float:
    """A number, or a text as a number. Raises ValueError for anything else, infinities and NaN included."""
    if not isinstance(value, (bool, int, float, str)):
        raise ValueError
    found = float(value)
    if not np.isfinite(found):
        raise ValueError
    return found


def own_id(value: Any) -> str | None:
    """A row's own id as text; None if it has none: null, NaN, or an empty cell of a CSV file."""
    missing = value is None or value != value or (isinstance(value, str) and not value.strip())
    return None if missing else str(value)


def _found(row: Row, old: str | list[str]) -> Any:
    return find(row, old) if isinstance(old, str) else [find(row, name) for name in old]


def _field(value: Any, field: str, path: str, name: str) -> Any:
    """A field of the value at ``path``, on the way to ``name``."""
    if isinstance(value, Unusable):
        raise UserError(f"column {path!r} {value.reason}")
    if isinstance(value, str) and (inner := read_json(value)) is not None:
        value = inner
    if isinstance(value, Mapping) and field in value:
        return value[field]
    if isinstance(value, list) and field.isdecimal() and int(field) < len(value):
        return value[int(field)]
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) and field in entry for entry in value):
        return [entry[field] for entry in value]
    there = f"has: {', '.join(value)}" if isinstance(value, Mapping) else f"is {kind_of(value)}"
    raise UserError(f"no column {name!r}: {path!r} {there}")


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            if _is_broken(value):
                half = next(c for c in value if "\ud800" <= c <= "\udfff")
                raise UserError(f"holds a lone surrogate (\\u{ord(half):x}), which is not a character: repair the text")
            return value
        case Mapping():
            return {str(_plain(key)): _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case datetime.timedelta() | uuid.UUID():
            return str(value)
        case decimal.Decimal():
            return format(value, "f")
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                raise UserError("holds bytes that are not UTF-8 text: name a column of text") from None
        case np.ndarray() | np.generic():
            return _plain(value.tolist())
    raise UserError(f"holds a {type(value).__name__}, which is not text: name a column of text")


def _is_broken(text: str) -> bool:
    """Whether a text has a lone surrogate, which UTF-8 cannot encode."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
