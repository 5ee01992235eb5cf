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


def over_sequences(batch: TokenBatch, loss: Callable[[TokenBatch], Tensor]) -> Tensor:
    """The mean over sequences of a mean over tokens, that is of the loss of each sequence as a batch of its own."""
    rows = [batch.rows(torch.tensor([i]), batch.mask.shape[1]) for i in range(len(batch.mask)) if batch.mask[i].any()]
    return torch.stack([loss(row) for row in rows]).sum() / len(batch.mask)


def dft_of_completions(batch: TokenBatch, geometric: bool) -> Tensor:
    """-(1/N) Σ_i w_i log π(y_i), w the probability of the completion or its n-th root (arXiv 2508.05629, ablation)."""
    total = torch.zeros(())
    for logp in completions(batch, batch.logp):
        if len(logp):
            weight = math.prod(logp.detach().exp().tolist()) ** (1 / len(logp) if geometric else 1)
            total = total - weight * logp.sum()
    return total / token_count(batch)


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


def log_ratios_of_pairs(batch: TokenBatch) -> list[tuple[Tensor, Tensor]]:
    """Of each pair: log π/π_ref of each token of the better completion, and of the worse one."""
    assert batch.chosen is not None and batch.partner is not None
    logp, reference = completions(batch, batch.logp), completions(batch, batch.reference_logp)
    rows = [a - b for a, b in zip(logp, reference, strict=True)]
    return [(rows[i], rows[int(batch.partner[i])]) for i in batch.chosen.nonzero().flatten().tolist()]


def sums_of_pairs(batch: TokenBatch) -> list[tuple[Tensor, Tensor]]:
    """Of each pair: Σ_t log π/π_ref of the better completion, and of the worse one."""
    return [(gain.sum(), harm.sum()) for gain, harm in log_ratios_of_pairs(batch)]


F_PRIME: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda t, _: t.log(),
    "forward_kl": lambda t, _: 1 - 1 / t,
    "js": lambda t, _: (2 * t / (1 + t)).log(),
    "alpha": lambda t, alpha: (t ** (alpha - 1) - 1) / (alpha - 1),
}
"""f'(t) of each divergence (arXiv 2309.16240, table 1, up to a constant)."""


def dpo(
    batch: TokenBatch,
    beta: float = 0.1,
    variant: str = "sigmoid",
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
    sft_coefficient: float = 0.0,
) -> Tensor:
    """The mean over pairs of the loss of Δ, or of the difference h̄ of per-token means, and of the SFT term."""
    log_sigmoid, losses, e = functional.logsigmoid, [], label_smoothing
    for gain, harm in log_ratios_of_pairs(batch):
        better, worse = (F_PRIME[divergence](x.sum().exp(), divergence_alpha) for x in (gain, harm))
        if variant in ("ipo", "sigmoid_norm"):
            better, worse = better / max(len(gain), 1), worse / max(len(harm), 1)
        z = beta * (better - worse)
        if variant == "ipo":
            loss = (better - worse - 1 / (2 * beta)) ** 2
        elif variant == "hinge":
            loss = functional.relu(1 - z)
        elif variant == "robust":
            loss = (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)
        else:
            loss = -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)
        losses.append(loss)
    loss = torch.stack(losses).mean()
    if sft_coefficient:
        loss = loss - sft_coefficient * torch.stack([better for better, _ in paired_means(batch)]).mean()
    return loss


