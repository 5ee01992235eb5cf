"""REINFORCE with a reward of its own for each token, from a column of the data: c_t = Σ_{s ≥ t} r_s."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from rlzoo.inputs import Column, Input
from rlzoo.objective import Objective
from rlzoo.types import Coefficients, Selection, TokenBatch


@dataclass(frozen=True)
class TokenRewards(Objective):
    """REINFORCE on token-level rewards: c_t = the rewards from t on."""

    name: ClassVar[str] = "token-rewards"
    learns_from: ClassVar[Selection] = Selection.UNPAIRED

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Column("token_reward"),)

    def advantages(self, batch: TokenBatch) -> torch.Tensor:
        reward = torch.where(batch.mask, batch["token_reward"], 0).to(batch.dtype)
        return reward.flip(1).cumsum(1).flip(1)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        (advantage,) = self.needed(batch, "advantage")
        return Coefficients(advantage)
