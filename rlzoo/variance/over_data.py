"""The noise over the data: from the gradients of one pass to the numbers that are reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlzoo.variance.factored import at_least_float32
from rlzoo.variance.intervals import Estimate, nothing, rank_correlation
from rlzoo.variance.noise import Units, against, data_noise, turned, within_by_prompt
from rlzoo.variance.scoring import Scored
from rlzoo.variance.subjects import Subject, SubjectWeights, token_weights
from rlzoo.variance.tasks import UnitGradients

HELD_BYTES = 2**31
HELD = 3
"""As many mean gradients as training holds in addition to the weights: their gradient and AdamW's two averages."""


def portions(names: Sequence[str], base: str | None, held: int) -> list[list[str]]:
    """The objectives measured in each pass over the data, with at most ``held`` mean gradients at a time.

    The baseline's mean gradient is kept after the first pass, because all others are compared with it.
    """
    others = [name for name in names if name != base]
    size = max(1, held - (base is not None))
    found = [others[start : start + size] for start in range(0, len(others), size)] or [[]]
    return found if base is None else [[base, *found[0]], *found[1:]]


def default_held(parameters: Iterable[Tensor], objectives: int) -> int:
    """How many mean gradients to hold: all if they fit into `HELD_BYTES`, else `HELD`."""
    size = sum(p.numel() * at_least_float32(p.dtype).itemsize for p in parameters)
    return objectives if size * objectives <= HELD_BYTES else min(objectives, HELD)


class Comparison:
    """Computes data_noise and layers of each objective, and all cosines, from the gradients of one pass."""

    def __init__(
        self,
        measured: Mapping[str, UnitGradients],
        prompts: Mapping[str, Sequence[int]],
        layer_of: Mapping[str, int],
        layers: Sequence[str],
        base: str | None,
    ) -> None:
        self.measured, self.prompts, self.layers, self.base = measured, prompts, layers, base
        self.names = list(measured)
        self.products = inner_products([measured[name].mean for name in self.names], layer_of, len(layers))
        self._whole = {name: self._units(name, slice(None)) for name in self.names}
        self._cosines: dict[tuple[str, str], Estimate] = {}

    def cosines(self, name: str) -> dict[str, Estimate]:
        """The cosines of an objective's expected gradient with all others of this pass, with intervals."""
        return {other: self._cosine(name, other) for other in self.names}

    def _cosine(self, name: str, other: str) -> Estimate:
        if (name, other) in self._cosines:
            return self._cosines[name, other]
        if (other, name) in self._cosines or (name == self.base != other):  # the same digits as in `noise`
            return turned(self._cosine(other, name))
        of_means, shared = self.of_means(name, other), float(self._within(name, other).sum())
        found = against(self._whole[name], self._whole[other], of_means, shared)["cosine"]
        self._cosines[name, other] = found
        return found

    def of_means(self, name: str, other: str) -> float:
        """The inner product of the mean gradients of two objectives, exact."""
        return float(self.products[:, self.names.index(name), self.names.index(other)].sum())

    def units(self, name: str) -> Units:
        """An objective's gradients over the whole model."""
        return self._whole[name]

    def noise(self, name: str) -> dict[str, Estimate]:
        """The data_noise of an objective over the whole model."""
        return self._noise(name, slice(None))

    def by_layer(self, name: str) -> dict[str, dict[str, Estimate]]:
        """The data_noise of an objective for each layer."""
        return {label: self._noise(name, slice(number, number + 1)) for number, label in enumerate(self.layers)}

    def _noise(self, name: str, layers: slice) -> dict[str, Estimate]:
        whole = layers == slice(None)
        own = self._whole[name] if whole else self._units(name, layers)
        found = data_noise(own)
        if self.base is None:
            missing = nothing("the buffer has no demonstrations to take the baseline's gradient on")
            return {**found, "cosine_to_sft": missing, "norm_ratio_to_sft": missing}
        other = self._whole[self.base] if whole else self._units(self.base, layers)
        k, b = self.names.index(name), self.names.index(self.base)
        of_means, shared = float(self.products[layers, k, b].sum()), float(self._within(name, self.base)[layers].sum())
        pair = against(own, other, of_means, shared)
        return {**found, "cosine_to_sft": pair["cosine"], "norm_ratio_to_sft": pair["norm_ratio"]}

    def _within(self, name: str, other: str) -> Float[np.ndarray, " L"]:
        """The sum over common prompts of the inner products of two objectives' gradients, by layer."""
        first, second = (self.measured[n] for n in (name, other))
        _, a, b = np.intersect1d(self.prompts[name], self.prompts[other], return_indices=True)
        return np.array(
            [
                within_by_prompt(*(part[index, layer].cpu().numpy() for part, index in (
                    (first.squared_norm, a), (second.squared_norm, b), (first.sketch, a), (second.sketch, b)
                )))
                for layer in range(len(self.layers))
            ]
        )  # fmt: skip

    def _units(self, name: str, layers: slice) -> Units:
        """An objective's gradients over some layers."""
        gradients, k = self.measured[name], self.names.index(name)
        squared, sketch = gradients.squared_norm[:, layers].sum(1), gradients.sketch[:, layers].flatten(1)
        mean_squared_norm = float(self.products[layers, k, k].sum())
        return Units(squared.cpu().numpy(), sketch.cpu().numpy(), mean_squared_norm, np.array(self.prompts[name]))


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


def proxies(subject: Subject, weighted: SubjectWeights, scored: Scored, measured: UnitGradients) -> dict[str, Any]:
    """The logit-space proxies for ‖g_p‖² of each prompt, which need no backward pass, and the exact values.

    W = Σ_t S_t and the total power Σ_t a_t² S_t, a_t being the token's weight in the loss: what verl logs for online
    RL, where a_t is the advantage (arXiv 2602.07078).
    """
    exact = measured.squared_norm.sum(1).cpu().numpy()
    rows = subject.rows
    table = scored.table(rows)
    prompt_of = {row: p for p, own in enumerate(subject.prompts.values()) for row in own}
    prompt = np.array([prompt_of[row] for row in rows])[table.row]
    weight = token_weights(subject, weighted, scored)
    score, power = (
        np.bincount(prompt, values, minlength=len(exact)) for values in (table.score_norm, weight**2 * table.score_norm)
    )
    return {
        "score_norm": {"mean": float(score.mean()), "rank_correlation": rank_correlation(score, exact)},
        "total_power": {
            "mean": float(power.mean()),
            "exact": float(exact.mean()),
            "rank_correlation": rank_correlation(power, exact),
        },
        "prompts": {"score_norm": score.tolist(), "total_power": power.tolist(), "exact": exact.tolist()},
    }
