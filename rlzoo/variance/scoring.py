"""One forward pass over the rows of an analysis: log-probs, what the token moments need, and Monte-Carlo draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlzoo.policy import Policy, Sequences
from rlzoo.policy.policy import token_batches
from rlzoo.types import STATISTICS, Need, Trajectory
from rlzoo.variance.moments import TokenTable

BLOCKS = 128
"""Independent Monte-Carlo estimates that the draws of a token are split into."""


@dataclass
class Scored:
    """What forward passes say of some rows, in lists by row: n completion tokens each."""

    rows: list[Trajectory]
    columns: dict[str, list[Float[Tensor, " n"]]]
    """``logp``, ``miss`` = 1 - p, ``others`` = Σ_{v≠y} π_v², token statistics; ``value`` and ``reference`` if any."""
    hits: dict[str, dict[int, Int[np.ndarray, "n R"]]]
    """By objective and row: draws that hit the token, by block."""

    def flat(self, name: str, rows: Sequence[int]) -> Float[np.ndarray, " N"]:
        """A column of some rows, one after the other, in float64."""
        found: Float[np.ndarray, " N"] = torch.cat([self.columns[name][r] for r in rows]).double().cpu().numpy()
        return found

    def table(self, rows: Sequence[int]) -> TokenTable:
        """The completion tokens of some rows, one after the other."""
        row = np.repeat(np.arange(len(rows)), [len(self.columns["logp"][r]) for r in rows])
        return TokenTable(row, *(self.flat(name, rows) for name in ("logp", "miss", "others")))


class _Look:
    """Sees the logits of a micro-batch, chunk by chunk.

    The probability of all other tokens and its squares are summed with the target left out: 1 - p and Σπ² - p² would
    be rounding noise for likely tokens.
    """

    def __init__(self, draws: int, generators: Mapping[str, torch.Generator]) -> None:
        self.draws, self.generators = draws, generators
        self.miss: list[Tensor] = []
        self.others: list[Tensor] = []
        self.hits: dict[str, list[Tensor]] = {name: [] for name in generators}

    def __call__(self, logits: Tensor, _: Tensor | None, target: Tensor) -> None:
        probability = logits.softmax(1)
        for name, generator in self.generators.items():
            drawn = torch.multinomial(probability, self.draws, replacement=True, generator=generator)
            some = (drawn == target[:, None])[:, : self.draws // BLOCKS * BLOCKS]
            self.hits[name].append(some.view(len(target), BLOCKS, -1).sum(2, dtype=torch.int32).cpu())
        probability.scatter_(1, target[:, None], 0.0)
        self.miss.append(probability.sum(1))
        self.others.append(probability.square_().sum(1))


@torch.no_grad()
def score(
    policy: Policy,
    rows: list[Trajectory],
    needs: frozenset[Need],
    experts: Mapping[str, set[int]],
    draws: int,
    seed: int,
    reference: Policy | None,
    token_budget: int,
) -> Scored:
    """Score all rows, with ``draws`` samples per token for each objective on the rows where it weighs an expert."""
    statistics = [need for need in STATISTICS if need in needs]
    generators = {
        name: torch.Generator(policy.device).manual_seed(seed * 1000 + number) for number, name in enumerate(experts)
    }
    found = Scored(rows, {}, {name: {} for name in experts})
    everyone = set().union(*experts.values()) if draws else set()
    lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
    modes = [(model, model.training) for model in (policy, reference) if model is not None]
    try:
        for model, _ in modes:
            model.eval()
        for batch in token_batches([(i,) for i in range(len(rows))], lengths, token_budget):
            sequences = Sequences.of([rows[i] for i in batch], policy.device)
            look = _Look(draws, generators if everyone.intersection(batch) else {})
            scores = policy(sequences, statistics=statistics, term=look)
            columns = {"logp": scores.logp, **scores.statistics}
            columns |= {
                "miss": sequences.spread(torch.cat(look.miss)),
                "others": sequences.spread(torch.cat(look.others)),
            }
            if scores.value is not None:
                columns["value"] = scores.value
            if reference is not None:
                columns["reference"] = reference(sequences).logp
            _keep(found, batch, columns, look, experts)
    finally:
        for model, training in modes:
            model.train(training)
    return found


def _keep(
    found: Scored, batch: Sequence[int], columns: Mapping[str, Tensor], look: _Look, experts: Mapping[str, set[int]]
) -> None:
    counts = [len(found.rows[row].completion_ids) for row in batch]
    for name, values in columns.items():
        kept = found.columns.setdefault(name, [values.new_empty(0)] * len(found.rows))
        for place, (row, count) in enumerate(zip(batch, counts, strict=True)):
            kept[row] = values[place, :count]
    for name, parts in look.hits.items():
        for row, part in zip(batch, torch.split(torch.cat(parts), counts), strict=True):
            if row in experts[name]:
                found.hits[name][row] = part.numpy()
