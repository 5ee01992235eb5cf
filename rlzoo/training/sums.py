"""The metrics of a step, from sums of unreduced values, so that they do not depend on micro-batches.

The sums stay on the device until the end of the step and are copied to the CPU together, because every copy waits for
the GPU to finish all work queued so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from rlzoo.jobs.memory import on_device
from rlzoo.jobs.ranks import gathered
from rlzoo.objective import Objective, reduce
from rlzoo.policy.sequences import learned
from rlzoo.reward.calling import means
from rlzoo.training.batches import Drawn
from rlzoo.training.tally import Counts, tallied, with_gradient
from rlzoo.types import Coefficients, TokenBatch, Trajectory

LOSS = "(loss)"
"""The key of the loss among the metrics; no metric of an objective may have this name."""


class Readout:
    """Tensors that are read together, in a single copy to the CPU."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._size = 0

    def add(self, value: Tensor) -> slice:
        """Add a tensor; returns the place of its entries in the result of `read`."""
        flat = value.detach().flatten().double()
        self._parts.append(flat)
        self._size += len(flat)
        return slice(self._size - len(flat), self._size)

    def read(self) -> list[float]:
        """The entries of all tensors, in order, in float64. This waits for the device."""
        if not self._parts:
            return []
        device = self._parts[0].device
        found: list[float] = torch.cat([part.to(device) for part in self._parts]).tolist()
        return found


def reported_loss(
    objective: Objective, part: TokenBatch, coefficients: Coefficients, loss: Tensor, denominator: Tensor | float
) -> Float[Tensor, ""]:
    """The value of a loss with the paper's main loss in place of the surrogate's; auxiliary losses and terms stay."""
    found = loss.detach()
    if coefficients.loss is not None:
        main = torch.where(part.mask, coefficients.values, 0) * part.logp.detach()
        found = found + reduce(main, part, objective.normaliser, denominator)
        found = found + reduce(coefficients.loss, part, objective.normaliser, denominator)
    return found


class Sums:
    """Sums over the micro-batches of a step, in float64, on the device."""

    def __init__(self) -> None:
        self._total: dict[str, Float[Tensor, ""]] = {}
        self._count: dict[str, Float[Tensor, ""]] = {}

    def add(
        self,
        objective: Objective,
        part: TokenBatch,
        coefficients: Coefficients,
        loss: Tensor,
        denominator: Tensor | float,
    ) -> None:
        """Add the loss [] and the metrics [b, T] or [b] of a micro-batch ``part`` of b rows."""
        reported = reported_loss(objective, part, coefficients, loss, denominator)
        self._add(LOSS, reported, torch.zeros_like(reported, dtype=torch.bool))
        per_token = {"logp": part.logp.detach(), "coefficient": coefficients.values, **coefficients.metrics}
        for name, value in per_token.items():
            self._add(name, value, value.isnan() | ~part.mask if value.ndim == 2 else value.isnan())

    def _add(self, name: str, value: Tensor, left_out: Tensor) -> None:
        total, count = torch.where(left_out, 0, value).sum(dtype=torch.float64), (~left_out).sum(dtype=torch.float64)
        self._total[name] = total + self._total[name] if name in self._total else total
        self._count[name] = count + self._count[name] if name in self._count else count

    def into(self, readout: Readout) -> dict[str, tuple[slice, slice]]:
        """Add all sums to a readout; returns the places of each metric's total and count in it."""
        return {name: (readout.add(total), readout.add(self._count[name])) for name, total in self._total.items()}


def means_of(places: Mapping[str, tuple[slice, slice]], numbers: Sequence[float]) -> dict[str, float]:
    """The loss and the means of the metrics over all processes, summed in the order of their ranks."""
    found = {name: (*numbers[total], *numbers[count]) for name, (total, count) in places.items()}
    whole: dict[str, tuple[float, float]] = {}
    for own in gathered(found):
        for name, (total, count) in own.items():
            before = whole.get(name, (0.0, 0.0))
            whole[name] = before[0] + total, before[1] + count
    loss = whole.pop(LOSS, (0.0, 0.0))[0]
    return {"loss": loss, **{name: total / max(count, 1) for name, (total, count) in whole.items()}}


def coefficients_of_rows(coefficients: Coefficients, index: Tensor, part: TokenBatch) -> Coefficients:
    """The coefficients of the rows ``index`` of a batch, cut to the width of the micro-batch ``part``."""

    def cut(x: Tensor) -> Tensor:
        return x[index] if x.ndim == 1 else x[index, : part.logp.shape[1]]

    loss, weight = (None if x is None else cut(x) for x in (coefficients.loss, coefficients.logit_weight))
    return Coefficients(cut(coefficients.values), loss, {k: cut(v) for k, v in coefficients.metrics.items()}, weight)


def coupled_coefficients(drawn: Drawn) -> Coefficients | None:
    """The coefficients of the whole batch, for an objective with coupling BATCH; else None."""
    objective = drawn.component.objective
    return objective.coefficients(drawn.batch) if objective.is_coupled else None


def metrics_of(drawn: Sequence[Drawn], sums: Sequence[Sums], norm: Tensor, counts: Counts | None) -> dict[str, float]:
    """The metrics of a step, read in one copy: nothing else in a step waits for the GPU.

    ``norm`` is that of the gradient; ``counts`` are those of `tallied`.
    """
    readout = Readout()
    places = [own.into(readout) for own in sums]
    rewards = [None if some.batch.reward is None else readout.add(some.batch.reward.mean()) for some in drawn]
    learned = [readout.add(with_gradient(some)) for some in drawn]
    at = readout.add(norm)
    numbers = readout.read()
    means = [means_of(own, numbers) for own in places]
    for some, where, own in zip(drawn, learned, means, strict=True):
        own |= tallied(counts, some, [bool(number) for number in numbers[where]])
    rewarded = [None if where is None else numbers[where][0] for where in rewards]
    return {**_labelled(drawn, means, rewarded), "gradient_norm": numbers[at][0]}


def _labelled(
    drawn: Sequence[Drawn], found: Sequence[Mapping[str, float]], rewards: Sequence[float | None]
) -> dict[str, float]:
    """The weighted loss, and the metrics of each component under its label."""
    total, metrics = 0.0, dict[str, float]()
    for some, own, reward in zip(drawn, found, rewards, strict=True):
        own = dict(own)
        total += some.component.weight * own["loss"]
        if reward is not None:
            own["reward"] = reward
        components = means(row.reward_components for row in some.rows)
        if len(components) > 1:  # one alone is the reward itself
            own |= {f"reward/{name}": value for name, value in components.items()}
        label = f"{some.component.label}/" if some.component.label else ""
        metrics |= {f"{label}{name}": value for name, value in own.items()}
    return {"loss": total, **metrics}


def truncated_importance(rows: Sequence[Trajectory], mask: Tensor, cap: float) -> Tensor:
    """min(π/π_engine, ``cap``) [B, T] of each token when it was sampled; 1 for rows without ``sampler_logp``."""
    weight = torch.ones(mask.shape)
    for place, row in enumerate(rows):
        if row.sampler_logp is not None and row.behaviour_logp is not None:
            gap = (torch.tensor(row.behaviour_logp) - torch.tensor(row.sampler_logp))[learned(row)]
            weight[place, : len(gap)] = gap.exp().clamp(max=cap)
    return on_device(weight, mask.device)
