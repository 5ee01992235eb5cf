"""Templates of prompts and solutions: text with columns in braces, as in ``"What is {question}?"``."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from rlzoo.buffers.values import find
from rlzoo.errors import UserError, kind_of


def columns_in(template: str) -> list[str]:
    """The columns that a template of a prompt or a solution names; none for a column's name."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}: write {{{{ and }}}} for braces that are text") from None
    if "" in names:
        raise UserError(f"template {template!r} has {{}}: name a column in it, or write {{{{}}}} for text")
    return names


def filled(template: str, row: Mapping[str, Any]) -> str:
    """The text that a template makes of a row. Raises UserError for a value that is null or not text."""
    parts = []
    for text, name, spec, conversion in string.Formatter().parse(template):
        parts.append(text)
        if name is None:
            continue
        try:
            value = find(row, re.sub(r"\[(\w+)\]", r".\1", name))
        except UserError as error:
            raise UserError(f"{error}: name a column in {{{name}}}, or write {{{{{name}}}}} for text") from None
        if value is None or isinstance(value, (list, dict)) or value in (math.inf, -math.inf) or value != value:
            what = str(value) if value in (math.inf, -math.inf) else kind_of(value)
            raise UserError(
                f"column {name!r} is {what}, and the template needs text there: fill it in (with an empty text where "
                "nothing is meant), or drop the row"
            )
        try:
            parts.append(format(string.Formatter().convert_field(value, conversion), spec or ""))
        except ValueError as error:
            raise UserError(f"column {name!r} cannot be shown as {{{name}:{spec}}}: {error}") from None
    return "".join(parts)


def each_filled(template: str, row: Mapping[str, Any], named: Sequence[str]) -> list[str]:
    """What a template makes of a row: one text, one per element of the column that holds a list, or none for a null."""
    values = {name: find(row, name) for name in named}
    if any(value is None for value in values.values()):
        return []
    lists = [name for name, value in values.items() if isinstance(value, list)]
    rows = [{**row, lists[0]: value} for value in values[lists[0]]] if lists else [row]
    return [filled(template, one) for one in rows]
