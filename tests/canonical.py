"""The losses as the papers write them: functions of a `TokenBatch` that autograd differentiates.

They are an oracle, so they share nothing with the code under test: rows are cut to their completion first, so
that padding cannot enter; means, deviations and advantages are plain sums over rows. `CANONICAL` has at least
one `Case` for every registered objective and for every value of every option of a closed set.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlzoo.types import TokenBatch

Loss = Callable[[TokenBatch], Tensor]


@dataclass(frozen=True)
class Case:
    """An objective's options, and its loss as a function of a batch whose advantages are not yet known."""

    loss: Loss
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ",".join(f"{k}={v}" for k, v in self.options.items()) or "default"


def completions(batch: TokenBatch, values: Tensor | None) -> list[Tensor]:
    """One vector a row, of the row's completion tokens only."""
    assert values is not None
    return [row[mask] for row, mask in zip(values, batch.mask, strict=True)]


def token_count(batch: TokenBatch) -> int:
    return int(batch.mask.sum())


def sft(batch: TokenBatch) -> Tensor:
    """-(1/N) Σ log p_t over the N completion tokens."""
    return -torch.cat(completions(batch, batch.logp)).sum() / token_count(batch)


def dft(batch: TokenBatch) -> Tensor:
    """-(1/N) Σ sg(p_t) log p_t (arXiv 2508.05629, eq. 9)."""
    logp = torch.cat(completions(batch, batch.logp))
    return -(logp.exp().detach() * logp).sum() / token_count(batch)


def dft_control(batch: TokenBatch, variant: str = "normalised") -> Tensor:
    """-(1/N) Σ c_t log p_t with c_t = p_t/p̄, p̄, or the probability of another token by rank; no paper."""
    logp = torch.cat(completions(batch, batch.logp))
    p = logp.detach().exp().tolist()
    mean = sum(p) / len(p)
    if variant == "normalised":
        weights = [x / mean for x in p]
    elif variant == "mean":
        weights = [mean] * len(p)
    else:
        order = sorted(range(len(p)), key=lambda t: p[t])
        other = torch.randperm(len(p), generator=torch.Generator().manual_seed(0)).tolist()
        given = {t: p[order[other[rank]]] for rank, t in enumerate(order)}
        weights = [given[t] for t in range(len(p))]
    return -(torch.tensor(weights, dtype=logp.dtype) * logp).sum() / token_count(batch)


def iw_sft_sequence(batch: TokenBatch, kappa: float = 1.0, weight_max: float = 16.0) -> Tensor:
    """-(1/N) Σ_i w_i log π(y_i), w = min(weight_max, κ-th power of the geometric mean of π/π_ref)."""
    total = torch.zeros(())
    for logp, reference in zip(completions(batch, batch.logp), completions(batch, batch.reference_logp), strict=True):
        if len(logp):
            weight = min(math.exp(kappa * (logp.mean() - reference.mean()).item()), weight_max)
            total = total - weight * logp.sum()
    return total / token_count(batch)


def iw_sft_step(batch: TokenBatch, step_min: float = 0.2, step_max: float = 1.8) -> Tensor:
    """-(1/N) Σ clip(π/π_ref, step_min, step_max) log p_t, the ratio under a stop-gradient."""
    logp = torch.cat(completions(batch, batch.logp))
    reference = torch.cat(completions(batch, batch.reference_logp))
    weight = (logp.detach().exp() / reference.exp()).clip(step_min, step_max)
    return -(weight * logp).sum() / token_count(batch)


def rft(batch: TokenBatch, threshold: float = 0.5) -> Tensor:
    """-(1/N) Σ over the rows rewarded as correct of log π(y); N counts the tokens of every row."""
    assert batch.reward is not None
    rows = zip(completions(batch, batch.logp), batch.reward.tolist(), strict=True)
    return -torch.cat([logp if reward >= threshold else 0 * logp for logp, reward in rows]).sum() / token_count(batch)


def dpo(batch: TokenBatch, beta: float = 0.1, variant: str = "sigmoid") -> Tensor:
    """The mean over pairs of -log σ(βΔ), or max(0, 1 - βΔ), or (h̄ - 1/(2β))² (IPO, per-token means)."""
    assert batch.chosen is not None and batch.partner is not None
    logp, reference = completions(batch, batch.logp), completions(batch, batch.reference_logp)
    losses = []
    for better in batch.chosen.nonzero().flatten().tolist():
        worse = int(batch.partner[better])
        gain, harm = logp[better] - reference[better], logp[worse] - reference[worse]
        if variant == "ipo":
            mean_gap = gain.sum() / max(len(gain), 1) - harm.sum() / max(len(harm), 1)
            losses.append((mean_gap - 1 / (2 * beta)) ** 2)
        elif variant == "hinge":
            losses.append(functional.relu(1 - beta * (gain.sum() - harm.sum())))
        else:
            losses.append(-functional.logsigmoid(beta * (gain.sum() - harm.sum())))
    return torch.stack(losses).mean()


