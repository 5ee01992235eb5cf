"""How far training has come, by steps or by a budget, and the learning rate that follows from it."""

from __future__ import annotations

import math

from rlzoo.config import Budget, Training
from rlzoo.errors import UserError
from rlzoo.jobs.ranks import agreed
from rlzoo.training.costs import Costs


def cosine(step: int, settings: Training) -> float:
    """The factor of the peak learning rate in a step: linear warm-up, then cosine decay.

    With S = ``steps`` and W = ⌈``warmup_ratio`` · S⌉: (t + 1) / (W + 1) for t < W, then
    ½ (1 + cos(π (t - W) / (S - W))), which reaches 0 at t = S, one step after the last.
    """
    warmup = math.ceil(settings.warmup_ratio * settings.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def cosine_between(before: float, after: float, warmup: float) -> float:
    """`cosine` for steps of unequal cost: this one takes training from the fraction ``before`` to ``after``.

    For steps of equal cost and a whole number of warm-up steps it is `cosine`.
    """
    if before < warmup:
        return after / (warmup + after - before)
    return 0.5 * (1 + math.cos(math.pi * (before - warmup) / (1 - warmup)))


def check_budget(budget: Budget, start: float, row: str = "this run") -> None:
    """Raise UserError if a budget is spent by what a row costs at the ``start``, before its first step."""
    if start >= budget.amount:
        raise UserError(
            f"training.budget.{budget.cost} of {row} is {budget.amount:,.0f}, and sampling and scoring its buffer has "
            f"cost {start:,.0f} before the first step: give more, or sample less (rollouts)"
        )


class Progress:
    """How much of its training a policy has had: the larger of two fractions, of ``steps`` and of the budget.

    Costs from before training, such as those of a shared buffer, count: the fraction of the budget is
    (spent - start) / (budget - start).
    """

    def __init__(self, settings: Training, costs: Costs) -> None:
        """``costs`` are those before training. Raises UserError if they exceed the budget."""
        self._settings, self._budget = settings, settings.budget
        self._start = 0.0 if self._budget is None else float(getattr(costs, self._budget.cost))
        if self._budget is not None:
            check_budget(self._budget, self._start)
        self.step, self._spent = 0, 0.0
        self._before = 0.0

    @property
    def fraction(self) -> float:
        """The fraction of training that is done; 1 at the end."""
        return max(self.step / self._settings.steps, self._spent)

    @property
    def ended(self) -> str | None:
        """Why training is over, ``steps`` or ``budget``; None if it is not."""
        if self._spent >= 1:
            return "budget"
        return "steps" if self.step >= self._settings.steps else None

    def events(self) -> list[str]:
        """What a user should know at the end: that all steps were taken before the budget was spent."""
        if self._budget is None or self.ended != "steps":
            return []
        spent = f"{100 * self._spent:.0f} % of the budget spent"
        return [f"training ended after {self.step:,} steps with {spent}: raise training.steps"]

    def move_to(self, step: int, costs: Costs) -> None:
        """Count a step, given the ``costs`` that include it. All processes must call this."""
        self._before = self.fraction
        self.step = step
        if self._budget is not None:
            spent = float(getattr(costs, self._budget.cost)) - self._start
            self._spent = min(1.0, agreed(spent) / (self._budget.amount - self._start))

    def learning_rate(self) -> float:
        """The learning rate of the step that was counted last."""
        settings = self._settings
        if self._budget is None:
            return settings.learning_rate * cosine(self.step - 1, settings)
        return settings.learning_rate * cosine_between(self._before, self.fraction, settings.warmup_ratio)

    def completes_part(self, parts: int) -> bool:
        """Whether the last step completed one of so many equal ``parts`` of training."""
        if self._budget is None:
            return self.step in {round(self._settings.steps * (i + 1) / parts) for i in range(parts)}
        return math.floor(parts * self.fraction) > math.floor(parts * self._before)

    def __str__(self) -> str:
        budget = "" if self._budget is None else f", {100 * self._spent:.0f} % of the budget"
        return f"step {self.step}/{self._settings.steps}{budget}"