def exo(batch: TokenBatch, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """The mean over pairs of KL(softmax(β log π/π_ref) ‖ (1-ε, ε)) (arXiv 2402.00856, eq. 16)."""
    losses = []
    for gain, harm in sums_of_pairs(batch):
        q = (beta * torch.stack([gain, harm])).softmax(0)
        label = torch.tensor([1 - label_smoothing, label_smoothing], dtype=q.dtype)
        losses.append((q * (q / label).log()).sum())
    return torch.stack(losses).mean()


def nca(batch: TokenBatch, beta: float = 0.1) -> Tensor:
    """The mean over pairs of -log σ(r⁺) - ½ log σ(-r⁺) - ½ log σ(-r⁻) (arXiv 2402.05369)."""
    log_sigmoid = functional.logsigmoid
    losses = [
        -log_sigmoid(beta * a) - (log_sigmoid(-beta * a) + log_sigmoid(-beta * b)) / 2 for a, b in sums_of_pairs(batch)
    ]
    return torch.stack(losses).mean()


def bco(batch: TokenBatch, beta: float = 0.1, shift: str = "mean") -> Tensor:
    """The mean over pairs of -log σ(r⁺ - δ) - log σ(-(r⁻ - δ)), δ the mean of all r, or 0 (arXiv 2404.04656)."""
    pairs = [(beta * gain, beta * harm) for gain, harm in sums_of_pairs(batch)]
    delta = sum(float(a.detach() + b.detach()) for a, b in pairs) / (2 * len(pairs)) if shift == "mean" else 0.0
    losses = [-functional.logsigmoid(a - delta) - functional.logsigmoid(delta - b) for a, b in pairs]
    return torch.stack(losses).mean()


def sppo(batch: TokenBatch, beta: float = 0.1) -> Tensor:
    """The mean over pairs of the squared distances of log π/π_ref to ±η/2, η = 1/β (arXiv 2405.00675, eq. 4.7)."""
    losses = [(gain - 0.5 / beta) ** 2 + (harm + 0.5 / beta) ** 2 for gain, harm in sums_of_pairs(batch)]
    return torch.stack(losses).mean()


def apo(batch: TokenBatch, beta: float = 0.1, variant: str = "zero") -> Tensor:
    """The mean over pairs of -σ(r⁺) + σ(r⁻) + 1, or of σ(r⁺) - σ(r⁺ - r⁻) + 1 (arXiv 2408.06266, eq. 7 and 8)."""
    losses = []
    for gain, harm in sums_of_pairs(batch):
        better, worse, both = (1 / (1 + (-beta * x).exp()) for x in (gain, harm, gain - harm))
        losses.append(1 - better + worse if variant == "zero" else better + 1 - both)
    return torch.stack(losses).mean()


def aot(batch: TokenBatch, beta: float = 0.1, variant: str = "paired", label_smoothing: float = 0.0) -> Tensor:
    """The mean over k of the logistic loss of the difference of k-th smallest values (arXiv 2406.05882)."""
    if variant == "paired":
        assert batch.chosen is not None and batch.partner is not None
        rows = [(i, int(batch.partner[i])) for i in batch.chosen.nonzero().flatten().tolist()]
        of_both = [completions(batch, values) for values in (batch.logp, batch.reference_logp)]
        left, right = ([values[i].sum() - values[j].sum() for i, j in rows] for values in of_both)
    else:
        left, right = ([pair[side] for pair in sums_of_pairs(batch)] for side in (0, 1))
    losses = []
    for u, v in zip(sorted(left, key=float), sorted(right, key=float), strict=True):
        z = beta * (u - v)
        losses.append(-(1 - label_smoothing) * functional.logsigmoid(z) - label_smoothing * functional.logsigmoid(-z))
    return torch.stack(losses).mean()


def discopop(batch: TokenBatch, beta: float = 0.1, tau: float = 0.05) -> Tensor:
    """The mean over pairs of (1-m) log(1 + e^-z) + m e^-z, m = σ(z/τ) (arXiv 2406.08414, eq. 5)."""
    losses = []
    for gain, harm in sums_of_pairs(batch):
        z = beta * (gain - harm)
        m = torch.sigmoid(z / tau)
        losses.append((1 - m) * (1 + (-z).exp()).log() + m * (-z).exp())
    return torch.stack(losses).mean()


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp of log-ratios held within ±20, as verl holds them: beyond, a loss is flat."""
    return log_ratio.clip(-20, 20).exp()


def clipped_gain(
    logp: Tensor,
    behaviour: Tensor,
    advantage: Tensor | float,
    clip: float,
    delta: float | None = None,
    clip_high: float | None = None,
) -> Tensor:
    """min(ρA, clip(ρ, 1-ε, 1+ε) A) of each token (arXiv 1707.06347, eq. 7), the first ρ at most δ (2505.07291)."""
    high = clip if clip_high is None else clip_high
    return asymmetric_gain(ratio_of(logp - behaviour), advantage, clip, high, delta)


KL_ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: -x.log(),
    "k2": lambda x: x.log() ** 2 / 2,
    "k3": lambda x: x - x.log() - 1,
}
"""Of x = π_ref/π_θ (Schulman 2020)."""


def grpo(
    batch: TokenBatch,
    clip: float = 0.2,
    kl_coefficient: float = 0.04,
    kl_correction: bool = False,
    delta: float | None = None,
    clip_high: float | None = None,
    scale_rewards: str = "group",
    aggregation: str = "sequence",
    max_length: int = 256,
    level: str = "token",
    kl_estimator: str = "k3",
) -> Tensor:
    """-(1/B) Σ_i (1/|y_i|) Σ_t [min(ρA, clip(ρ) A) - β k3] (arXiv 2402.03300, eq. 3 and 4); ρ k3 is of 2512.02556.

    A is over the std of the batch, or nothing (``scale_rewards``); ρ is that of the sequence (``level``); and the sums
    are over all tokens, or a constant (``aggregation``).
    """
    assert batch.reward is not None and batch.group is not None
    rewards, groups = batch.reward.tolist(), batch.group.tolist()
    logp, behaviour = completions(batch, batch.logp), completions(batch, batch.behaviour_logp)
    total = torch.zeros(())
    for i, group in enumerate(groups):
        peers = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        deviation = statistics.stdev(peers) if len(peers) > 1 else 0.0
        scales = {"group": deviation + 1e-4, "batch": statistics.stdev(rewards) + 1e-4, "none": 1.0}
        advantage = torch.full_like(logp[i], (rewards[i] - statistics.fmean(peers)) / scales[scale_rewards])
        log_ratio = logp[i] - behaviour[i]
        ratio = ratio_of(log_ratio if level == "token" else log_ratio.mean().expand_as(log_ratio))
        loss = -asymmetric_gain(ratio, advantage, clip, clip if clip_high is None else clip_high, delta)
        if kl_coefficient:
            x = (completions(batch, batch.reference_logp)[i] - logp[i]).clip(max=20).exp()
            weight = ratio_of(logp[i] - behaviour[i]) if kl_correction else 1.0
            loss = loss + kl_coefficient * weight * KL_ESTIMATES[kl_estimator](x)
        if len(loss):
            lengths = {"sequence": len(loss), "token": 1, "constant": max_length}
            total = total + loss.sum() / lengths[aggregation]
    return total / (token_count(batch) if aggregation == "token" else len(groups))


def advantages_by_definition(reward: Tensor, value: Tensor, gamma: float, lam: float, ended: bool = True) -> Tensor:
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} - V_t, of one row (arXiv 1506.02438, eq. 16).

    The value after the last token is 0, or that at the last token where the episode has not ended.
    """
    following = torch.cat([value[1:], value.new_zeros(1) if ended else value[-1:]])[: len(value)]
    delta = reward + gamma * following - value
    advantage = [
        sum((gamma * lam) ** (later - t) * float(delta[later]) for later in range(t, len(delta)))
        for t in range(len(delta))
    ]
    return torch.tensor(advantage, dtype=value.dtype)


def ppo(
    batch: TokenBatch,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    kl_coefficient: float = 0.05,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    value_clip: float | None = 0.2,
    value_coefficient: float = 0.1,
    bootstrap_truncated: bool = False,
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
            old_logp, reference = (completions(batch, x)[i] for x in (batch.snapshot_logp, batch.reference_logp))
            reward -= kl_coefficient * (old_logp - reference)
        if len(reward):
            reward[-1] += score
        ended = not (bootstrap_truncated and bool(batch.truncated[i]))
        rows.append(advantages_by_definition(reward, old_value[i], gamma, lam, ended))
    advantage, old = torch.cat(rows), torch.cat(old_value)
    returns = advantage + old
    if whiten:
        advantage = (advantage - advantage.mean()) / (advantage.var() + 1e-8).sqrt()
    behaviour = torch.cat(completions(batch, batch.behaviour_logp))
    gain = clipped_gain(torch.cat(logp), behaviour, advantage, clip, clip_high=clip_high)
    if dual_clip is not None:
        gain = torch.where(advantage < 0, torch.max(gain, dual_clip * advantage), gain)
    loss = -gain
    if batch.get("value") is not None:
        value = torch.cat(completions(batch, batch.value))
        error = (value - returns) ** 2
        if value_clip is not None:
            near = value.clip(old - value_clip, old + value_clip)
            error = torch.max(error, (near - returns) ** 2)
        loss = loss + value_coefficient * 0.5 * error
    return loss.sum() / token_count(batch)


def groups_of(batch: TokenBatch) -> list[list[int]]:
    """The rows of each group."""
    assert batch.group is not None
    numbers = batch.group.tolist()
    return [[i for i, g in enumerate(numbers) if g == group] for group in dict.fromkeys(numbers)]


def group_advantages(batch: TokenBatch, divide: bool) -> list[float]:
    """r - mean_G of each row, over std_G + 1e-4 where ``divide`` (arXiv 2402.03300, section 4.1.2)."""
    assert batch.reward is not None
    rewards = batch.reward.tolist()
    found = [0.0] * len(rewards)
    for group in groups_of(batch):
        peers = [rewards[i] for i in group]
        scale = (statistics.stdev(peers) if len(peers) > 1 else 0.0) + 1e-4 if divide else 1.0
        for i in group:
            found[i] = (rewards[i] - statistics.fmean(peers)) / scale
    return found


def reinforce(batch: TokenBatch, baseline: str = "mean") -> Tensor:
    """-(1/B) Σ_i (r_i - b) log π(y_i), b the mean reward or 0 (Williams 1992)."""
    assert batch.reward is not None
    rewards = batch.reward.tolist()
    b = statistics.fmean(rewards) if baseline == "mean" else 0.0
    rows = zip(rewards, completions(batch, batch.logp), strict=True)
    return -torch.stack([(reward - b) * logp.sum() for reward, logp in rows]).mean()


def rloo(batch: TokenBatch) -> Tensor:
    """-(1/B) Σ_i (r_i - mean of the other rewards of i's group) log π(y_i) (arXiv 2402.14740)."""
    assert batch.reward is not None
    rewards, logp = batch.reward.tolist(), completions(batch, batch.logp)
    total = torch.zeros(())
    for group in groups_of(batch):
        for i in group:
            others = [rewards[j] for j in group if j != i]
            if others:
                total = total - (rewards[i] - statistics.fmean(others)) * logp[i].sum()
    return total / len(rewards)


def asymmetric_gain(
    ratio: Tensor, advantage: Tensor | float, below: float, above: float, delta: float | None = None
) -> Tensor:
    """min(min(ρ, δ) A, clip(ρ, 1-ε_low, 1+ε_high) A) (arXiv 2503.14476, eq. 8; δ as TRL has it, 2505.07291)."""
    held = ratio if delta is None else ratio.clip(max=delta)
    return torch.min(held * advantage, ratio.clip(1 - below, 1 + above) * advantage)


def dr_grpo(
    batch: TokenBatch,
    clip: float = 0.2,
    max_length: int = 256,
    delta: float | None = None,
    clip_high: float | None = None,
) -> Tensor:
    """-(1/(B L)) Σ_i Σ_t min(ρA, clip(ρ) A), A = r - mean_G (arXiv 2503.20783)."""
    logp, behaviour = completions(batch, batch.logp), completions(batch, batch.behaviour_logp)
    total = torch.zeros(())
    for i, advantage in enumerate(group_advantages(batch, divide=False)):
        total = total - clipped_gain(logp[i], behaviour[i], advantage, clip, delta, clip_high).sum()
    return total / (len(logp) * max_length)


def dapo(
    batch: TokenBatch,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dynamic_sampling: bool = True,
    delta: float | None = None,
) -> Tensor:
    """-(1/N) Σ min(ρA, clip(ρ, 1-ε_low, 1+ε_high) A) over the N tokens of groups with 0 < std (arXiv 2503.14476)."""
    assert batch.reward is not None
    logp, behaviour = completions(batch, batch.logp), completions(batch, batch.behaviour_logp)
    advantages, tokens, total = group_advantages(batch, divide=True), 0, torch.zeros(())
    for group in groups_of(batch):
        if len({float(batch.reward[i]) for i in group}) > 1:
            for i in group:
                tokens += len(logp[i])
                ratio = ratio_of(logp[i] - behaviour[i])
                total = total - asymmetric_gain(ratio, advantages[i], clip_low, clip_high, delta).sum()
    return total / tokens


def gspo(batch: TokenBatch, clip_low: float = 3e-4, clip_high: float = 4e-4, delta: float | None = None) -> Tensor:
    """-(1/B) Σ_i min(sA, clip(s, 1-ε_low, 1+ε_high) A), s = (π(y)/μ(y))^(1/|y|) (arXiv 2507.18071, eq. 5 and 7)."""
    logp, behaviour = completions(batch, batch.logp), completions(batch, batch.behaviour_logp)
    total = torch.zeros(())
    for i, advantage in enumerate(group_advantages(batch, divide=True)):
        if len(logp[i]):
            ratio = (logp[i].sum().exp() / behaviour[i].sum().exp()) ** (1 / len(logp[i]))
            total = total - asymmetric_gain(ratio, advantage, clip_low, clip_high, delta)
    return total / len(logp)


def cispo(batch: TokenBatch, ratio_min: float = 0.0, ratio_max: float = 5.0) -> Tensor:
    """-(1/N) Σ sg(clip(ρ)) A log p_t (arXiv 2506.13585, eq. 4)."""
    logp, behaviour = completions(batch, batch.logp), completions(batch, batch.behaviour_logp)
    total = torch.zeros(())
    for i, advantage in enumerate(group_advantages(batch, divide=True)):
        weight = (logp[i].detach().exp() / behaviour[i].exp()).clip(ratio_min, ratio_max)
        total = total - (weight * advantage * logp[i]).sum()
    return total / token_count(batch)


def reinforce_pp(
    batch: TokenBatch,
    clip: float = 0.2,
    kl_coefficient: float = 0.01,
    gamma: float = 1.0,
    baseline: str = "none",
    delta: float | None = None,
    clip_high: float | None = None,
) -> Tensor:
    """-(1/N) Σ min(ρA, clip(ρ) A), A the returns of r - β log(π_old/π_ref), whitened (arXiv 2501.03262)."""
    assert batch.reward is not None
    logp, rows = completions(batch, batch.logp), []
    scores = group_advantages(batch, divide=False) if baseline == "group" else batch.reward.tolist()
    for i, score in enumerate(scores):
        reward = torch.zeros_like(logp[i]).detach()
        if kl_coefficient:
            old, reference = (completions(batch, x)[i] for x in (batch.snapshot_logp, batch.reference_logp))
            reward -= kl_coefficient * (old - reference)
        if len(reward):
            reward[-1] += score
        rows += [sum(gamma**k * float(r) for k, r in enumerate(reward[t:])) for t in range(len(reward))]
    returns = torch.tensor(rows, dtype=batch.dtype)
    advantage = (returns - returns.mean()) / (returns.var() + 1e-8).sqrt()
    behaviour = torch.cat(completions(batch, batch.behaviour_logp))
    gain = clipped_gain(torch.cat(logp), behaviour, advantage, clip, delta, clip_high)
    return -gain.sum() / token_count(batch)


def dppo(
    batch: TokenBatch,
    divergence: str = "tv",
    delta_low: float = 0.2,
    delta_high: float = 0.2,
    ratio_max: float = 20.0,
) -> Tensor:
    """-(1/N) Σ sg(min(ρ, 20)) A M log p_t, with M of eq. 13 (tv) or 14 (kl) of arXiv 2602.04879."""
    logp, behaviour = completions(batch, batch.logp), completions(batch, batch.behaviour_logp)
    total = torch.zeros(())
    for i, advantage in enumerate(group_advantages(batch, divide=True)):
        for t in range(len(logp[i])):
            p, q = math.exp(logp[i][t].item()), min(math.exp(behaviour[i][t].item()), 1.0)  # rounding may exceed 1
            distance = abs(p - q)
            if divergence == "kl":
                distance = q * math.log(q / p) + (0.0 if q == 1 else (1 - q) * math.log((1 - q) / (1 - p)))
            left = (advantage > 0 and p > q and distance > delta_high) or (
                advantage < 0 and p < q and distance > delta_low
            )
            if not left:
                ratio = math.exp((logp[i][t] - behaviour[i][t]).item())
                total = total - min(ratio, ratio_max) * advantage * logp[i][t]
    return total / token_count(batch)


def maxrl(batch: TokenBatch, clip: float = 0.2, delta: float | None = None, clip_high: float | None = None) -> Tensor:
    """-(1/B) Σ_i Σ_t min(ρA, clip(ρ) A), A = (r - mean_G)/mean_G (arXiv 2602.02710)."""
    assert batch.reward is not None
    logp, behaviour = completions(batch, batch.logp), completions(batch, batch.behaviour_logp)
    rewards, total = batch.reward.tolist(), torch.zeros(())
    for group in groups_of(batch):
        mean = statistics.fmean(rewards[i] for i in group)
        for i in group if mean > 0 else []:
            advantage = torch.full_like(logp[i], rewards[i] / mean - 1)
            total = total - clipped_gain(logp[i], behaviour[i], advantage, clip, delta, clip_high).sum()
    return total / len(rewards)


def sapo(batch: TokenBatch, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """-(1/B) Σ_i (1/|y_i|) Σ_t (4/τ) σ(τ(ρ - 1)) A (arXiv 2511.20347)."""
    logp, behaviour = completions(batch, batch.logp), completions(batch, batch.behaviour_logp)
    total = torch.zeros(())
    for i, advantage in enumerate(group_advantages(batch, divide=True)):
        tau = tau_positive if advantage > 0 else tau_negative
        if len(logp[i]):
            gate = 4 / tau / (1 + (-tau * (ratio_of(logp[i] - behaviour[i]) - 1)).exp())
            total = total - (gate * advantage).mean()
    return total / len(logp)


def topr(batch: TokenBatch, baseline: float = 0.5) -> Tensor:
    """-(1/B) Σ_i sg(w_i) A_i log π(y_i), w = 1 where A = r - b ≥ 0, else the ratio of y_i, at most 1 (2503.14286)."""
    assert batch.reward is not None
    logp, behaviour = completions(batch, batch.logp), completions(batch, batch.behaviour_logp)
    total = torch.zeros(())
    for i, reward in enumerate(batch.reward.tolist()):
        ratio = math.prod(logp[i].detach().exp().tolist()) / math.prod(behaviour[i].exp().tolist())
        total = total - (min(ratio, 1.0) if reward < baseline else 1.0) * (reward - baseline) * logp[i].sum()
    return total / len(logp)


def dro(batch: TokenBatch, beta: float = 0.05, level: str = "token") -> Tensor:
    """-(1/B) Σ_i [A log π(y_i) - (β/2) Σ_t log²(π/μ)], or with the square of the sum (arXiv 2405.19107, 2501.12599)."""
    logp, behaviour = completions(batch, batch.logp), completions(batch, batch.behaviour_logp)
    total = torch.zeros(())
    for i, advantage in enumerate(group_advantages(batch, divide=False)):
        gap = logp[i] - behaviour[i]
        penalty = (gap**2).sum() if level == "token" else gap.sum() ** 2
        total = total - advantage * logp[i].sum() + beta / 2 * penalty
    return total / len(logp)


def vespo(
    batch: TokenBatch,
    k_positive: float = 2.0,
    lambda_positive: float = 3.0,
    k_negative: float = 3.0,
    lambda_negative: float = 2.0,
) -> Tensor:
    """-(1/N) Σ sg(e^λ w^k e^{-λw}) A log p_t, w the ratio of the sequence (arXiv 2602.10693)."""
    logp, behaviour = completions(batch, batch.logp), completions(batch, batch.behaviour_logp)
    total = torch.zeros(())
    for i, advantage in enumerate(group_advantages(batch, divide=True)):
        k, decay = (k_positive, lambda_positive) if advantage >= 0 else (k_negative, lambda_negative)
        w = max(math.exp((logp[i] - behaviour[i]).sum().item()), 1e-8)
        total = total - math.exp(decay) * w**k * math.exp(-decay * w) * advantage * logp[i].sum()
    return total / token_count(batch)


def regression(batch: TokenBatch, targets: list[float | None], anchor: Tensor, beta: float) -> Tensor:
    """(1/B) Σ_i (β log(π/π_0)(y_i) - target_i)² over the rows that have tokens and a target."""
    total = torch.zeros(())
    for target, logp, other in zip(targets, completions(batch, batch.logp), completions(batch, anchor), strict=True):
        if len(logp) and target is not None:
            total = total + (beta * (logp - other).sum() - target) ** 2
    return total / len(targets)


def optimal_advantages(batch: TokenBatch, beta: float) -> list[float | None]:
    """r - β log mean_G exp(r/β) of each row."""
    assert batch.reward is not None
    rewards = batch.reward.tolist()
    found: list[float | None] = [None] * len(rewards)
    for group in groups_of(batch):
        value = beta * math.log(statistics.fmean(math.exp(rewards[i] / beta) for i in group))
        for i in group:
            found[i] = rewards[i] - value
    return found


def a_star_po(batch: TokenBatch, beta: float = 1e-3, value_beta: float = 0.5) -> Tensor:
    """The regression on r - V* against π_ref (arXiv 2505.20686)."""
    return regression(batch, optimal_advantages(batch, value_beta), batch.reference_logp, beta)


def oapl(batch: TokenBatch, beta: float = 1e-3, value_beta: float = 1.0) -> Tensor:
    """The regression on r - V* against μ (arXiv 2602.19362)."""
    return regression(batch, optimal_advantages(batch, value_beta), batch.behaviour_logp, beta)


def qrpo(batch: TokenBatch, beta: float = 0.1) -> Tensor:
    """The regression on q - β log Z, Z = ∫ exp(q/β) dq over [0, 1] (arXiv 2507.08068)."""
    assert batch.reward is not None
    rewards = batch.reward.tolist()
    targets: list[float | None] = [None] * len(rewards)
    for group in groups_of(batch):
        for i in group:
            others = [rewards[j] for j in group if j != i]
            if others:
                share = sum(other <= rewards[i] for other in others) / len(others)
                targets[i] = share - beta * math.log(beta * (math.exp(1 / beta) - 1))
    return regression(batch, targets, batch.reference_logp, beta)


def otb(batch: TokenBatch, zero_tail: bool = False) -> Tensor:
    """-(1/N) Σ (π/μ) (G - B_t), B_t the mean return over the rows that reach t, weighted by W (arXiv 2602.07078).

    With ``zero_tail`` B_t is 0 where only one row reaches t, as in verl.
    """
    assert batch.reward is not None
    rewards, ratio = batch.reward.tolist(), completions(batch, batch.logp)
    ratio = [(a - b).exp() for a, b in zip(ratio, completions(batch, batch.behaviour_logp), strict=True)]
    p = [row.exp().tolist() for row in completions(batch, batch.snapshot_logp)]
    square = [row.tolist() for row in completions(batch, batch.inputs["square_mass"])]
    total = torch.zeros(())
    for group in groups_of(batch):
        for i in group:
            for t in range(len(ratio[i])):
                energy = {
                    j: sum(1 - 2 * p[j][s] + square[j][s] for s in range(t + 1)) for j in group if t < len(ratio[j])
                }
                baseline = sum(rewards[j] * w for j, w in energy.items()) / sum(energy.values())
                if zero_tail and len(energy) == 1:
                    baseline = 0.0
                total = total - ratio[i][t] * (rewards[i] - baseline)
    return total / token_count(batch)


def luffy(batch: TokenBatch, gamma: float = 0.1, clip: float | None = None, scale_rewards: bool = False) -> Tensor:
    """-(1/N) Σ of ρA or min(ρA, clip(ρ) A) for samples, A ρ/(ρ + γ) for demonstrations (arXiv 2504.14945)."""
    advantages = group_advantages(batch.replace(reward=batch.outcome), divide=scale_rewards)
    logp, behaviour = completions(batch, batch.logp), completions(batch, batch.behaviour_logp)
    total = torch.zeros(())
    for i, is_demonstration in enumerate(batch.from_demonstration.tolist()):
        ratio = ratio_of(logp[i] - behaviour[i])
        if is_demonstration:
            gain = advantages[i] * ratio / (ratio + gamma)
        elif clip is None:
            gain = advantages[i] * ratio
        else:
            gain = asymmetric_gain(ratio, advantages[i], clip, clip)
        total = total - gain.sum()
    return total / token_count(batch)


def pear(
    batch: TokenBatch,
    variant: str = "token",
    block_size: int = 4,
    gamma: float = 0.999,
    log_ratio_min: float = -0.08,
    log_ratio_max: float = 0.3,
    log_weight_min: float = -10.0,
    log_weight_max: float = 5.0,
) -> Tensor:
    """-(1/N) Σ sg(G_t) log p_t, G_t = γ^{n-t} Π_{s>t} clip(π/π_β), or Π_s (arXiv 2602.01058)."""
    total = torch.zeros(())
    for logp, author in zip(completions(batch, batch.logp), completions(batch, batch.behaviour_logp), strict=True):
        ratios = [min(max(x, math.exp(log_ratio_min)), math.exp(log_ratio_max)) for x in (logp - author).exp().tolist()]
        for t in range(len(ratios)):
            end = min((t // block_size + 1) * block_size, len(ratios)) - 1 if variant == "block" else t
            weight = gamma ** (len(ratios) - 1 - end) * math.prod(ratios[end + 1 :])
            weight = math.prod(ratios) if variant == "sequence" else weight
            total = total - min(max(weight, math.exp(log_weight_min)), math.exp(log_weight_max)) * logp[t]
    return total / token_count(batch)


def power(batch: TokenBatch, alpha: float = 1.0, threshold: float = 0.0) -> Tensor:
    """The mean over the tokens with p_t ≥ τ of (1 - p_t^α)/α, or of -log p_t for α = 0 (arXiv 2510.00526)."""
    p = torch.cat(completions(batch, batch.logp)).exp()
    p = p[p >= threshold]
    loss = (1 - p**alpha) / alpha if alpha else -p.log()
    return loss.sum() / len(p) if len(p) else 0 * batch.logp[batch.mask].sum()


def psft(batch: TokenBatch, clip: float = 0.28) -> Tensor:
    """-(1/N) Σ min(ρ_t, clip(ρ_t, 1-ε, 1+ε)), ρ = π_θ/π_old (arXiv 2508.17784): PPO's with the advantage 1."""
    logp, snapshot = (torch.cat(completions(batch, values)) for values in (batch.logp, batch.snapshot_logp))
    return -clipped_gain(logp, snapshot, torch.ones_like(logp), clip).sum() / token_count(batch)


def eaft(batch: TokenBatch) -> Tensor:
    """-(1/N) Σ (H_t / ln 20) log p_t, H_t the entropy of the 20 likeliest tokens (arXiv 2601.02151)."""
    logp = torch.cat(completions(batch, batch.logp))
    entropy = torch.cat(completions(batch, batch.inputs["top_entropy"])).detach()
    return -(entropy / torch.tensor(20.0, dtype=logp.dtype).log() * logp).sum() / token_count(batch)


def floor_dft(batch: TokenBatch, floor: float = 0.1) -> Tensor:
    """-(1/N) Σ max(sg p_t, τ) log p_t."""
    logp = torch.cat(completions(batch, batch.logp))
    weight = torch.maximum(logp.detach().exp(), torch.tensor(floor, dtype=logp.dtype))
    return -(weight * logp).sum() / token_count(batch)


def weighted(batch: TokenBatch, weight: Callable[[Tensor], Tensor]) -> Tensor:
    """-(1/N) Σ sg(w(p_t)) log p_t, for a weight that is a function of p alone."""
    logp = torch.cat(completions(batch, batch.logp))
    return -(weight(logp.detach().exp()) * logp).sum() / token_count(batch)


def trsft(batch: TokenBatch, alpha: float = 0.1) -> Tensor:
    """(1/N) Σ of -log p_t inside the trust region and of its tangent in p at α outside (arXiv 2512.17636)."""
    p = torch.cat(completions(batch, batch.logp)).exp()
    tangent = -math.log(alpha) - (p - alpha) / alpha
    return torch.where(p < alpha, tangent, -p.log()).sum() / token_count(batch)


def infosft(batch: TokenBatch, known: float = 0.93) -> Tensor:
    """-(1/N) Σ sg(p relu(1 - logit p / logit P)) log p_t (arXiv 2605.14967)."""
    return weighted(batch, lambda p: p * functional.relu(1 - p.logit() / math.log(known / (1 - known))))


def chord(batch: TokenBatch) -> Tensor:
    """-(1/N) Σ sg(p (1 - p)) log p_t (arXiv 2508.11408)."""
    return weighted(batch, lambda p: p * (1 - p))


def profit(batch: TokenBatch, threshold: float = 0.1) -> Tensor:
    """-(1/N) Σ over the tokens with p_t ≥ τ of log p_t, N the number of all (arXiv 2601.09195, eq. 5)."""
    logp = torch.cat(completions(batch, batch.logp))
    return -logp[logp.exp() >= threshold].sum() / token_count(batch)


def memft(batch: TokenBatch, threshold: float = 0.5) -> Tensor:
    """The mean of -log p_t over the tokens with p_t < τ (arXiv 2605.30260, MemFT-OT)."""
    logp = torch.cat(completions(batch, batch.logp))
    kept = logp[logp.exp() < threshold]
    return -kept.sum() / len(kept) if len(kept) else 0 * logp.sum()


def idft(
    batch: TokenBatch, strength: float = 1.0, beta: float = 1.0, gamma_min: float = 0.1, gamma_max: float = 2.0
) -> Tensor:
    """-(1/N) Σ sg(p^γ) log p_t, γ = 1 + λ (clip(e^{-(log p + H)/β}) - 1) (arXiv 2602.12222)."""
    logp = torch.cat(completions(batch, batch.logp))
    total = torch.zeros(())
    for x, entropy in zip(logp, torch.cat(completions(batch, batch.inputs["entropy"])).tolist(), strict=True):
        raw = min(max(math.exp(-(x.item() + entropy) / beta), gamma_min), gamma_max)
        total = total - math.exp(x.item()) ** (1 + strength * (raw - 1)) * x
    return total / token_count(batch)


def deft(batch: TokenBatch) -> Tensor:
    """(1/N) Σ (1 - p_t^a_t)/a_t with a_t = Σ_v π_v² under a stop-gradient (arXiv 2602.11424)."""
    p = torch.cat(completions(batch, batch.logp)).exp()
    a = torch.cat(completions(batch, batch.inputs["square_mass"])).detach()
    return ((1 - p**a) / a).sum() / token_count(batch)


def asft(batch: TokenBatch, logits: Tensor, reference: Tensor, target: Tensor, kl_coefficient: float = 0.05) -> Tensor:
    """(1/N) Σ [-sg(p_t) log p_t + λ Σ_v π_ref(v) log(π_ref(v)/π_θ(v))] (arXiv 2509.23753)."""
    losses = []
    for row, t in batch.mask.nonzero().tolist():
        policy, anchor = logits[row, t].softmax(0), reference[row, t].softmax(0)
        p = policy[target[row, t]]
        losses.append(-p.detach() * p.log() + kl_coefficient * (anchor * (anchor / policy).log()).sum())
    return torch.stack(losses).mean()


def otr(
    batch: TokenBatch,
    logits: Tensor,
    reference: Tensor,
    target: Tensor,
    samples: int = 256,
    temperature: float = 1.3,
    beta: float = -0.1,
) -> Tensor:
    """-(1/N) Σ (1/K) Σ_k R_k log π_θ(a_k), a_k ~ softmax(z/T), R = 1 where a_k = y_t and β elsewhere (2509.26313).

    The tokens are drawn for all positions at once, in their order, so that a seed gives the same ones.
    """
    flat, wanted = logits[batch.mask], target[batch.mask].tolist()
    drawn = torch.multinomial((flat.detach() / temperature).softmax(1), samples, replacement=True).tolist()
    losses = []
    for z, y, tokens in zip(flat, wanted, drawn, strict=True):
        logp = z.log_softmax(0)
        losses.append(-sum((1.0 if a == y else beta) * logp[a] for a in tokens) / samples)
    return torch.stack([torch.as_tensor(loss) for loss in losses]).mean()


def smoothed_sft(
    batch: TokenBatch,
    logits: Tensor,
    reference: Tensor,
    target: Tensor,
    label_smoothing: float,
    aggregation: str = "token",
) -> Tensor:
    """The mean cross entropy to (1 - ε) e_y + ε/V, torch's own label smoothing."""
    if aggregation == "token":
        return functional.cross_entropy(logits[batch.mask], target[batch.mask], label_smoothing=label_smoothing)
    rows = [
        functional.cross_entropy(z[m], y[m], label_smoothing=label_smoothing)
        for z, m, y in zip(logits, batch.mask, target, strict=True)
        if m.any()
    ]
    return torch.stack(rows).sum() / len(batch.mask)


def gift(batch: TokenBatch, logits: Tensor, reference: Tensor, target: Tensor, beta: float = 20.0) -> Tensor:
    """-(1/N) Σ Σ_v q(v) log π_θ(v), q ∝ π_ref(v) e^{β 1[v = y_t]} (arXiv 2601.09233)."""
    losses = []
    for row, t in batch.mask.nonzero().tolist():
        tilted = reference[row, t].softmax(0)
        tilted[target[row, t]] *= math.exp(beta)
        losses.append(-(tilted / tilted.sum() * logits[row, t].softmax(0).log()).sum())
    return torch.stack(losses).mean()


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


def distilled(batch: TokenBatch, teacher: Tensor, ratio_max: float | None) -> list[Tensor]:
    """Of each row: the losses sg(min(ρ, cap) (log π - log π_T)) log π of its tokens (TRL's sampled_token)."""
    losses = []
    for i, (logp, wanted) in enumerate(zip(completions(batch, batch.logp), completions(batch, teacher), strict=True)):
        weight = (logp - wanted).detach()
        if ratio_max is not None:
            behaviour = completions(batch, batch.behaviour_logp)[i]
            weight = weight * (logp.detach() - behaviour).exp().clip(max=ratio_max)
        losses.append(weight * logp)
    return losses


def opd(batch: TokenBatch, ratio_max: float | None = 2.0) -> Tensor:
    """The mean over tokens of sg(log π - log π_teacher) log π, each weighted by min(ρ, cap)."""
    return torch.cat(distilled(batch, batch["teacher_logp"], ratio_max)).sum() / token_count(batch)


def sdft(batch: TokenBatch, ratio_max: float | None = 2.0) -> Tensor:
    """The mean over completions of the mean over tokens of the same, with the policy's log-probs given more."""
    rows = distilled(batch, batch["privileged_logp"], ratio_max)
    return torch.stack([row.sum() / max(len(row), 1) for row in rows]).mean()


def mixture(batch: TokenBatch, components: Mapping[Loss, float]) -> Tensor:
    """Σ_k w_k L_k (arXiv 2508.11408 for a constant μ), here over one batch that all components see."""
    return torch.stack([weight * loss(batch) for loss, weight in components.items()]).sum()


def case(loss: Callable[..., Tensor], **options: Any) -> Case:
    """A case whose options the loss takes under the same names."""
    return Case(partial(loss, **options), options)


CANONICAL: dict[str, list[Case]] = {
    "sft": [case(sft), Case(partial(over_sequences, loss=sft), {"aggregation": "sequence"})],
    "dft": [
        case(dft),
        Case(partial(dft_of_completions, geometric=False), {"variant": "sentence"}),
        Case(partial(dft_of_completions, geometric=True), {"variant": "geometric_mean"}),
        Case(partial(over_sequences, loss=dft), {"aggregation": "sequence"}),
    ],
    "dft-control": [case(dft_control, variant=variant) for variant in ("normalised", "mean", "shuffled")],
    "iw-sft": [
        case(iw_sft_sequence),
        case(iw_sft_sequence, kappa=2.0, weight_max=1.1),
        Case(iw_sft_step, {"variant": "per_step"}),
        Case(iw_sft_sequence, {"variant": "ema"}),
    ],
    "rft": [
        case(rft),
        case(rft, threshold=0.8),
        Case(sft, {"with_demonstrations": True}),
        Case(rft, {"distinct": "equations"}),
    ],
    "dpo": [
        case(dpo),
        case(dpo, beta=0.7, variant="sigmoid"),
        case(dpo, beta=0.7, variant="hinge"),
        case(dpo, beta=0.7, variant="ipo"),
        case(dpo, beta=0.7, variant="sigmoid_norm"),
        case(dpo, beta=0.7, variant="robust", label_smoothing=0.1),
        case(dpo, beta=0.7, label_smoothing=0.1),
        case(dpo, beta=0.7, variant="sigmoid_norm", label_smoothing=0.2),
        case(dpo, beta=0.7, divergence="forward_kl"),
        case(dpo, beta=0.7, divergence="js"),
        case(dpo, beta=0.7, divergence="alpha", divergence_alpha=0.3),
        case(dpo, beta=0.7, variant="ipo", divergence="js", sft_coefficient=0.3),
        case(dpo, sft_coefficient=2.0),
        Case(dpo, {"pairing": "best_worst"}),
    ],
    "exo": [case(exo), case(exo, beta=0.7, label_smoothing=0.2)],
    "nca": [case(nca), case(nca, beta=0.7)],
    "bco": [case(bco), case(bco, beta=0.7, shift="none")],
    "sppo": [case(sppo), case(sppo, beta=0.7)],
    "apo": [case(apo), case(apo, beta=0.7, variant="down")],
    "aot": [
        case(aot),
        case(aot, beta=0.7, variant="unpaired"),
        case(aot, beta=0.7, label_smoothing=0.2),
    ],
    "opd": [
        Case(opd, {"teacher": "embedded"}),
        Case(partial(opd, ratio_max=1.2), {"teacher": "embedded", "ratio_max": 1.2}),
        Case(partial(opd, ratio_max=None), {"teacher": "embedded", "ratio_max": None}),
    ],
    "sdft": [
        case(sdft),
        Case(sdft, {"teacher": "initial"}),
        Case(sdft, {"teacher": "live"}),
        case(sdft, ratio_max=None),
    ],
    "discopop": [case(discopop), case(discopop, beta=0.7, tau=0.3)],
    "ppo": [
        case(ppo),
        case(ppo, dual_clip=1.5),
        case(ppo, clip=0.1, clip_high=0.4),
        case(ppo, bootstrap_truncated=True, gamma=0.9),
        case(ppo, value_clip=None),
        case(ppo, whiten=False),
        case(ppo, whiten=False, kl_coefficient=0.0, gamma=0.9, lam=0.5, clip=0.1, value_coefficient=0.7),
        Case(ppo, {"critic": "shared"}),
    ],
    "grpo": [
        case(grpo),
        case(grpo, kl_coefficient=0.0),
        case(grpo, clip=0.1, kl_coefficient=0.5),
        case(grpo, delta=1.4),
        case(grpo, kl_correction=True, kl_coefficient=0.5),
        case(grpo, clip_high=0.28, scale_rewards="batch", aggregation="token"),
        case(grpo, scale_rewards="none", aggregation="constant", max_length=7, kl_coefficient=0.5),
        case(grpo, level="sequence", clip=0.05, clip_high=0.1, kl_coefficient=0.5, kl_correction=True),
        case(grpo, kl_estimator="k1", kl_coefficient=0.5),
        case(grpo, kl_estimator="k2", kl_coefficient=0.5),
        case(grpo, kl_estimator="k1", kl_coefficient=0.5, kl_correction=True, aggregation="constant"),
        case(grpo, kl_estimator="k2", kl_coefficient=0.5, kl_correction=True),
    ],
    "reinforce": [case(reinforce), case(reinforce, baseline="none")],
    "rloo": [case(rloo)],
    "dr-grpo": [case(dr_grpo), case(dr_grpo, clip=0.1, max_length=7), case(dr_grpo, clip_high=0.1, delta=1.4)],
    "dapo": [case(dapo), case(dapo, clip_low=0.1, clip_high=0.3, dynamic_sampling=False), case(dapo, delta=1.4)],
    "gspo": [
        case(gspo),
        case(gspo, clip_low=0.05, clip_high=0.1),
        case(gspo, clip_low=0.05, clip_high=0.1, delta=1.15),
    ],
    "cispo": [case(cispo), case(cispo, ratio_min=0.8, ratio_max=1.28)],
    "reinforce-pp": [
        case(reinforce_pp),
        case(reinforce_pp, kl_coefficient=0.5, gamma=0.9, clip_high=0.1, delta=1.4),
        case(reinforce_pp, kl_coefficient=0.0, baseline="group", clip=0.1),
    ],
    "dppo": [
        case(dppo),
        case(dppo, delta_low=0.05, delta_high=0.3, ratio_max=1.5),
        case(dppo, divergence="kl", delta_low=0.02, delta_high=0.05),
    ],
    "maxrl": [case(maxrl), case(maxrl, clip=0.1, clip_high=0.3, delta=1.4)],
    "sapo": [case(sapo), case(sapo, tau_positive=2.0, tau_negative=5.0)],
    "topr": [case(topr), case(topr, baseline=0.0), case(topr, baseline=0.8)],
    "dro": [case(dro), case(dro, beta=0.7), case(dro, beta=0.7, level="sequence")],
    "vespo": [
        case(vespo),
        case(vespo, k_positive=1.0, lambda_positive=0.5, k_negative=0.5, lambda_negative=1.0),
    ],
    "a-star-po": [case(a_star_po), case(a_star_po, beta=0.3, value_beta=0.2)],
    "oapl": [case(oapl), case(oapl, beta=0.3, value_beta=0.2)],
    "qrpo": [case(qrpo), case(qrpo, beta=0.7)],
    "otb": [case(otb), case(otb, zero_tail=True)],
    "power": [
        case(power),
        case(power, alpha=0.0),
        case(power, alpha=10.0),
        case(power, alpha=0.5, threshold=0.4),
        case(power, alpha=0.0, threshold=0.4),
    ],
    "asft": [case(dft)],  # what goes through log-probs; the whole is in CANONICAL_IN_LOGITS
    "psft": [case(psft), case(psft, clip=0.5)],
    "eaft": [case(eaft)],
    "deft": [case(deft)],
    "floor-dft": [
        case(floor_dft),
        case(floor_dft, floor=0.6),
        Case(dft, {"floor": 0.0}),
        Case(sft, {"floor": 1.0}),
    ],
    "trsft": [case(trsft), case(trsft, alpha=0.6), case(trsft, alpha=1.0)],
    "infosft": [case(infosft), case(infosft, known=0.7)],
    "chord": [case(chord)],
    "profit": [case(profit), case(profit, threshold=0.6), Case(sft, {"threshold": 0.0})],
    "memft": [case(memft), case(memft, threshold=0.3), Case(sft, {"threshold": 1.1})],
    "idft": [
        case(idft),
        case(idft, strength=0.5, beta=2.0, gamma_min=0.5, gamma_max=1.5),
        Case(dft, {"strength": 0.0}),
    ],
    "pear": [
        case(pear),
        case(pear, log_ratio_min=-1.0, log_ratio_max=1.0, gamma=0.9),
        case(pear, log_ratio_min=-1.0, log_ratio_max=1.0, log_weight_min=-1.0, log_weight_max=1.0),
        case(pear, variant="sequence"),
        case(pear, variant="block", block_size=2, log_ratio_min=-1.0, gamma=0.9),
        case(pear, variant="block"),
        Case(pear, {"demonstrator": "a/teacher"}),
    ],
    "luffy": [
        case(luffy),
        case(luffy, gamma=0.5, clip=0.2),
        case(luffy, scale_rewards=True),
    ],
    "sft-q": [case(sft)],
    "simpo": [case(simpo), case(simpo, beta=0.7, gamma=0.0)],
    "orpo": [case(orpo), case(orpo, lam=1.5)],
    "kto": [case(kto), case(kto, beta=0.7, desirable_weight=1.3, undesirable_weight=0.6, threshold=0.8)],
    "mixture": [
        Case(partial(mixture, components={sft: 0.1, grpo: 0.9}), {"weights": {"sft": 0.1, "grpo": 0.9}}),
        Case(
            partial(mixture, components={partial(dpo, beta=0.7): 1.0, dft: 0.5}),
            {"weights": {"dpo": 1.0, "dft": 0.5}, "options": {"dpo": {"beta": 0.7}}},
        ),
        *(  # at the start of training
            Case(
                partial(mixture, components={sft: 0.9, grpo: 0.1}),
                {"weights": {"sft": {0: 0.9, 0.5: 0.05}, "grpo": {0.2: 0.1, 0.5: 0.95}}, "shape": shape},
            )
            for shape in ("linear", "cosine", "steps")
        ),
    ],
}


LogitsLoss = Callable[[TokenBatch, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LogitsCase:
    """An objective's options, and its whole loss as a function of batch, logits, reference logits and target."""

    loss: LogitsLoss
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return ",".join(f"{k}={v}" for k, v in self.options.items()) or "default"


def logits_case(loss: Callable[..., Tensor], **options: Any) -> LogitsCase:
    """A case whose options the loss takes under the same names."""
    return LogitsCase(partial(loss, **options), options)


CANONICAL_IN_LOGITS: dict[str, list[LogitsCase]] = {
    "asft": [logits_case(asft), logits_case(asft, kl_coefficient=0.7)],
    "sft": [
        logits_case(smoothed_sft, label_smoothing=0.1),
        logits_case(smoothed_sft, label_smoothing=0.4, aggregation="sequence"),
    ],
    "gift": [logits_case(gift), logits_case(gift, beta=1.0), logits_case(gift, beta=0.0)],
    "otr": [
        logits_case(otr, samples=16),
        logits_case(otr, samples=8, temperature=1.0, beta=-0.5),
        logits_case(otr, samples=2, temperature=1e-6),  # draws the likeliest token
    ],
}
"""For every objective with a full-vocabulary term. One whose coefficients are 0 has no other case."""
