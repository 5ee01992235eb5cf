"""Training in stages: the warm-up that all cells of a comparison share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from rlzoo.config.sources import ProblemSource, Strict

WARM_UP = "warm_up"
"""The name of the warm-up in experiments, in results and in logs."""


class WarmUp(Strict):
    """A first stage, trained once on demonstrations, whose result is the base model of all cells."""

    objective: str = "sft"
    """An objective that learns from demonstrations: a registered name, ``module:Name`` or ``file.py:Name``."""
    options: Mapping[str, Any] = {}
    """The objective's hyper-parameters."""
    train: ProblemSource | None = None
    """The problems whose worked solutions it learns from; None: those of the experiment."""
    training: Mapping[str, Any] = {}
    """Fields of `Training` that differ from the experiment's. It trains all weights unless ``lora`` is given here."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The seed for the order of the demonstrations."""
