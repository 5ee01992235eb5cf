"""inspect-task: the scorer of the inspect task that a problem comes from.

Source: github.com/UKGovernmentBEIS/inspect_ai.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlzoo.errors import UserError
from rlzoo.reward import register_reward
from rlzoo.reward.inspect_tasks import inspect_task
from rlzoo.rewards._text import completion_text


@register_reward
@dataclass(frozen=True)
class InspectScorer:
    """The value that the task's scorer gives: C is 1, P is ½, I and N are 0, and numbers are themselves.

    Columns: ``task`` and ``sample``, which problems of a source ``inspect:TASK`` have. ``score`` names one of several
    scorers of a task, or ``SCORER.KEY`` one of several values. The answer that the scorer finds is logged. Raises
    UserError without the package inspect-ai, and for a task that cannot be scored without a model, tools or a sandbox.
    """

    name: ClassVar[str] = "inspect-task"

    score: str | None = None

    async def __call__(
        self,
        completions: Sequence[Any],
        task: Sequence[str],
        sample: Sequence[str],
        log_extra: Callable[[str, Sequence[Any]], None] | None = None,
    ) -> list[float | None]:
        """One value per completion."""
        for row, (one, name) in enumerate(zip(task, sample, strict=True)):
            if not isinstance(one, str) or not isinstance(name, str):
                raise UserError(f"reward {self.name!r}: row {row} is not of an inspect task: score it with another")
        found = await asyncio.gather(
            *(
                inspect_task(one).score(name, completion_text(completion), self.score)
                for completion, one, name in zip(completions, task, sample, strict=True)
            )
        )
        if log_extra is not None and any(answer is not None for _, answer in found):
            log_extra("answer", [answer for _, answer in found])
        return [value for value, _ in found]
