"""EAFT: entropy-adaptive fine-tuning, SFT with each token weighted by the policy's uncertainty.

Loss: -sg(H_t / ln 20) log p_t, averaged over the completion tokens of the step, where H_t is the entropy of the 20
most likely tokens at the position, renormalised. The weight is 0 where one token has all the mass, and 1 where the 20
are equally likely. Little is learned where the policy is certain of another token, which p_t alone cannot distinguish
from uncertainty. Source: arXiv 2601.02151, with its linear weight; its code divides by 3 in place of ln 20 = 2.9957.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from rlzoo.inputs import Input, Statistic
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch

TOKENS = 20
"""The number of tokens that `Statistic("top_entropy")` uses."""


@register
@dataclass(frozen=True)
class EAFT(Objective):
    """Entropy-adaptive fine-tuning: c_t = H_t/ln 20, H_t the entropy of the top 20."""

    name: ClassVar[str] = "eaft"
    source: ClassVar[str] = "arXiv 2601.02151"

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Statistic("top_entropy"),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(batch["top_entropy"] / math.log(TOKENS))
