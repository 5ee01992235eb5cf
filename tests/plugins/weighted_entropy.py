"""SFT with an entropy bonus whose weight at each token is a column of the data."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, ones_like

from rlzoo.inputs import Column, Input
from rlzoo.objective import Objective
from rlzoo.types import Coefficients, TokenBatch


@dataclass(frozen=True)
class WeightedEntropy(Objective):
    """SFT with an entropy bonus: c_t = 1, and -w_t H_t over the vocabulary."""

    name: ClassVar[str] = "weighted-entropy"
    requires: ClassVar[tuple[Input, ...]] = (Column("token_reward"),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(ones_like(batch.logp), logit_weight=batch["token_reward"].to(batch.dtype))

    def logit_term(self, policy_logits: Tensor, reference_logits: Tensor | None, target: Tensor) -> Tensor:
        logp = policy_logits.log_softmax(1)
        return (logp.exp() * logp).sum(1)
