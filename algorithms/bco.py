"""BCO: binary classifier optimisation, a classifier of good and bad completions whose logit is the reward.

With r = β Σ_t log(π_θ/π_ref)(y_t) and a shift δ without a gradient, the loss of a pair, averaged over pairs, is

    -log σ(r⁺ - δ) - log σ(δ - r⁻),

so that the coefficient of a token of y⁺ is β σ(δ - r⁺), and of one of y⁻ -β σ(r⁻ - δ). δ is the mean of r over all rows
of the optimizer step or, with ``shift: none``, 0. Source: arXiv 2404.04656, whose δ is a moving average over steps, and
which also covers completions without a partner, with weights for two distributions of prompts; these are not included.
TRL 1.16 has δ = 0, earlier versions had a running mean.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rlzoo.bases import PairLoss, ReferencePairObjective, logistic
from rlzoo.objective import register
from rlzoo.types import Coefficients, Coupling, TokenBatch


@register
@dataclass(frozen=True)
class BCO(ReferencePairObjective):
    """Binary classifier optimisation: c_t = β σ(δ - r⁺) in y⁺, -β σ(r⁻ - δ) in y⁻."""

    name: ClassVar[str] = "bco"
    couples: ClassVar[Coupling] = Coupling.BATCH
    source: ClassVar[str] = "arXiv 2404.04656"
    compared_with: ClassVar[str] = "TRL 1.16"

    shift: Literal["mean", "none"] = "mean"

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        score = self.log_ratio(batch)
        reward = self.beta * score
        shift = reward.mean() if self.shift == "mean" else torch.zeros_like(reward[0])
        better, worse = self.sides(batch, reward - shift)
        (gain, up), (harm, down) = logistic(better), logistic(worse, 0.0, 1.0)
        found = self.of_pairs(batch, score, PairLoss(gain + harm, self.beta * up, self.beta * down))
        return Coefficients(found.values, found.loss, {**found.metrics, "shift": shift.expand_as(reward)})
