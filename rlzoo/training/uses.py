"""Which objectives can be trained on a buffer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rlzoo.buffers import Buffer, View
from rlzoo.errors import UserError
from rlzoo.inputs import Stage
from rlzoo.objective import Objective, get_objective, list_objectives
from rlzoo.training.batches import views_of
from rlzoo.types import WhichView, name_of_view

LOOKED_AT = 64
"""How many rows of a view are looked at for stored inputs."""


@dataclass(frozen=True)
class Use:
    """Whether an objective, with its default options, can be trained on a buffer."""

    objective: str
    views: tuple[str, ...]
    """The views that it learns from."""
    units: int = 0
    """The number of units in its view: rows, pairs or groups; of the smallest view if it has several."""
    lacks: str | None = None
    """What is missing; None if it can be trained."""


def uses_of(buffer: Buffer) -> list[Use]:
    """A `Use` of every registered objective, in the order of their names.

    Models that an objective needs are not loaded, so inputs that they compute count as available.
    """
    known: dict[str, View | UserError] = {}
    return [_use(buffer, name, known) for name in list_objectives()]


def _use(buffer: Buffer, name: str, known: dict[str, View | UserError]) -> Use:
    try:
        objective = get_objective(name)
    except UserError as error:
        return Use(name, (), lacks=str(error).removeprefix(f"objective {name!r} ").partition(":")[0])
    views = views_of(objective)
    names = tuple(dict.fromkeys(name_of_view(which) for which, _ in views))
    units = []
    for (which, options), component in zip(views, objective.components, strict=True):
        view = _view(buffer, which, options, known)
        lacks = _short(view) if isinstance(view, UserError) else _lacking(buffer, view, component.objective)
        if lacks is not None or isinstance(view, UserError):
            return Use(name, names, lacks=lacks)
        units.append(len(view))
    return Use(name, names, units=min(units))


def _view(
    buffer: Buffer, which: WhichView, options: Mapping[str, Any], known: dict[str, View | UserError]
) -> View | UserError:
    """The view, or why there is none; each is made once."""
    key = f"{which!r} {sorted(options.items())}"
    if key not in known:
        try:
            known[key] = buffer.view(which, **options)
        except UserError as error:
            known[key] = error
    return known[key]


def _lacking(buffer: Buffer, view: View, objective: Objective) -> str | None:
    """The stored input that rows of the view lack and that cannot be computed; None if there is none."""
    wanted = [one for one in objective.requires if one.stage is Stage.STORED and not one.is_computed]
    rows = buffer.at([row for unit in islice(view.units, LOOKED_AT) for row in unit]) if wanted else []
    for one in wanted:
        for row in rows:
            try:
                if one.stored(row) is None:
                    return f"a row has no {one.label}"
            except UserError as error:
                return _short(error)
    return None


def _short(error: UserError) -> str:
    """An error without the advice after its colon."""
    return str(error).partition(": ")[0].removeprefix("the buffer has ")
