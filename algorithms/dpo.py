"""DPO: direct preference optimisation over pairs of a better and a worse completion of one prompt.

With Δ = Σ_t log(π_θ/π_ref)(y⁺) - Σ_t log(π_θ/π_ref)(y⁻), and h̄ the same with means over tokens in place of sums, the
loss of a pair, averaged over pairs, and the coefficient of a token of y⁺ (of y⁻ with the opposite sign) are

- ``sigmoid``: -log σ(βΔ), and β σ(-βΔ);
- ``sigmoid_norm``: -log σ(βh̄), and β σ(-βh̄) / |y|;
- ``robust``: [-(1-ε) log σ(βΔ) + ε log σ(-βΔ)] / (1-2ε), and β [(1-ε) σ(-βΔ) + ε σ(βΔ)] / (1-2ε);
- ``hinge``: max(0, 1 - βΔ), and β 1[βΔ < 1];
- ``ipo``: (h̄ - 1/(2β))², and -2 (h̄ - 1/(2β)) / |y|.

ε is ``label_smoothing``, the share of pairs in the wrong order. The two sigmoid variants with ε > 0 are conservative
DPO: -(1-ε) log σ(z) - ε log σ(-z), with (1-ε) σ(-z) - ε σ(z) in place of σ(-z).

``divergence`` replaces u = Σ_t log(π_θ/π_ref)(y) in Δ and h̄ by f'(exp u), of another f-divergence than the reverse KL,
and multiplies c_t by its derivative in u: ``forward_kl`` is 1 - exp(-u), ``js`` is log 2 + log σ(u), and ``alpha`` is
(exp((α-1) u) - 1) / (α-1) with α = ``divergence_alpha``. Exponents end at 80, as in TRL, so that none overflows.

``sft_coefficient`` λ adds -(λ/|y⁺|) log π_θ(y⁺) to the loss, and thus λ/|y⁺| to the coefficient of y⁺.

Sums and means are over the completion only. Sources: arXiv 2305.18290; SLiC, arXiv 2305.10425 (hinge); arXiv 2310.12036
(IPO), here with means over tokens, as in TRL; arXiv 2411.15124 (length-normalised); arXiv 2403.00409 (robust);
E. Mitchell's note on cDPO; arXiv 2309.16240 (f-divergences); arXiv 2404.19733 (SFT term; in TRL a mean over tokens).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn import functional

from rlzoo.bases import ReferencePairObjective, Rows, check_smoothing, length, logistic, of_margin, total
from rlzoo.errors import UserError
from rlzoo.objective import register
from rlzoo.types import Coefficients, TokenBatch


@register
@dataclass(frozen=True)
class DPO(ReferencePairObjective):
    """Direct preference optimisation: c_t = ±β σ(-βΔ), and its variants."""

    name: ClassVar[str] = "dpo"
    source: ClassVar[str] = "arXiv 2305.18290"
    compared_with: ClassVar[str] = "TRL 1.16"

    variant: Literal["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    divergence_alpha: float = 0.5
    sft_coefficient: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self, self.label_smoothing)
        if self.label_smoothing and self.variant in ("hinge", "ipo"):
            raise UserError(f"objective 'dpo': the variant {self.variant} has no label_smoothing: leave it out")

    def coefficients(self, batch: TokenBatch) -> Coefficients:
        score, slope = self.score(self.log_ratio(batch))
        size = length(batch) if self.variant in ("ipo", "sigmoid_norm") else 1
        better, worse = self.sides(batch, score / size)
        loss, pull = self.loss(better - worse)
        found = of_margin(loss, pull * slope / size)
        if weight := self.sft_coefficient:
            logp, _ = self.sides(batch, total(batch, batch.logp) / length(batch))
            found = found._replace(loss=loss - weight * logp, better=found.better + weight / length(batch))
        return self.of_pairs(batch, score / size, found)

    def loss(self, margin: Rows) -> tuple[Rows, Rows]:
        """The loss of a pair's margin, and its negative derivative."""
        if self.variant == "hinge":
            loss = (1 - self.beta * margin).clamp(min=0)
            return loss, self.beta * (loss > 0).to(loss.dtype)
        if self.variant == "ipo":
            distance = margin - 1 / (2 * self.beta)
            return distance.square(), -2 * distance
        noise = self.label_smoothing
        wrong, whole = (-noise, 1 - 2 * noise) if self.variant == "robust" else (noise, 1.0)
        loss, pull = logistic(self.beta * margin, (1 - noise) / whole, wrong / whole)
        return loss, self.beta * pull

    def score(self, u: Rows) -> tuple[Rows, Rows | float]:
        """f'(exp u) of log-ratios u [B], and its derivative in u."""
        if self.divergence == "js":
            return math.log(2) + functional.logsigmoid(u), torch.sigmoid(-u)
        power = {"reverse_kl": 0.0, "forward_kl": -1.0, "alpha": self.divergence_alpha - 1}[self.divergence]
        if power == 0:
            return u, 1.0
        x = (power * u).clamp(max=80.0)
        return torch.expm1(x) / power, torch.where(power * u > 80.0, 0, x.exp())
