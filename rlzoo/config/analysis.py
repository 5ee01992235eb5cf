"""The settings of ``rlzoo variance``."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

from rlzoo.config.validation import Positive, Seed, Strict

LEAST_DRAWS = 256
"""The smallest number of Monte-Carlo samples per token."""


class VarianceSettings(Strict):
    """How much ``rlzoo variance`` measures."""

    rows: Positive = 1000
    """The number of rows that each objective is measured on; prompts are never split."""
    draws: Annotated[int, Field(ge=0)] = 4096
    """Monte-Carlo samples per token, at least 256; 0: none."""
    every: Annotated[int, Field(ge=0)] = 10
    """Training steps between measurements; 0: no training."""
    probe_rows: Positive = 64
    """The number of rows measured in the course of training."""
    token_classes: Annotated[str, Field(min_length=1)] = "default"
    """A function from a token's text to its class: a registered name, ``module:name`` or ``file.py:name``."""
    class_gradients: bool = False
    """Measure what each class of tokens contributes to the variance: a backward pass per objective and class."""
    seed: Seed = 0
    """The seed for the choice of rows, the Monte-Carlo samples and training."""

    @pydantic.field_validator("draws")
    @classmethod
    def _enough(cls, draws: int) -> int:
        if 0 < draws < LEAST_DRAWS:
            raise ValueError(f"{draws} are too few for a variance and its error: give 0 or at least {LEAST_DRAWS}")
        return draws
