"""SFT(Q): supervised fine-tuning on demonstrations drawn in proportion to their quality.

Loss: -log π_θ(y_t), averaged over the completion tokens of the step, as in SFT. Demonstrations are drawn with
replacement, with probabilities proportional to their quality scores. The score of a row is its ``reward``, which must
be at least 0; twice the score is drawn twice as often. Source: arXiv 2507.12856, which samples this way instead of
filtering by a threshold, because this bounds the reward for all thresholds at once.
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
