"""RFT: rejection-sampling fine-tuning, SFT on the policy's own correct samples.

Loss: -1[correct] log π_θ(y_t), averaged over the completion tokens of the step. The view of the buffer keeps samples
whose reward reaches ``threshold``, drops repeated completions of a prompt, and keeps at most ``samples_per_prompt`` of
the rest. A truncated sample that is correct is learned from without an end of sequence, unless ``truncated`` is
``drop``. Source: arXiv 2308.01825, which differs in two ways. It selects samples with ``distinct: equations``, of which
its code drops those with a wrong equation and, of equals, keeps the one whose text is farthest from the others, here
the first. And it trains on samples and demonstrations together, which ``with_demonstrations`` does here, with every row
once per epoch and the coefficient 1. A `mixture` of `sft` and `rft` gives each its own weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, Selection, TokenBatch


@register
@dataclass(frozen=True)
class RFT(Objective):
    """Rejection-sampling fine-tuning: c_t = 1[reward ≥ threshold]."""

    name: ClassVar[str] = "rft"
    learns_from: ClassVar[Selection] = Selection.CORRECT
    source: ClassVar[str] = "arXiv 2308.01825"

    threshold: float = 0.5
    samples_per_prompt: int = 4
    with_demonstrations: bool = False
    distinct: Literal["text", "equations"] = "text"

    @property
    def view_options(self) -> Mapping[str, Any]:
        return {
            "threshold": self.threshold,
            "per_prompt": self.samples_per_prompt,
            "with_demonstrations": self.with_demonstrations,
            "distinct": self.distinct,
        }

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        if self.with_demonstrations:  # they need no reward, and the view has no wrong samples
            return Coefficients(torch.ones_like(batch.logp))
        (reward,) = self.needed(batch, "reward")
        correct = (reward >= self.threshold).to(batch.dtype)
        return Coefficients(correct[:, None].expand_as(batch.logp), metrics={"correct": correct})
