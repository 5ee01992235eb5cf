"""The noise over the data: gradients of some objectives at a time, as the numbers that are reported of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlzoo.variance.noise import Estimate, Units, against, data_noise, nothing, rank_correlation
from rlzoo.variance.pieces import at_least_float32
from rlzoo.variance.scoring import Scored
from rlzoo.variance.subjects import Subject, Weighed
from rlzoo.variance.tasks import UnitGradients

HELD_BYTES = 2**31
HELD = 3
"""As many mean gradients as training holds beside the weights: their gradient and AdamW's two averages."""


def portions(names: Sequence[str], base: str | None, held: int) -> list[list[str]]:
    """The objectives that are measured in one pass over the data, at most ``held`` mean gradients at a time.

    The baseline's stays from the first pass on, as all are compared with it.
    """
    others = [name for name in names if name != base]
    size = max(1, held - (base is not None))
    found = [others[start : start + size] for start in range(0, len(others), size)] or [[]]
    return found if base is None else [[base, *found[0]], *found[1:]]


def default_held(parameters: Iterable[Tensor], objectives: int) -> int:
    """All mean gradients where they fit into `HELD_BYTES`, else `HELD`."""
    size = sum(p.numel() * at_least_float32(p.dtype).itemsize for p in parameters)
    return objectives if size * objectives <= HELD_BYTES else min(objectives, HELD)


class Comparison:
    """Turns the gradients of one pass into data_noise and layers of each objective, and cosines between all."""

    def __init__(
        self,
        measured: Mapping[str, UnitGradients],
        layer_of: Mapping[str, int],
        layers: Sequence[str],
        base: str | None,
    ) -> None:
        self.measured, self.layers, self.base = measured, layers, base
        self.names = list(measured)
        self.products = inner_products([measured[name].mean for name in self.names], layer_of, len(layers))

    def cosines(self, name: str) -> dict[str, float | None]:
        """The cosine of an objective's mean gradient to each of this pass."""
        whole = self.products.sum(0)
        size = np.sqrt(np.diag(whole))
        k = self.names.index(name)
        return {
            other: float(np.clip(whole[k, j] / (size[k] * size[j]), -1, 1)) if size[k] * size[j] else None
            for j, other in enumerate(self.names)
        }

    def noise(self, name: str, paired: bool) -> dict[str, Estimate]:
        """Of the whole model; ``paired`` says whether the objective and the baseline look at the same units."""
        return self._noise(name, slice(None), self.products.sum(0), paired)

    def by_layer(self, name: str, paired: bool) -> dict[str, dict[str, Estimate]]:
        """The same of each layer."""
        return {
            label: self._noise(name, slice(number, number + 1), self.products[number], paired)
            for number, label in enumerate(self.layers)
        }

    def _noise(self, name: str, layers: slice, products: Float[np.ndarray, "K K"], paired: bool) -> dict[str, Estimate]:
        k = self.names.index(name)
        own = _units(self.measured[name], layers, float(products[k, k]))
        found = data_noise(own)
        if self.base is None:
            missing = nothing("the buffer has no demonstrations to take the baseline's gradient on")
            return {**found, "cosine_to_sft": missing, "norm_ratio_to_sft": missing}
        b = self.names.index(self.base)
        other = _units(self.measured[self.base], layers, float(products[b, b]))
        pair = against(own, other, float(products[k, b]), paired)
        return {**found, "cosine_to_sft": pair["cosine"], "norm_ratio_to_sft": pair["norm_ratio"]}


def inner_products(
    means: Sequence[Mapping[str, Tensor]], layer_of: Mapping[str, int], layers: int
) -> Float[np.ndarray, "L K K"]:
    """⟨ḡ, ḡ'⟩ between K mean gradients, by layer, summed in float64."""
    found = np.zeros((layers, len(means), len(means)))
    for name, layer in layer_of.items():
        flat = [mean[name].flatten() for mean in means]
        for start in range(0, len(flat[0]), 2**20):
            block = torch.stack([part[start : start + 2**20].double() for part in flat])
            found[layer] += (block @ block.mT).cpu().numpy()
    return found


def _units(gradients: UnitGradients, layers: slice, mean_squared_norm: float) -> Units:
    """The gradients over some layers."""
    squared, sketch = gradients.squared_norm[:, layers].sum(1), gradients.sketch[:, layers].flatten(1)
    return Units(squared.cpu().numpy(), sketch.double().cpu().numpy(), mean_squared_norm)


def _cosine(product: float, norms: float) -> float | None:
    return None if norms == 0 else float(np.clip(product / norms, -1, 1))


def proxies(subject: Subject, weighed: Weighed, scored: Scored, measured: UnitGradients) -> dict[str, Any]:
    """The logit-space stand-ins for ‖g_u‖² that need no backward pass, against the exact ones.

    W = Σ_t S_t and the total power Σ_t a_t² S_t, a_t being the token's weight in the loss: what verl logs for online
    RL, where a_t is the advantage (arXiv 2602.07078).
    """
    exact = measured.squared_norm.sum(1).cpu().numpy()
    rows = subject.rows
    table = scored.table(rows)
    unit_of = {row: u for u, unit in enumerate(subject.units) for row in unit}
    unit = np.array([unit_of[row] for row in rows])[table.row]
    weights = (weighed.task.weight[rows] * weighed.task.scale).double().cpu().numpy()  # 0 where a token is masked
    weight = np.concatenate(
        [own[: len(scored.rows[row].completion_ids)] for row, own in zip(rows, weights, strict=True)]
    )
    score, power = (
        np.bincount(unit, values, minlength=len(exact)) for values in (table.score_norm, weight**2 * table.score_norm)
    )
    return {
        "score_norm": {"mean": float(score.mean()), "rank_correlation": rank_correlation(score, exact)},
        "total_power": {
            "mean": float(power.mean()),
            "exact": float(exact.mean()),
            "rank_correlation": rank_correlation(power, exact),
        },
        "units": {"score_norm": score.tolist(), "total_power": power.tolist(), "exact": exact.tolist()},
    }
