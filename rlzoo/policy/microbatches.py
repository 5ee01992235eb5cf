"""The one way to run rows through a policy: in micro-batches, shared by processes, smaller where memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlzoo.config import TokenBudget
from rlzoo.errors import UserError
from rlzoo.inputs import Input
from rlzoo.jobs.memory import is_out_of_memory, on_device, release_memory
from rlzoo.jobs.ranks import rank, summed, world_size
from rlzoo.policy.defaults import token_budget_of
from rlzoo.policy.policy import Policy, TokenScores
from rlzoo.policy.sequences import Row, Sequences, Tokens, length

T = TypeVar("T")
Forward = Callable[[Sequences, list[int]], TokenScores]
"""A forward pass of the rows with these numbers."""


class MicroBatches:
    """Micro-batches of at most ``token_budget`` padded tokens, half as many after memory ran out."""

    def __init__(self, token_budget: int, on_halved: Callable[[int, int], None] | None = None) -> None:
        """``on_halved`` is called with the budget that did not fit and with the next."""
        self.token_budget, self._on_halved = token_budget, on_halved

    def share(self, rows: Sequence[Tokens], together: Sequence[Sequence[int]]) -> list[tuple[list[int], bool]]:
        """This process's micro-batches, and whether each counts: all processes have as many, of like length.

        ``together`` are the sets of rows that must not be separated. A sharded model needs the processes to run in
        step, so where micro-batches are too few, one runs once more for nothing.
        """
        lengths, world = list(map(length, rows)), world_size()
        budget = min(self.token_budget, -(-sum(lengths) // world)) if world > 1 else self.token_budget
        batches = list(token_batches(together, lengths, budget))
        own = range(rank(), -(-len(batches) // world) * world, world)
        return [(batches[i], True) if i < len(batches) else (batches[0], False) for i in own]

    def within_memory(self, rows: Sequence[Tokens], work: Callable[[], T], undo: Callable[[], None] | None = None) -> T:
        """Do the work, after memory ran out with half the budget. Of several processes none may change its own.

        ``undo`` drops what a failed attempt left. Raises UserError where one row does not fit.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or world_size() > 1:
                    raise
                if self.token_budget <= max(map(length, rows)):
                    raise UserError(f"out of memory with one sequence per micro-batch: {error}") from None
            if undo is not None:
                undo()
            release_memory()
            halved = max(min(self.token_budget, sum(map(length, rows))) // 2, 1)
            if self._on_halved is not None:
                self._on_halved(self.token_budget, halved)
            self.token_budget = halved

    def score(
        self,
        policy: Policy,
        rows: Sequence[Tokens],
        statistics: Sequence[Input] = (),
        top_p: float = 1.0,
        forward: Forward | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Float[Tensor, "R T"]]:
        """``logp`` of all rows by the policy as it is, its modules' values, ``statistics`` and the ``nucleus``, by key.

        In evaluation mode and with no graph; 0 at padding. Of several processes each scores a part, and all get the
        whole. ``forward`` takes the place of the plain forward pass.
        """
        width = max((len(row.completion_ids) for row in rows), default=0)
        plain: Forward = lambda sequences, _: policy(sequences, statistics=statistics, top_p=top_p)  # noqa: E731

        @torch.no_grad()
        def run() -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for index, counts in self.share(rows, [(i,) for i in range(len(rows))]):
                sequences = Sequences.of([rows[i] for i in index], policy.device)
                for key, value in (forward or plain)(sequences, index).values().items():
                    whole = found.setdefault(key, value.new_zeros(len(rows), width))
                    if counts:
                        whole[on_device(torch.tensor(index), whole.device), : value.shape[1]] = value
                if progress is not None and counts:
                    progress(len(index))
            return found

        training = policy.training
        policy.eval()
        try:
            found = self.within_memory(rows, run)
        finally:
            policy.train(training)
        return {key: summed(value) for key, value in found.items()}


def token_batches(together: Sequence[Sequence[int]], lengths: Sequence[int], token_budget: int) -> Iterable[list[int]]:
    """Rows in micro-batches of at most ``token_budget`` padded tokens, rows of like length together.

    ``together`` are sets of rows that must not be separated; one that is over the budget goes alone.
    """
    order = sorted(range(len(together)), key=lambda a: (max(lengths[r] for r in together[a]), a))
    batch: list[int] = []
    for index in order:
        some = together[index]
        widest = max(lengths[r] for r in some)  # of all so far
        if batch and widest * (len(batch) + len(some)) > token_budget:
            yield batch
            batch = []
        batch = [*batch, *some]
    if batch:
        yield batch


Pair = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and completion ids."""


def score_rows(
    policy: Policy,
    rows: Sequence[Pair],
    token_budget: TokenBudget = 8192,
    temperature: float | Sequence[float] = 1.0,
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Log-probs of each row's completion tokens in nats, in the trainer's numerics.

    ``temperature`` may be one per row.
    """
    heats = [temperature] * len(rows) if isinstance(temperature, (int, float)) else temperature
    own = [Row(*row, heat) for row, heat in zip(rows, heats, strict=True)]
    if not own:
        return []
    micro = MicroBatches(token_budget_of(policy, token_budget))
    return _lists(micro.score(policy, own, progress=progress)["logp"], own)


def score_rows_and_nuclei(
    policy: Policy, rows: Sequence[Pair], token_budget: TokenBudget, temperature: float, top_p: float
) -> list[tuple[list[float], list[float]]]:
    """Of each completion token its log-prob at ``temperature``, and that of the nucleus of ``top_p`` it came from.

    Their difference is the log-prob of a sampler that draws from the nucleus alone.
    """
    own = [Row(*row, temperature) for row in rows]
    found = MicroBatches(token_budget_of(policy, token_budget)).score(policy, own, top_p=top_p)
    logp, nucleus = (_lists(found[key], own) for key in ("logp", "nucleus"))
    whole = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(logp, nucleus, strict=True)]
    return list(zip(whole, nucleus, strict=True))


def _lists(values: Float[Tensor, "R T"], rows: Sequence[Tokens]) -> list[list[float]]:
    table = values.float().cpu()
    return [table[place, : len(row.completion_ids)].tolist() for place, row in enumerate(rows)]
