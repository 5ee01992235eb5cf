"""SFT(Q): supervised fine-tuning on demonstrations drawn in proportion to their quality.

Loss: -log π_θ(y_t), averaged over the completion tokens of the step, as in SFT; but a demonstration is drawn, with
replacement, with a probability proportional to its quality score. The score is the row's ``reward``: at least 0, and
one that is twice as large is drawn twice as often. Source: arXiv 2507.12856, which samples this way
rather than filtering by a threshold, because it then bounds the reward for all thresholds at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class QualitySFT(Objective):
    """Quality-sampled supervised fine-tuning: c_t = 1, rows drawn in proportion to their reward."""

    name: ClassVar[str] = "sft-q"
    source: ClassVar[str] = "arXiv 2507.12856"

    @property
    def view_options(self) -> Mapping[str, Any]:
        return {"weighted": True}

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        return Coefficients(torch.ones_like(batch.logp))
