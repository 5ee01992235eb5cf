"""Measurements in the course of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlzoo.buffers import Buffer
from rlzoo.config import TokenBudget
from rlzoo.errors import UserError
from rlzoo.objective import Objective
from rlzoo.policy import Models, Policy
from rlzoo.training import Trainer, lacking
from rlzoo.types import WhichView
from rlzoo.variance.analyzer import analyze_variance


class VarianceProbe:
    """A callback for `rlzoo.train` that measures the trained objective's gradients every ``every`` steps.

    ``records`` has one row per measurement: the step, the coefficients' mean, spread and effective sample size, the
    median probability of the tokens, and the noise of the gradient over ``rows`` rows of the buffer, the same each
    time, as estimates for new prompts (`rlzoo.variance.noise`). An objective with a frozen reference needs the
    reference's log-probs in the buffer (`rlzoo.training.with_inputs`). Raises UserError for ``every`` below 1.
    """

    def __init__(
        self,
        buffer: Buffer,
        every: int,
        rows: int = 64,
        seed: int = 0,
        token_budget: TokenBudget = 2048,
        learns_from: WhichView | None = None,
    ) -> None:
        if every < 1:
            raise UserError(f"a probe cannot measure every {every} steps: give at least 1")
        self.buffer, self.every, self.rows, self.seed = buffer, every, rows, seed
        self.token_budget, self.learns_from = token_budget, learns_from
        self.records: list[dict[str, Any]] = []

    def __call__(self, trainer: Trainer, step: int) -> None:
        """Measure if the step is due. Raises UserError if the buffer lacks stored inputs."""
        if step % self.every:
            return
        self.check(trainer.objective, models=trainer.models)
        self.measure(trainer.policy, trainer.objective, step, trainer.models, trainer.progress.fraction)

    def check(self, *objectives: Objective, models: Models | None = None) -> None:
        """Raise UserError if the buffer lacks log-probs of a frozen model that is not among ``models``."""
        known = set() if models is None else models.frozen.keys()
        for one in lacking(self.buffer, *objectives):
            if not known >= set(one.models()):
                raise UserError(f"the probe's buffer has no {one.label} log-probs: add them with training.with_inputs")

    def measure(
        self, policy: Policy, objective: Objective, step: int, models: Models | None = None, trained: float = 0.0
    ) -> None:
        """Measure the policy in its current state, and add a record. Raises UserError as `analyze_variance` does."""
        (record,) = self.measured(policy, {objective.name: objective}, models, trained).values()
        self.records.append({"step": step, **record})

    def measured(
        self, policy: Policy, objectives: Mapping[str, Objective], models: Models | None = None, trained: float = 0.0
    ) -> dict[str, dict[str, Any]]:
        """A record of each objective that can be measured, without the step, by its name."""
        found = analyze_variance(
            policy, objectives, self.buffer, rows=self.rows, draws=0, seed=self.seed,
            models=models, token_budget=self.token_budget, learns_from=self.learns_from, trained=trained,
        )  # fmt: skip
        records = {}
        for name, entry in found["objectives"].items():
            coefficients = {key: entry["coefficients"][key] for key in ("mean", "cv", "ess_fraction")}
            records[name] = {**coefficients, "median_p": entry["median_p"], **entry["data_noise"]}
        return records
