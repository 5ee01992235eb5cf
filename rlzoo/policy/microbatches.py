"""Running rows through a policy: in micro-batches, shared by processes, and halved if memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlzoo.config import TokenBudget
from rlzoo.errors import UserError
from rlzoo.inputs import Input
from rlzoo.jobs.memory import is_out_of_memory, on_device, release_memory
from rlzoo.jobs.ranks import gathered, is_sharded, rank, summed, world_size
from rlzoo.jobs.restarts import restart_with
from rlzoo.policy.defaults import token_budget_of
from rlzoo.policy.policy import ForwardPass, Policy
from rlzoo.policy.sequences import Row, Sequences, Tokens, learned_tokens, length

T = TypeVar("T")
Forward = Callable[[Sequences, list[int]], ForwardPass]
"""A forward pass of the rows with these indices."""


class MicroBatches:
    """Micro-batches of at most ``token_budget`` tokens, padding included; the budget is halved if memory runs out."""

    def __init__(self, token_budget: int, on_halved: Callable[[int, int], None] | None = None) -> None:
        """``on_halved`` is called with the budget that did not fit and the new one."""
        self.token_budget, self._on_halved = token_budget, on_halved

    def share(
        self, rows: Sequence[Tokens], units: Sequence[Sequence[int]], packed: bool = False
    ) -> list[tuple[list[int], bool]]:
        """This process's micro-batches, and whether each counts; all processes have equally many.

        ``units`` are sets of rows that must not be separated; ``packed`` micro-batches have no padding. Processes run
        in step, so if there are too few micro-batches, one is repeated that does not count.
        """
        lengths, world = list(map(length, rows)), world_size()
        budget = min(self.token_budget, -(-sum(lengths) // world)) if world > 1 else self.token_budget
        batches = list(token_batches(units, lengths, budget, packed))
        own = range(rank(), -(-len(batches) // world) * world, world)
        return [(batches[i], True) if i < len(batches) else (batches[0], False) for i in own]

    def within_memory(
        self,
        rows: Sequence[Tokens],
        work: Callable[[], T],
        undo: Callable[[], None] | None = None,
        in_step: bool = False,
    ) -> T:
        """The result of ``work``; if memory runs out in one process, all repeat it with half the budget.

        ``undo`` discards what a failed attempt left behind. If processes work ``in_step``, as those of a sharded model
        do, the others still wait for the failed one: all are restarted with half the budget. Raises UserError if they
        cannot be, and if a single row does not fit.
        """
        while True:
            failed = None
            try:
                found = work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = str(error)
            failures = [failed] if in_step else gathered(failed)
            reasons = [each for each in failures if each is not None]
            if not reasons:
                return found
            if self.token_budget <= max(map(length, rows)):
                raise UserError(f"out of memory with one sequence per micro-batch: {reasons[0]}")
            if undo is not None and not in_step:
                undo()
            release_memory()
            before, self.token_budget = self.token_budget, self._halved(rows)
            if self._on_halved is not None:
                self._on_halved(before, self.token_budget)
            if in_step:
                restart_with("tokens", self.token_budget)
                raise UserError(
                    f"out of memory with {before} tokens per micro-batch in one process of a sharded model, which "
                    f"cannot retry on its own: lower training.token_budget ({reasons[0]:.160})"
                )

    def _halved(self, rows: Sequence[Tokens]) -> int:
        """Half of the largest number of tokens that a micro-batch of these rows can have."""
        return max(min(self.token_budget, -(-sum(map(length, rows)) // world_size())) // 2, 1)

    def log_probs(
        self,
        policy: Policy,
        rows: Sequence[Tokens],
        statistics: Sequence[Input] = (),
        top_p: float = 1.0,
        forward: Forward | None = None,
        progress: Callable[[int], None] | None = None,
        undo: Callable[[], None] | None = None,
    ) -> dict[str, Float[Tensor, "R T"]]:
        """``logp`` of all rows in nats, ``statistics`` and ``nucleus``, by key: each [R, T]; and module outputs.

        T counts learned tokens. In evaluation mode and without a graph; 0 at padding. Processes share the work, and all
        get the full result. ``forward`` replaces the plain forward pass, and ``undo`` discards what it left behind if
        memory runs out. ``progress`` is called with the number of rows just done. Raises UserError if a single row does
        not fit into memory.
        """
        width = max(map(learned_tokens, rows), default=0)
        plain: Forward = lambda sequences, _: policy(sequences, statistics=statistics, top_p=top_p)  # noqa: E731

        @torch.no_grad()
        def run() -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for index, counts in self.share(rows, [(i,) for i in range(len(rows))], policy.packs):
                sequences = policy.collate([rows[i] for i in index])
                for key, value in (forward or plain)(sequences, index).values().items():
                    whole = found.setdefault(key, value.new_zeros(len(rows), width, *value.shape[2:]))
                    if counts:
                        whole[on_device(torch.tensor(index), whole.device), : value.shape[1]] = value
                if progress is not None and counts:
                    progress(len(index))
            return found

        training = policy.training
        policy.eval()
        try:
            found = self.within_memory(rows, run, undo, in_step=is_sharded(policy))
        finally:
            policy.train(training)
        return {key: summed(value) for key, value in found.items()}


class FirstPass:
    """The forward pass of a batch's first micro-batch, kept with its graph from a batch's log-probs to its gradient.

    A step that needs the policy's log-probs beforehand, as a snapshot or for coefficients that depend on the whole
    batch, would run the same rows through the same weights twice, first without and then with a graph. Micro-batches
    are filled one after another, so the first has most rows of a batch that just exceeds the token budget. Only one is
    kept, because the budget bounds the graphs that are in memory at a time.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        """``context`` is that of forward passes in training."""
        self._context = context
        self._kept: tuple[list[int], ForwardPass] | None = None

    def forward(self, policy: Policy, statistics: Sequence[Input]) -> Forward:
        """A forward pass for `MicroBatches.log_probs`, the first of which is kept."""
        self.drop()

        def run(sequences: Sequences, index: list[int]) -> ForwardPass:
            if self._kept is not None:
                return policy(sequences, statistics=statistics)  # type: ignore[no-any-return]
            with torch.enable_grad(), self._context():
                self._kept = index, policy(sequences, statistics=statistics)
            return self._kept[1]

        return run

    def take(self, index: list[int]) -> ForwardPass | None:
        """The pass, if one is kept and is of the rows with these indices; afterwards none is kept."""
        kept = self._kept
        self.drop()
        return kept[1] if kept is not None and kept[0] == index else None

    def drop(self) -> None:
        """Release the pass and its graph."""
        self._kept = None


