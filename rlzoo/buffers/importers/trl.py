"""TRL's logs of completions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, ClassVar

from rlzoo.buffers.files import Item
from rlzoo.buffers.importer import (
    Importer,
    LoggedSample,
    completion_of,
    others,
    prompt_of,
    register_importer,
    reward_in,
    version_in,
)
from rlzoo.buffers.values import Row, find
from rlzoo.errors import UserError


@register_importer
class TRLCompletions(Importer):
    """``log_completions=True`` of GRPOTrainer: ``completions/completions_00010.parquet`` in the output folder.

    The reward is the weighted sum of the columns of the reward functions, which are the components; TRL does not log
    their weights. Neither log-probs nor truncation are logged. Checked against TRL 1.16.0 on 28 November 2026. (Its
    RLOOTrainer sends the same table to a tracker and writes no file.)
    """

    name: ClassVar[str] = "trl"
    files: ClassVar[tuple[str, ...]] = ("**/completions_*.parquet",)
    other_rows: ClassVar[str] = "rows that TRL logged again, as no new completions were sampled since"

    rewards: Mapping[str, float] | None = None
    """Columns with rewards → their weights, as in ``reward_weights``; None: all columns of fractional numbers between
    the completion and the advantage, each with weight 1."""

    def rows(self, items: Iterator[Item]) -> Iterator[Item]:
        before = ""
        for _, some in groupby(items, key=_step):
            batch = list(some)
            content = repr([row if isinstance(row, UserError) else others(row, "step") for _, row in batch])
            if content != before:
                yield from batch
            before = content

    def samples(self, row: Row) -> Iterable[LoggedSample]:
        prompt, said = prompt_of(row, "prompt"), find(row, "completion")
        weights = self._weights(row)
        rewards = {name: reward_in(row, name) for name in weights}
        known = {name: value for name, value in rewards.items() if value is not None}
        yield LoggedSample(
            prompt=prompt,
            completion=said if isinstance(said, str) else completion_of(said, "column 'completion'"),
            reward=sum(weights[name] * value for name, value in known.items()) if known else None,
            components=rewards,
            version=version_in(row, "step"),
            columns=others(row, "step", "prompt", "completion", "advantage", *weights),
        )

    def _weights(self, row: Row) -> Mapping[str, float]:
        if self.rewards is not None:
            for name in self.rewards:
                find(row, name)  # raises for one that is missing
            return self.rewards
        names = [name for name in row if name not in ("step", "prompt", "completion", "advantage")]
        return {name: 1.0 for name in names if row[name] is None or isinstance(row[name], float)}


def _step(item: Item) -> Any:
    return item[1].get("step") if isinstance(item[1], dict) else None
