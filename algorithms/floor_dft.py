"""Floor-DFT: DFT whose weight never falls below a floor.

Loss: -sg(max(π_θ(y_t), τ)) log π_θ(y_t), averaged over the completion tokens of the step. DFT hardly learns what the
base finds unlikely, which includes a format, or an end of sequence, that it does not know yet; the floor gives such
tokens a weight of τ. τ = 0 is DFT, τ = 1 is SFT.
Source: none; advice of DFT's author for tasks on which DFT ignores tokens that matter, with τ = 0.1: a comment of
2025-08-11 in issue 1 of github.com/yongliang-wu/DFT (in Chinese), without an experiment.
"""

from dataclasses import dataclass
from typing import ClassVar

from rlzoo.errors import UserError
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class FloorDFT(Objective):
    """DFT with a floor: c_t = max(p_t, τ)."""

    name: ClassVar[str] = "floor-dft"

    floor: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise UserError(f"floor-dft needs a floor between 0 and 1, got {self.floor}")

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        p = batch.logp.exp()
        return Coefficients(p.clamp(min=self.floor), metrics={"at_floor": (p < self.floor).to(p.dtype)})
