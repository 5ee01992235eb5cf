"""verl's dumps of generations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from rlzoo.buffers.importer import (
    Importer,
    LoggedSample,
    Turns,
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
    columns. verl removes special tokens from the texts. The turns of the prompt are found again with the chat template;
    completions of several turns, with the results of tools, cannot be told from others and must not be imported.
    Neither log-probs nor truncation are dumped. Checked against verl's main branch at commit 1dda039 of
    22 August 2026, old trainer and new.
    """

    name: ClassVar[str] = "verl"
    files: ClassVar[tuple[str, ...]] = ("**/*.jsonl",)

    turns: Turns | Literal["none"] = "found"
    """The turns of a prompt: ``found`` again by the chat template; ``single``, one turn of the user, for templates that
    mark turns by special tokens alone; or ``none``, if prompts are plain text."""

    def samples(self, row: Row) -> Iterable[LoggedSample]:
        yield LoggedSample(
            prompt=text_of(row, "input"),
            completion=text_of(row, "output"),
            reward=number_in(row, "score"),
            version=version_in(row, "step"),
            columns=others(row, "input", "output", "score", "step"),
            stripped=None if self.turns == "none" else self.turns,
        )
