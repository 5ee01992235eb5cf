"""SFT that keeps last hidden states [B, T, H] near those of the initial policy, a frozen copy of its trunk."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn, ones_like

from rlzoo import Coefficients, Input, Objective, TokenBatch
from rlzoo.inputs import Stage


@dataclass(frozen=True)
class States(Input):
    stage: ClassVar[Stage] = Stage.FORWARD
    key: str = "states"
    frozen: bool = False

    def module(self, policy: Any) -> nn.Module:
        return policy.copy_of_trunk().requires_grad_(False) if self.frozen else nn.Identity()

    def trunk(self, module: nn.Module) -> nn.Module | None:
        return module if self.frozen else None

    def of_hidden(self, module: Any, hidden: Tensor) -> Tensor:
        return hidden

    def example(self, logp: Tensor, draw: Any) -> Tensor:
        return super().example(logp, draw)[..., None].repeat(1, 1, 3).cos()


@dataclass(frozen=True)
class NearTheStart(Objective):
    name: ClassVar[str] = "near-the-start"
    requires: ClassVar[tuple[Input, ...]] = (States(), States("first_states", frozen=True))

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(ones_like(batch.logp))

    def auxiliary(self, batch: TokenBatch) -> dict[str, Tensor]:
        return {"drift": 0.5 * (batch["states"] - batch["first_states"].detach()).square().sum(-1)}
