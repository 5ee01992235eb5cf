"""The metrics of a step from unreduced parts, so that they do not depend on micro-batches either."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

from rlzoo.objective import Objective, reduce
from rlzoo.ranks import gathered
from rlzoo.types import Coefficients, TokenBatch


class Sums:
    """Sums over the micro-batches of a step."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._total: dict[str, float] = defaultdict(float)
        self._count: dict[str, float] = defaultdict(float)

    def add(
        self,
        objective: Objective,
        part: TokenBatch,
        coefficients: Coefficients,
        loss: Tensor,
        denominator: float,
    ) -> None:
        """Take a micro-batch in."""
        reported = loss.detach()
        if coefficients.loss is not None and denominator:
            reported = reduce(coefficients.loss, part, objective.normaliser, denominator)
        self._loss += float(reported)
        per_token = {"logp": part.logp.detach(), "coefficient": coefficients.values, **coefficients.metrics}
        for name, value in per_token.items():
            inside = value[part.mask] if value.ndim == 2 else value
            inside = inside[~inside.isnan()]
            self._total[name] += float(inside.sum())
            self._count[name] += inside.numel()

    def over_processes(self) -> Sums:
        """The sums over all processes, in order of their numbers."""
        whole = Sums()
        for part in gathered(self):
            whole._loss += part._loss
            for name in part._total:
                whole._total[name] += part._total[name]
                whole._count[name] += part._count[name]
        return whole

    def means(self) -> dict[str, float]:
        """The loss, and the means of the metrics."""
        return {"loss": self._loss, **{name: self._total[name] / max(self._count[name], 1) for name in self._total}}


def coefficients_of_rows(coefficients: Coefficients, index: Tensor, part: TokenBatch) -> Coefficients:
    """The coefficients of some rows of a batch, as wide as the micro-batch that holds them."""

    def cut(x: Tensor) -> Tensor:
        return x[index] if x.ndim == 1 else x[index, : part.logp.shape[1]]

    loss = None if coefficients.loss is None else cut(coefficients.loss)
    return Coefficients(cut(coefficients.values), loss, {k: cut(v) for k, v in coefficients.metrics.items()})
