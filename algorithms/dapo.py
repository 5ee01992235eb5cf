"""DAPO: GRPO with a wider clip above, a mean over tokens, and no groups of equal rewards.

With ρ = π_θ/μ and A = (r - mean_G)/(std_G + 1e-4), the loss of a token is

    -min(ρA, clip(ρ, 1-ε_low, 1+ε_high) A),

averaged over the completion tokens of the step (in the paper, of a group). A group of equal rewards has no gradient,
and its tokens do not count. With ``dynamic_sampling``, such groups of a fixed buffer are left out beforehand, so that
batches are full; online, a batch that consists of such groups is sampled again, a limited number of times before the
run stops, and a batch with some of them is smaller, whereas the paper keeps sampling until it is full.
``truncated: mask`` is the paper's overlong filtering; its soft overlong punishment is the reward ``overlong``.
Source: arXiv 2503.14476; μ and ``delta`` as in `grpo`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlzoo.advantages import group_varies
from rlzoo.bases import ClippedPolicyGradient
from rlzoo.objective import register
from rlzoo.types import TokenBatch


@register
@dataclass(frozen=True)
class DAPO(ClippedPolicyGradient):
    """Decoupled clip and dynamic sampling policy optimisation: c_t = ρ_t A 1[not clipped], over groups that vary."""

    name: ClassVar[str] = "dapo"
    source: ClassVar[str] = "arXiv 2503.14476"
    compared_with: ClassVar[str] = "TRL 1.16"

    clip_low: float = 0.2
    clip_high: float = 0.28
    dynamic_sampling: bool = True

    @property
    def bounds(self) -> tuple[float, float]:
        return self.clip_low, self.clip_high

    @property
    def view_options(self) -> Mapping[str, Any]:
        return {"varied": self.dynamic_sampling}

    def prepare(self, batch: TokenBatch) -> TokenBatch:
        reward, group = self.needed(batch, "reward", "group")
        return super().prepare(batch.replace(mask=batch.mask & group_varies(reward, group)[:, None]))
