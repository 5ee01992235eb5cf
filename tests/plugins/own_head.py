"""SFT with a head of its own, which predicts from the hidden state whether the policy finds the token likely."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn, ones_like

from rlzoo.inputs import Input, Stage
from rlzoo.objective import Objective
from rlzoo.types import Coefficients, TokenBatch


@dataclass(frozen=True)
class Confidence(Input):
    """``confidence`` [B, T]: a linear head on the policy's trunk."""

    stage: ClassVar[Stage] = Stage.FORWARD
    key: ClassVar[str] = "confidence"

    def module(self, policy: Any) -> nn.Module:
        return nn.Linear(policy.hidden_size, 1)

    def of_hidden(self, module: Any, hidden: Tensor) -> Tensor:
        found: Tensor = module(hidden)[:, 0]
        return found


@dataclass(frozen=True)
class WithHead(Objective):
    """SFT with a confidence head: c_t = 1, and a squared error of the head."""

    name: ClassVar[str] = "with-head"
    requires: ClassVar[tuple[Input, ...]] = (Confidence(),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(ones_like(batch.logp))

    def auxiliary(self, batch: TokenBatch) -> Mapping[str, Tensor]:
        return {"confidence": 0.1 * (batch["confidence"] - batch.logp.detach().exp()).square()}
