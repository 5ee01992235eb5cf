"""One forward pass over the rows of an analysis: log-probs, what the token moments need, and Monte-Carlo draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlzoo.config import LEAST_DRAWS
from rlzoo.inputs import Input
from rlzoo.policy import Assembler, ForwardPass, Sequences
from rlzoo.policy.sequences import learned_tokens
from rlzoo.types import Trajectory
from rlzoo.variance.moments import TokenTable

BLOCKS = LEAST_DRAWS // 2
"""The number of independent Monte-Carlo estimates that the draws of a token are split into, of two or more each."""


@dataclass
class Scored:
    """What forward passes compute for some rows, in lists by row; a row has n learned tokens."""

    rows: list[Trajectory]
    columns: dict[str, list[Float[Tensor, " n"]]]
    """``logp``, ``miss`` = 1 - p, ``others`` = Σ_{v≠y} π_v², and inputs of the forward pass."""
    hits: dict[str, dict[int, Int[np.ndarray, "n R"]]]
    """Objective → row → how many draws of each block hit the token."""

    def flat(self, name: str, rows: Sequence[int]) -> Float[np.ndarray, " N"]:
        """A column of some rows, concatenated, in float64."""
        found: Float[np.ndarray, " N"] = torch.cat([self.columns[name][r] for r in rows]).double().cpu().numpy()
        return found

    def table(self, rows: Sequence[int]) -> TokenTable:
        """The learned tokens of some rows, concatenated."""
        row = np.repeat(np.arange(len(rows)), [len(self.columns["logp"][r]) for r in rows])
        return TokenTable(row, *(self.flat(name, rows) for name in ("logp", "miss", "others")))


class _Look:
    """Collects what the moments need from the logits of a micro-batch, chunk by chunk.

    The probabilities of all other tokens, and their squares, are summed without the target: for likely tokens, 1 - p
    and Σπ² - p² would be rounding noise.
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


def score(
    assembler: Assembler,
    rows: list[Trajectory],
    statistics: Sequence[Input],
    experts: Mapping[str, set[int]],
    draws: int,
    seed: int,
) -> Scored:
    """Score all rows, with ``draws`` samples per token for each objective that weights a row's expert tokens."""
    policy = assembler.policy
    generators = {
        name: torch.Generator(policy.device).manual_seed(seed * 1000 + number) for number, name in enumerate(experts)
    }
    found = Scored(rows, {}, {name: {} for name in experts})
    everyone = set().union(*experts.values()) if draws else set()

    def forward(sequences: Sequences, batch: list[int]) -> ForwardPass:
        look = _Look(draws, generators if everyone.intersection(batch) else {})
        scores = policy(sequences, statistics=statistics, term=look)
        counts = [learned_tokens(rows[row]) for row in batch]
        for name, parts in look.hits.items():
            for row, part in zip(batch, torch.split(torch.cat(parts), counts), strict=True):
                if row in experts[name]:
                    found.hits[name][row] = part.numpy()
        sums = {"miss": torch.cat(look.miss), "others": torch.cat(look.others)}
        return ForwardPass(scores.logp, scores.inputs | {n: sequences.spread(flat) for n, flat in sums.items()})

    for name, values in assembler.log_probs(policy, rows, statistics, forward).items():
        found.columns[name] = [values[place, : learned_tokens(row)] for place, row in enumerate(rows)]
    return found
