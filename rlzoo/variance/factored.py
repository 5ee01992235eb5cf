"""The gradients of one parameter for several units at once, as the factors that a backward pass leaves.

n units of L positions each. Each class gives the squared norm of each unit's gradient, exactly, and a random
projection of it, and adds the sum over units to a running mean. None of them holds n × parameters entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

SKETCH = (32, 32)
"""The random projection of a matrix: to how many output and input dimensions."""
WIDTH = SKETCH[0] * SKETCH[1]
PRODUCT_ENTRIES = 2**20
"""Entries of per-unit products held at a time."""
GRAM_FACTOR = 64.0
"""Gram matrices are used where L² (a + b) < this × a · b: there arithmetic is cheaper than memory traffic."""


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype that norms are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Block:
    """Units of one size in a micro-batch."""

    units: Int[Tensor, " n"]
    """Their indices in the task."""
    rows: Int[Tensor, "n s"]
    """The rows of each in the micro-batch."""

    def cut(self, x: Tensor) -> Tensor:
        """[B, L, …] → [n, s·L, …]; without a copy where the block is the whole micro-batch in order."""
        flat = self.rows.flatten()
        whole = len(flat) == len(x) and bool((flat == torch.arange(len(x), device=flat.device)).all())
        chosen = x if whole else x[flat]
        return chosen.reshape(len(self.rows), -1, *x.shape[2:])


class Outer:
    """Σ_t left_t right_tᵀ: a weight matrix."""

    def __init__(self, left: Float[Tensor, "n L a"], right: Float[Tensor, "n L b"]) -> None:
        self.left, self.right = left, right

    def measure(self, mean: Tensor, scale: float) -> Float[Tensor, " n"]:
        """‖·‖² of each unit; adds scale × the sum over units to ``mean``."""
        left, right = self.left, self.right
        (units, length, a), b = left.shape, right.shape[2]
        if length * length * (a + b) < GRAM_FACTOR * a * b:
            mean.addmm_(left.flatten(0, 1).mT, right.flatten(0, 1), alpha=scale)
            return ((left @ left.mT) * (right @ right.mT)).sum((1, 2))
        found = left.new_empty(units)
        together = max(1, PRODUCT_ENTRIES // (a * b))
        for start in range(0, units, together):
            span = slice(start, start + together)
            product = left[span].mT @ right[span]
            found[span] = product.flatten(1).square().sum(1)
            mean.add_(product.sum(0) if len(product) > 1 else product[0], alpha=scale)
        return found

    def sketch(self, projection: Projection) -> Float[Tensor, "n D"]:
        """A random projection of each unit's gradient."""
        left, right = projection.matrices(self.left.shape[2], self.right.shape[2])
        return ((self.left @ left).mT @ (self.right @ right)).flatten(1)


class Sum:
    """Σ_t v_t: a bias, or the scale of a normalisation."""

    def __init__(self, values: Float[Tensor, "n L a"]) -> None:
        self.values = values.sum(1)

    def measure(self, mean: Tensor, scale: float) -> Float[Tensor, " n"]:
        mean.add_(self.values.sum(0), alpha=scale)
        return self.values.square().sum(1)

    def sketch(self, projection: Projection) -> Float[Tensor, "n D"]:
        place, sign = projection.hashes(self.values.shape[1])
        return self.values.new_zeros(len(self.values), WIDTH).index_add_(1, place, self.values * sign)


class Lookup:
    """Σ_t onehot(id_t) v_tᵀ: an embedding."""

    def __init__(self, ids: Int[Tensor, "n L"], values: Float[Tensor, "n L a"], rows: int) -> None:
        self.ids, self.values, self.rows = ids, values, rows

    def measure(self, mean: Tensor, scale: float) -> Float[Tensor, " n"]:
        mean.index_add_(0, self.ids.flatten(), self.values.flatten(0, 1), alpha=scale)
        same = self.ids[:, :, None] == self.ids[:, None, :]
        return torch.where(same, self.values @ self.values.mT, 0).sum((1, 2))

    def sketch(self, projection: Projection) -> Float[Tensor, "n D"]:
        left, right = projection.matrices(self.rows, self.values.shape[2])
        return (left[self.ids].mT @ (self.values @ right)).flatten(1)


Factored = Outer | Sum | Lookup


class Projection:
    """The random projection of one parameter, drawn once."""

    def __init__(self, seed: int, like: Tensor) -> None:
        self._seed, self._like = seed, like
        self._kept: tuple[Tensor, Tensor] | None = None

    def matrices(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Signs that take both sides of a matrix to `SKETCH` dimensions."""
        if self._kept is None:
            draw = torch.Generator().manual_seed(self._seed)
            sides = zip((rows, columns), SKETCH, strict=True)
            left, right = (self._signs((n, m), draw) / m**0.5 for n, m in sides)
            self._kept = left, right
        return self._kept

    def hashes(self, size: int) -> tuple[Tensor, Tensor]:
        """Place and sign of each entry of a vector: a count sketch."""
        if self._kept is None:
            draw = torch.Generator().manual_seed(self._seed)
            place = torch.randint(WIDTH, (size,), generator=draw).to(self._like.device)
            self._kept = place, self._signs((size,), draw)
        return self._kept

    def _signs(self, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
        signs = torch.randint(2, shape, generator=draw) * 2 - 1
        return signs.to(self._like.device, at_least_float32(self._like.dtype))
