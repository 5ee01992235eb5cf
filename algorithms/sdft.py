"""SDFT: self-distillation from the policy itself, which as a teacher also sees a demonstration or the answer.

For samples of the policy, with x⁺ a prompt that says more, the loss is the reverse KL along them as a policy gradient
(`opd` with another teacher):

    c_t = min(ρ_t, ``ratio_max``) [log π_T(y_t | x⁺, y_<t) - log π_θ(y_t | x, y_<t)],

averaged over the tokens of each completion, then over completions. ``template`` makes x⁺ of ``{prompt}`` and the
columns of a row; in a conversation, ``{prompt}`` is its last user turn. The ``teacher`` π_T has the weights of

- ``moving``: an exponential average, θ_T ← d θ_T + (1-d) θ after each step, d = ``teacher_decay``;
- ``initial``: the policy before training, as OPSD recommends;
- ``live``: the policy at the start of the batch.

ρ = π_θ/μ is 1 on fresh samples; with ``ratio_max: null`` it is left out. Rewards are not used.

Sources: SDFT, arXiv 2601.19897, with a moving teacher; OPSD, arXiv 2601.18734. Both compare whole next-token
distributions; the form for sampled tokens is a variant in OPSD's code (``use_tinker_loss``) and in TRL 1.16
(``sampled_token``), whose defaults ρ ≤ 2 and d = 0.95 are used here, as is its template with a column's name. Of the
papers only excerpts were seen.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rlzoo.bases.ratios import token_ratio
from rlzoo.inputs import Behaviour, Input, Privileged
from rlzoo.objective import Normaliser, Objective, register
from rlzoo.types import Coefficients, Selection, TokenBatch


@register
@dataclass(frozen=True)
class SDFT(Objective):
    """Self-distillation fine-tuning: c_t = min(ρ, 2) (log π_T(y_t | x⁺) - log π_θ(y_t | x))."""

    name: ClassVar[str] = "sdft"
    learns_from: ClassVar[Selection] = Selection.GROUPS
    normaliser: ClassVar[Normaliser] = Normaliser.PER_SEQUENCE
    source: ClassVar[str] = "arXiv 2601.19897"
    compared_with: ClassVar[str] = "TRL 1.16"

    template: str = "{prompt}\n\n{answer}"
    teacher: Literal["moving", "initial", "live"] = "moving"
    teacher_decay: float = 0.95
    ratio_max: float | None = 2.0

    @property
    def requires(self) -> tuple[Input, ...]:
        decay = {"moving": self.teacher_decay, "initial": 1.0, "live": 0.0}[self.teacher]
        teacher = Privileged(self.template, decay=decay)
        return (teacher,) if self.ratio_max is None else (teacher, Behaviour())

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        (teacher,) = self.needed(batch, "privileged_logp")
        gap = torch.where(batch.mask, teacher - batch.logp, 0)
        if self.ratio_max is None:
            return Coefficients(gap, metrics={"reverse_kl": -gap})
        (behaviour,) = self.needed(batch, "behaviour_logp")
        ratio = token_ratio(batch.logp, behaviour, batch.mask)
        return Coefficients(ratio.clamp(max=self.ratio_max) * gap, metrics={"reverse_kl": -gap, "ratio": ratio})
