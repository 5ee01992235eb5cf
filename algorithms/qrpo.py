"""QRPO: regression of the policy's log-ratio to the reference on the quantile of the reward.

With q the fraction of the rewards of the reference's samples that are at most r, the loss of a completion, averaged
over completions, is

    (β log(π_θ/π_ref)(y) - (q - β log Z))²,    Z = β (e^{1/β} - 1).

Quantiles of the reference's samples are uniform, whatever the reward, so that the partition function Z of the policy
π_ref exp(q/β) that maximises E[q] - β KL(π ‖ π_ref) is known. The paper's code takes log Z = log β + 1/β, which differs
by less than 5e-5 for β ≤ 0.1.

With rewards of 0 and 1 quantiles are not uniform, and this Z is an approximation: a wrong sample has the higher a
target the fewer of its group are right, and where none is, the highest, so that it is imitated. `a-star-po` takes Z
from the group. In a group half of which is right, the targets are 0.23 and -0.27 for β = 0.1; with a smaller β wrong
samples have most of the gradient, and with a larger one right samples.

The paper samples the reference separately. Here q is the fraction of the group's other samples, which is right for a
buffer that the initial policy has sampled; a group of one has no quantile, and is left out. Source: arXiv 2507.08068,
with the identity as the transformation of q. The paper tunes ``beta`` per data set, from 3e-4 to 0.1.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlzoo.advantages import quantile
from rlzoo.bases import LogRatioRegression
from rlzoo.objective import register
from rlzoo.types import TokenBatch


@register
@dataclass(frozen=True)
class QRPO(LogRatioRegression):
    """Quantile reward policy optimisation: c_t = 2β (q - β log Z - β log(π_θ/π_ref)(y))."""

    name: ClassVar[str] = "qrpo"
    source: ClassVar[str] = "arXiv 2507.08068"

    beta: float = 0.1

    def prepare(self, batch: TokenBatch) -> TokenBatch:
        (group,) = self.needed(batch, "group")
        has_others = (group[:, None] == group).sum(1) > 1
        return super().prepare(batch.replace(mask=batch.mask & has_others[:, None]))

    def advantage(self, batch: TokenBatch) -> Tensor:
        reward, group = self.needed(batch, "reward", "group")
        log_z = math.log(self.beta) + 1 / self.beta + math.log1p(-math.exp(-1 / self.beta))
        return (quantile(reward, group) - self.beta * log_z).to(batch.dtype)
