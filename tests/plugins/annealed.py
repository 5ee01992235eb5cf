"""From SFT to DFT in the course of training: an option that follows the fraction of training that is done."""

from dataclasses import dataclass
from typing import ClassVar

from rlzoo.inputs import Input, TrainingProgress
from rlzoo.objective import Objective
from rlzoo.types import Coefficients, TokenBatch


@dataclass(frozen=True)
class Annealed(Objective):
    """Annealed DFT: c_t = p_t^a, where a is the fraction of training that is done."""

    name: ClassVar[str] = "annealed"
    requires: ClassVar[tuple[Input, ...]] = (TrainingProgress(),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        exponent = batch["progress"]
        return Coefficients((exponent * batch.logp).exp(), metrics={"exponent": exponent.expand(len(batch.mask))})
