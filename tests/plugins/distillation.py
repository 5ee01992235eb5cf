"""On-policy distillation: samples of the policy, each token weighted by how much more likely a teacher finds it.

Loss: KL(π_θ ‖ π_teacher) along the policy's own samples; c_t = log π_teacher(y_t) - log π_θ(y_t), with no gradient.
"""

from dataclasses import dataclass
from typing import ClassVar

from rlzoo.inputs import Input, Reference
from rlzoo.objective import Objective
from rlzoo.types import Coefficients, Selection, TokenBatch


@dataclass(frozen=True)
class OnPolicyDistillation(Objective):
    """On-policy distillation: c_t = log π_teacher - log π_θ."""

    name: ClassVar[str] = "on-policy-distillation"
    learns_from: ClassVar[Selection] = Selection.UNPAIRED

    teacher: str

    @property
    def requires(self) -> tuple[Input, ...]:
        return (Reference(self.teacher, as_key="teacher_logp"),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        gap = batch["teacher_logp"] - batch.logp
        return Coefficients(gap, metrics={"gap": gap})