def clipped_gain(logp: Tensor, behaviour: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(ρA, clip(ρ, 1-ε, 1+ε) A) of each token (arXiv 1707.06347, eq. 7)."""
    ratio = (logp - behaviour).exp()
    return torch.min(ratio * advantage, ratio.clip(1 - clip, 1 + clip) * advantage)


def grpo(batch: TokenBatch, clip: float = 0.2, kl_coefficient: float = 0.04) -> Tensor:
    """-(1/B) Σ_i (1/|y_i|) Σ_t [min(ρA, clip(ρ) A) - β k3] (arXiv 2402.03300, eq. 3 and 4)."""
    assert batch.reward is not None and batch.group is not None
    rewards, groups = batch.reward.tolist(), batch.group.tolist()
    logp, behaviour = completions(batch, batch.logp), completions(batch, batch.behaviour_logp)
    total = torch.zeros(())
    for i, group in enumerate(groups):
        peers = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        deviation = statistics.stdev(peers) if len(peers) > 1 else 0.0
        advantage = torch.full_like(logp[i], (rewards[i] - statistics.fmean(peers)) / (deviation + 1e-4))
        loss = -clipped_gain(logp[i], behaviour[i], advantage, clip)
        if kl_coefficient:
            log_ratio = completions(batch, batch.reference_logp)[i] - logp[i]
            loss = loss + kl_coefficient * (log_ratio.exp() - log_ratio - 1)
        if len(loss):
            total = total + loss.mean()
    return total / len(groups)


def advantages_by_definition(reward: Tensor, value: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} - V_t, of one row (arXiv 1506.02438, eq. 16)."""
    following = torch.cat([value[1:], value.new_zeros(1)])[: len(value)]
    delta = reward + gamma * following - value
    advantage = [
        sum((gamma * lam) ** (later - t) * float(delta[later]) for later in range(t, len(delta)))
        for t in range(len(delta))
    ]
    return torch.tensor(advantage, dtype=value.dtype)


def ppo(
    batch: TokenBatch,
    clip: float = 0.2,
    dual_clip: float | None = None,
    kl_coefficient: float = 0.05,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    value_clip: float | None = 0.2,
    value_coefficient: float = 0.1,
) -> Tensor:
    """The mean over tokens of -min(ρA, clip(ρ) A) + ½ c_v max((V-R)², (V_clip-R)²) (arXiv 1707.06347, eq. 9).

    A batch without ``value`` gives the policy's part alone.
    """
    assert batch.reward is not None
    logp, old_value = completions(batch, batch.logp), completions(batch, batch.old_value)
    rows: list[Tensor] = []
    for i, score in enumerate(batch.reward.tolist()):
        reward = torch.zeros_like(old_value[i])
        if kl_coefficient:
            reward -= kl_coefficient * (logp[i].detach() - completions(batch, batch.reference_logp)[i])
        if len(reward):
            reward[-1] += score
        rows.append(advantages_by_definition(reward, old_value[i], gamma, lam))
    advantage, old = torch.cat(rows), torch.cat(old_value)
    returns = advantage + old
    if whiten:
        advantage = (advantage - advantage.mean()) / (advantage.var() + 1e-8).sqrt()
    gain = clipped_gain(torch.cat(logp), torch.cat(completions(batch, batch.behaviour_logp)), advantage, clip)
    if dual_clip is not None:
        gain = torch.where(advantage < 0, torch.max(gain, dual_clip * advantage), gain)
    loss = -gain
    if batch.value is not None:
        value = torch.cat(completions(batch, batch.value))
        error = (value - returns) ** 2
        if value_clip is not None:
            near = value.clip(old - value_clip, old + value_clip)
            error = torch.max(error, (near - returns) ** 2)
        loss = loss + value_coefficient * 0.5 * error
    return loss.sum() / token_count(batch)


def paired_means(batch: TokenBatch) -> list[tuple[Tensor, Tensor]]:
    """Of each pair: the mean log-prob of a token of the better completion, and of the worse one."""
    assert batch.chosen is not None and batch.partner is not None
    means = [row.sum() / max(len(row), 1) for row in completions(batch, batch.logp)]
    return [(means[i], means[int(batch.partner[i])]) for i in batch.chosen.nonzero().flatten().tolist()]


def simpo(batch: TokenBatch, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """The mean over pairs of -log σ(β/|y⁺| log π(y⁺) - β/|y⁻| log π(y⁻) - γ) (arXiv 2405.14734)."""
    losses = [-functional.logsigmoid(beta * better - beta * worse - gamma) for better, worse in paired_means(batch)]
    return torch.stack(losses).mean()


def orpo(batch: TokenBatch, lam: float = 0.1) -> Tensor:
    """The mean over pairs of -log P(y⁺) - λ log σ(log (odds(y⁺)/odds(y⁻))) (arXiv 2403.07691, eq. 4 to 7).

    P = exp(mean log-prob), odds = P/(1-P); P is held below exp(-1e-6), as 1 - P must not be 0.
    """

    def odds(mean: Tensor) -> Tensor:
        p = mean.clamp(max=-1e-6).exp()
        return p / (1 - p)

    losses = [
        -better - lam * functional.logsigmoid((odds(better) / odds(worse)).log())
        for better, worse in paired_means(batch)
    ]
    return torch.stack(losses).mean()


def kto(
    batch: TokenBatch,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    threshold: float = 0.5,
) -> Tensor:
    """The mean over rows of λ_y - v(x, y), z0 the step's mismatched log-ratio or 0 (arXiv 2402.01306, eq. 7)."""
    assert batch.reward is not None and batch.mismatched is not None
    baseline = max(float(batch.mismatched[0]), 0.0)
    logp, reference = completions(batch, batch.logp), completions(batch, batch.reference_logp)
    losses = []
    for i, reward in enumerate(batch.reward.tolist()):
        gain = (logp[i] - reference[i]).sum()
        if reward >= threshold:
            losses.append(desirable_weight - desirable_weight * torch.sigmoid(beta * (gain - baseline)))
        else:
            losses.append(undesirable_weight - undesirable_weight * torch.sigmoid(beta * (baseline - gain)))
    return torch.stack(losses).mean()


def mixture(batch: TokenBatch, parts: Mapping[Loss, float]) -> Tensor:
    """Σ_k w_k L_k (arXiv 2508.11408 for a constant μ), here over one batch that all parts see."""
    return torch.stack([weight * loss(batch) for loss, weight in parts.items()]).sum()


def case(loss: Callable[..., Tensor], **options: Any) -> Case:
    """A case whose options the loss takes under the same names."""
    return Case(partial(loss, **options), options)


CANONICAL: dict[str, list[Case]] = {
    "sft": [case(sft)],
    "dft": [case(dft)],
    "dft-control": [case(dft_control, variant=variant) for variant in ("normalised", "mean", "shuffled")],
    "iw-sft": [
        case(iw_sft_sequence),
        case(iw_sft_sequence, kappa=2.0, weight_max=1.1),
        Case(iw_sft_step, {"variant": "per_step"}),
        Case(iw_sft_sequence, {"variant": "ema"}),
    ],
    "rft": [case(rft), case(rft, threshold=0.8)],
    "dpo": [
        case(dpo),
        case(dpo, beta=0.7, variant="sigmoid"),
        case(dpo, beta=0.7, variant="hinge"),
        case(dpo, beta=0.7, variant="ipo"),
    ],
    "ppo": [
        case(ppo),
        case(ppo, dual_clip=1.5),
        case(ppo, value_clip=None),
        case(ppo, whiten=False),
        case(ppo, whiten=False, kl_coefficient=0.0, gamma=0.9, lam=0.5, clip=0.1, value_coefficient=0.7),
        Case(ppo, {"critic": "shared"}),
    ],
    "grpo": [case(grpo), case(grpo, kl_coefficient=0.0), case(grpo, clip=0.1, kl_coefficient=0.5)],
    "simpo": [case(simpo), case(simpo, beta=0.7, gamma=0.0)],
    "orpo": [case(orpo), case(orpo, lam=1.5)],
    "kto": [case(kto), case(kto, beta=0.7, desirable_weight=1.3, undesirable_weight=0.6, threshold=0.8)],
    "mixture": [
        Case(partial(mixture, parts={sft: 0.1, grpo: 0.9}), {"weights": {"sft": 0.1, "grpo": 0.9}}),
        Case(
            partial(mixture, parts={partial(dpo, beta=0.7): 1.0, dft: 0.5}),
            {"weights": {"dpo": 1.0, "dft": 0.5}, "options": {"dpo": {"beta": 0.7}}},
        ),
    ],
}
