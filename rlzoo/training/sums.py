"""The metrics of a step, from sums of unreduced values, so that they do not depend on micro-batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from rlzoo.jobs.ranks import gathered
from rlzoo.objective import Objective, reduce
from rlzoo.reward.calling import means
from rlzoo.training.batches import Drawn
from rlzoo.types import Coefficients, TokenBatch, Trajectory


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
        """Add a micro-batch."""
        reported = loss.detach()
        if coefficients.loss is not None and denominator:
            # the paper's loss in place of the surrogate's; auxiliary losses and logit terms stay
            main = torch.where(part.mask, coefficients.values, 0) * part.logp.detach()
            reported = reported + reduce(main, part, objective.normaliser, denominator)
            reported = reported + reduce(coefficients.loss, part, objective.normaliser, denominator)
        self._loss += float(reported)
        per_token = {"logp": part.logp.detach(), "coefficient": coefficients.values, **coefficients.metrics}
        for name, value in per_token.items():
            inside = value[part.mask] if value.ndim == 2 else value
            inside = inside[~inside.isnan()]
            self._total[name] += float(inside.sum())
            self._count[name] += inside.numel()

    def over_processes(self) -> Sums:
        """The sums over all processes, in the order of their ranks."""
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
    """The coefficients of some rows of a batch, as wide as their micro-batch."""

    def cut(x: Tensor) -> Tensor:
        return x[index] if x.ndim == 1 else x[index, : part.logp.shape[1]]

    loss = None if coefficients.loss is None else cut(coefficients.loss)
    return Coefficients(cut(coefficients.values), loss, {k: cut(v) for k, v in coefficients.metrics.items()})


def coupled_coefficients(drawn: Drawn) -> Coefficients | None:
    """The coefficients of the whole batch, for an objective with coupling BATCH; else None."""
    objective = drawn.component.objective
    return objective.coefficients(drawn.batch) if objective.is_coupled else None


def metrics_of(drawn: Sequence[Drawn], sums: Sequence[Sums]) -> dict[str, float]:
    """The weighted loss, and the metrics of each component under its label."""
    total, metrics = 0.0, dict[str, float]()
    for some, own in zip(drawn, sums, strict=True):
        found = own.means()
        total += some.component.weight * found["loss"]
        if some.batch.reward is not None:
            found["reward"] = float(some.batch.reward.mean())
        parts = means(row.reward_parts for row in some.rows)
        if len(parts) > 1:  # one alone is the reward itself
            found |= {f"reward/{name}": value for name, value in parts.items()}
        label = f"{some.component.label}/" if some.component.label else ""
        metrics |= {f"{label}{name}": value for name, value in found.items()}
    return {"loss": total, **metrics}


def truncated_importance(rows: Sequence[Trajectory], mask: Tensor, cap: float) -> Tensor:
    """min(π/π_engine, cap) of each token at the time of sampling; 1 for rows of no other engine."""
    weight = torch.ones(mask.shape, device=mask.device)
    for place, row in enumerate(rows):
        if row.sampler_logp is not None and row.behaviour_logp is not None:
            gap = torch.tensor(row.behaviour_logp) - torch.tensor(row.sampler_logp)
            weight[place, : len(gap)] = gap.exp().clamp(max=cap)
    return weight
