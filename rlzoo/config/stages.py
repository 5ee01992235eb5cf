"""Training in stages: the warm-up that all cells of a comparison share, and rows that train one after another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from rlzoo.config.sources import ProblemSource
from rlzoo.config.validation import Strict
from rlzoo.errors import unknown

if TYPE_CHECKING:
    from rlzoo.config.settings import Algorithm

WARM_UP = "warm_up"
"""The name of the warm-up in experiments, in results and in logs."""


class WarmUp(Strict):
    """A first stage, trained once on demonstrations, whose result is the base model of all cells."""

    objective: str
    """An objective that learns from demonstrations: a registered name, ``module:Name`` or ``file.py:Name``."""
    options: Mapping[str, Any] = {}
    """The objective's hyper-parameters."""
    train: ProblemSource | None = None
    """The problems whose worked solutions it learns from; None: those of the experiment."""
    training: Mapping[str, Any] = {}
    """Fields of `Training` that differ from the experiment's. It trains all weights unless ``lora`` is given here."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The seed for the order of the demonstrations."""


OF_A_STAGE = ("objective", "options", "mode", "learns_from", "training")
"""Settings of a row that a row with stages takes from the rows that it names."""


def check_stages(name: str, rows: Mapping[str, Algorithm]) -> None:
    """Raise ValueError unless the stages of a row, if it has any, are rows that can be trained one after another."""
    row = rows[name]
    if not row.stages:
        return
    kind = type(row)
    if own := [field for field in OF_A_STAGE if getattr(row, field) != kind.model_fields[field].default]:
        raise ValueError(f"{name!r} takes {own[0]} from the rows that its stages name: leave it out")
    if len(row.stages) == 1:
        raise ValueError(f"stages of {name!r}: a single stage is the row {row.stages[0]!r} itself: name two or more")
    for stage in row.stages:
        if stage not in rows:
            known = [other for other, one in rows.items() if not one.stages]
            raise ValueError(f"stages of {name!r}: {unknown('row', stage, known)}")
        if rows[stage].stages:
            raise ValueError(f"stages of {name!r}: {stage!r} has stages of its own: name those")
    for stage in row.stages[:-1]:
        if len(rates := rows[stage].learning_rates) > 1:
            raise ValueError(
                f"stages of {name!r}: {stage!r} has {len(rates)} learning rates, and only the last stage may be tuned: "
                "name a row with one"
            )
