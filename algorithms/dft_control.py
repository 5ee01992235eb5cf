"""Controls for DFT: what remains of its effect when its weights p are rescaled, averaged or assigned to other tokens.

Within one context, weighting a token by p scales its gradient and the noise of that gradient alike. Any effect of DFT
must therefore come from weighting some tokens more than others, or from a smaller step. With p̄ the mean probability
of the N completion tokens of the optimizer step, the coefficient of a token is

- ``normalised``: p_t / p̄, DFT's weights with the mean weight of SFT;
- ``mean``: p̄, SFT with the mean weight of DFT;
- ``shuffled``: the probability of another token, that is, the same weights unrelated to their tokens. The token with
  the i-th smallest p gets the p of rank perm(i), with one permutation per N, so that the order of rows does not matter.

Source: none; derived from arXiv 2508.05629.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from rlzoo.advantages import masked_mean
from rlzoo.objective import Objective, register
from rlzoo.types import Coefficients, Coupling, TokenBatch


@register
@dataclass(frozen=True)
class DFTControl(Objective):
    """Controls for DFT: c_t = p_t/p̄, p̄, or the p of another token."""

    name: ClassVar[str] = "dft-control"
    couples: ClassVar[Coupling] = Coupling.BATCH

    variant: Literal["normalised", "mean", "shuffled"] = "normalised"

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        p = torch.where(batch.mask, batch.logp.exp(), 0)
        if self.variant != "shuffled":
            mean = masked_mean(p, batch.mask)
            scaled = p / mean.clamp(min=torch.finfo(p.dtype).tiny)
            return Coefficients(scaled if self.variant == "normalised" else mean.expand_as(p))
        tokens = int(batch.mask.sum())
        order = torch.where(batch.mask, batch.logp, torch.inf).flatten().argsort(stable=True)[:tokens]
        rank = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).to(p.device)
        return Coefficients(torch.zeros_like(p).flatten().index_copy(0, order, p.flatten()[order][rank]).view_as(p))