def token_batches(
    units: Sequence[Sequence[int]], lengths: Sequence[int], token_budget: int, packed: bool = False
) -> Iterable[list[int]]:
    """Row indices of micro-batches of at most ``token_budget`` tokens, of rows of similar length.

    Padding counts unless ``packed``. ``units`` are sets of rows that must not be separated; a unit that exceeds the
    budget is a micro-batch of its own.
    """
    order = sorted(range(len(units)), key=lambda unit: (max(lengths[row] for row in units[unit]), unit))
    batch: list[int] = []
    held = 0  # tokens in the batch
    for index in order:
        some = units[index]
        widest = max(lengths[row] for row in some)  # of all rows so far
        own = sum(lengths[row] for row in some)
        if batch and (held + own if packed else widest * (len(batch) + len(some))) > token_budget:
            yield batch
            batch, held = [], 0
        batch, held = [*batch, *some], held + own
    if batch:
        yield batch


Pair = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and completion ids."""


def log_probs(
    policy: Policy,
    rows: Sequence[Pair],
    token_budget: TokenBudget = 8192,
    temperature: float | Sequence[float] = 1.0,
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """Log-probs of each row's completion tokens in nats, with the same numerics as in training.

    ``temperature`` may be one per row. Raises UserError if a single row does not fit into memory.
    """
    heats = [temperature] * len(rows) if isinstance(temperature, (int, float)) else temperature
    own = [Row(*row, heat) for row, heat in zip(rows, heats, strict=True)]
    if not own:
        return []
    micro = MicroBatches(token_budget_of(policy, token_budget))
    return _lists(micro.log_probs(policy, own, progress=progress)["logp"], own)


def log_probs_and_nuclei(
    policy: Policy, rows: Sequence[Pair], token_budget: TokenBudget, temperature: float, top_p: float
) -> list[tuple[list[float], list[float]]]:
    """Per row, log π of each completion token at ``temperature`` and of each position's ``top_p`` nucleus, in nats.

    log π(token) - log π(nucleus) is the log-prob under nucleus sampling (arXiv 1904.09751).
    """
    own = [Row(*row, temperature) for row in rows]
    found = MicroBatches(token_budget_of(policy, token_budget)).log_probs(policy, own, top_p=top_p)
    logp, nucleus = (_lists(found[key], own) for key in ("logp", "nucleus"))
    whole = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(logp, nucleus, strict=True)]
    return list(zip(whole, nucleus, strict=True))


def _lists(values: Float[Tensor, "R T"], rows: Sequence[Tokens]) -> list[list[float]]:
    table = values.float().cpu()
    return [table[place, : len(row.completion_ids)].tolist() for place, row in enumerate(rows)]
