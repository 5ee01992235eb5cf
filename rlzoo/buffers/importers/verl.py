"""verl's dumps of generations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from rlzoo.buffers.importer import (
    Importer,
    LoggedSample,
    Turns,
    TurnsSaid,
    number_in,
    others,
    register_importer,
    text_of,
    version_in,
)
from rlzoo.buffers.values import Row


@register_importer
class VerlDump(Importer):
    """The files ``STEP.jsonl`` in ``trainer.rollout_data_dir`` and ``trainer.validation_data_dir``.

    ``score`` is the reward, ``gts`` the ground truth; what the reward function returned beside its score become
    columns. verl removes special tokens from the texts. The turns of the prompt are found again with the chat template,
    and so are those of completions with the results of tools, if the option ``completions`` says that there are any.
    Neither log-probs nor truncation are dumped. Checked against verl's main branch at commit 1dda039 of
    22 August 2026, old trainer and new, and its agents' turns at commit b178a3c of 29 January 2026.
    """

    name: ClassVar[str] = "verl"
    files: ClassVar[tuple[str, ...]] = ("**/*.jsonl",)

    turns: Turns | Literal["none"] = "found"
    """The turns of a prompt: ``found`` again by the chat template; ``single``, one turn of the user, for templates that
    mark turns by special tokens alone; or ``none``, if prompts are plain text."""
    completions: TurnsSaid | None = None
    """The turns of a completion in which the headers of others appear: ``several``, as the chat template says, or
    ``single``, if the policy wrote all of it. Without it, such a completion is an error."""

    def samples(self, row: Row) -> Iterable[LoggedSample]:
        yield LoggedSample(
            prompt=text_of(row, "input"),
            completion=text_of(row, "output"),
            reward=number_in(row, "score"),
            version=version_in(row, "step"),
            columns=others(row, "input", "output", "score", "step"),
            stripped=None if self.turns == "none" else self.turns,
            turns_said=self.completions,
        )
