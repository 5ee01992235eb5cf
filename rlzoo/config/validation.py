"""Plain data as pydantic models, with one-line errors that name the field and the nearest known name."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar, get_args

import pydantic
from pydantic import Field

from rlzoo.errors import UserError, unknown

M = TypeVar("M", bound=pydantic.BaseModel)
Positive = Annotated[int, Field(gt=0)]
"""A whole number of at least 1."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A random seed that every generator takes."""


class Strict(pydantic.BaseModel):
    """Settings that cannot change and have no other keys."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


def validated(model: type[M], data: Any, where: str) -> M:
    """``data`` as a ``model``. Raises UserError naming the first wrong field; ``where`` is named before it."""
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # a typo may leave another out
        *parents, last = [str(part) for part in first["loc"]] or [""]
        if first["type"] == "extra_forbidden":
            owner = _owner(model, first["loc"][:-1])
            inside = f"setting of {'.'.join(parents)}" if parents else "setting"
            raise unknown(f"{inside} in {where}", last, owner.model_fields if owner else []) from None
        field = ".".join([*parents, last])
        if first["type"] == "missing":
            raise UserError(f"{where}: {field} is missing: give it, as it has no default") from None
        reason = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] == "value_error" else f" = {first['input']!r:.60}"
        raise UserError(f"{where}: {field}{given}: {reason}" if last else f"{where}: {reason}") from None


def named_null(value: Any) -> Any:
    """The word ``null``, which YAML reads as None; other values are unchanged."""
    return "null" if value is None else value


def one_or_several(value: Any, check: pydantic.ValidatorFunctionWrapHandler) -> Any:
    """A whole number of at least 1, or a tuple of distinct ones. Raises ValueError for anything else."""
    try:
        checked = check(value)
    except pydantic.ValidationError:
        checked = ()
    if isinstance(checked, tuple) and (not checked or len(set(checked)) < len(checked)):
        raise ValueError(f"{value!r:.60} is neither a whole number of at least 1 nor a list of distinct ones")
    return checked


def valid_token_budget(value: int | str) -> int | str:
    """A whole number of at least 1, ``auto`` or ``auto/4``. Raises ValueError for anything else."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not is_number and not (isinstance(value, str) and re.fullmatch(r"auto(/[1-9]\d*)?", value)):
        raise ValueError(f"{value!r:.60} is neither a whole number of at least 1 nor auto")
    return value


def _owner(model: type[pydantic.BaseModel], path: tuple[Any, ...]) -> type[pydantic.BaseModel] | None:
    """The model of the field at ``path``; None for an element of a list."""
    owner: Any = model
    for part in path:
        field = getattr(owner, "model_fields", {}).get(part)
        if field is not None:  # else it is a key of a mapping, and the owner is the model of its values already
            owner = field.annotation if hasattr(field.annotation, "model_fields") else _inner(field.annotation)
    found: type[pydantic.BaseModel] | None = owner
    return found


def _inner(annotation: Any) -> Any:
    for argument in get_args(annotation):
        found = argument if hasattr(argument, "model_fields") else _inner(argument)
        if found is not None:
            return found
    return None
