"""SFT that skips completions which were cut: c_t = 0 in truncated rows."""

from dataclasses import dataclass
from typing import ClassVar

from rlzoo.inputs import Input, Truncated
from rlzoo.objective import Objective
from rlzoo.types import Coefficients, Selection, TokenBatch


@dataclass(frozen=True)
class WholeOnly(Objective):
    """SFT on whole completions: c_t = 1, or 0 where the row is truncated."""

    name: ClassVar[str] = "whole-only"
    learns_from: ClassVar[Selection] = Selection.UNPAIRED
    requires: ClassVar[tuple[Input, ...]] = (Truncated(),)

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        whole = (~batch["truncated"]).to(batch.dtype)
        return Coefficients(whole[:, None].expand_as(batch.logp))
