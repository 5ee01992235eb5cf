"""Advantage estimators: pure functions of rewards, groups and values, without gradients.

Shapes: ``reward`` and ``group`` are [B], one entry per row; rows with equal ``group`` are samples of one prompt. Values
per token are [B, T], with ``mask`` True at completion tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional


def running_sum(x: Float[Tensor, "N M"], dtype: torch.dtype | None = None) -> Float[Tensor, "N M"]:
    """The cumulative sum of each row, added in the same order every time, also on a GPU.

    There `torch.use_deterministic_algorithms` refuses cumsum, because a single row is scanned in parts.
    """
    if x.device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(1, dtype=dtype)
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        return torch.cat([x, x[:1]]).cumsum(1, dtype=dtype)[:-1]
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warns)


def _numbered(group: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Groups numbered from 0, in order. `torch.unique` would make the host wait for the GPU to count them."""
    ordered, order = group.sort(stable=True)
    starts = ordered != ordered.roll(1)
    starts[:1] = False
    return torch.empty_like(order).scatter(0, order, starts.cumsum(0))


def group_mean(x: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The mean of ``x`` over each row's group, [B]."""
    index = _numbered(group)
    total = torch.zeros_like(x).index_add(0, index, x)
    count = torch.zeros_like(x).index_add(0, index, torch.ones_like(x))
    return (total / count.clamp(min=1))[index]


def group_centred(
    reward: Float[Tensor, " B"], group: Int[Tensor, " B"], dtype: torch.dtype | None = None
) -> Float[Tensor, " B"]:
    """r - mean_G per row, in ``dtype`` (None: that of the rewards); exactly 0 for a group of one or of equal rewards.

    The group's smallest reward is subtracted first, in the precision of the rewards: otherwise the mean of equal
    rewards might round to another number, and small differences would lose digits to a large offset.
    """
    above = (reward - _least(reward, group)).to(dtype or reward.dtype)
    return above - group_mean(above, group)


def group_varies(reward: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Bool[Tensor, " B"]:
    """True for rows of groups whose rewards are not all equal, compared exactly: a computed std need not be 0."""
    return _least(reward, group) < -_least(-reward, group)


def _least(reward: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The smallest reward of each row's group."""
    index = _numbered(group)
    return torch.zeros_like(reward).scatter_reduce(0, index, reward, "amin", include_self=False)[index]


def group_normalised(
    reward: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    epsilon: float = 1e-4,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, " B"]:
    """(r - mean_G) / (std_G + ε) per row, in ``dtype``; std has Bessel's correction, as in TRL.

    Exactly 0 for a group of one or of equal rewards. Source: DeepSeekMath, arXiv 2402.03300, section 4.1.2.
    """
    centred = group_centred(reward, group, dtype)
    size = _size(group, centred)
    std = (group_mean(centred.square(), group) * size / (size - 1).clamp(min=1)).sqrt()
    return centred / (std + epsilon)


def batch_normalised(
    reward: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    epsilon: float = 1e-4,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, " B"]:
    """(r - mean_G) / (std + ε) per row, in ``dtype``, with the std of all rewards, by Bessel's correction, as in TRL.

    Exactly 0 for a group of one or of equal rewards. Source: arXiv 2508.08221.
    """
    spread = group_centred(reward, torch.zeros_like(group), dtype)
    std = (spread.square().sum() / max(len(spread) - 1, 1)).sqrt()
    return group_centred(reward, group, dtype) / (std + epsilon)


def leave_one_out(
    reward: Float[Tensor, " B"], group: Int[Tensor, " B"], dtype: torch.dtype | None = None
) -> Float[Tensor, " B"]:
    """r minus the mean of the group's other rewards, G/(G-1) (r - mean_G), per row and in ``dtype``.

    Exactly 0 for a group of one or of equal rewards. Source: RLOO, arXiv 2402.14740.
    """
    centred = group_centred(reward, group, dtype)
    size = _size(group, centred)
    return centred * size / (size - 1).clamp(min=1)


def optimal_value(reward: Float[Tensor, " B"], group: Int[Tensor, " B"], beta: float) -> Float[Tensor, " B"]:
    """V* = β log mean_G exp(r/β) per row: the value of max_π E_π[r] - β KL(π ‖ μ), from samples of μ.

    Exactly the reward where a group's rewards are equal; between their mean (large β) and maximum (small β) otherwise.
    Source: A*-PO, arXiv 2505.20686.
    """
    most = -_least(-reward, group)
    return most + beta * group_mean(((reward - most) / beta).exp(), group).log()


def quantile(reward: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The fraction of the group's other rewards that are at most a row's own, in [0, 1]; 0 for a group of one."""
    others = (group[:, None] == group).fill_diagonal_(False)
    below = others & (reward[None] <= reward[:, None])
    return below.sum(1).to(reward.dtype) / others.sum(1).clamp(min=1)


def _size(group: Int[Tensor, " B"], like: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    index = _numbered(group)
    size: Tensor = torch.zeros_like(index).index_add(0, index, torch.ones_like(index))[index].to(like.dtype)
    return size


def optimal_token_baseline(
    reward: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    score_norm: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    zero_tail: bool = False,
) -> Float[Tensor, "B T"]:
    """The baseline per token that minimises the variance of the policy gradient.

    B_t = Σ_i r_i W_{i,t} / Σ_i W_{i,t}, W_{i,t} = Σ_{s≤t} S_{i,s}, over the group's rows with at least t tokens, where
    ``score_norm`` S is the squared norm of the score function ∇ log π at a token. The baseline is 0 at masked
    positions, the group's smallest reward where all W are 0, and exactly the reward where rewards are equal. Where only
    one row is left it is that row's reward, or 0 with ``zero_tail``. Raises ValueError for shapes that do not match.
    Source: arXiv 2602.07078.
    """
    if score_norm.shape != mask.shape or reward.shape != group.shape or len(reward) != len(mask):
        shapes = [tuple(x.shape) for x in (reward, group, score_norm, mask)]
        raise ValueError(f"shapes do not match: {', '.join(map(str, shapes))}")
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)  # t numbers a row's tokens, whatever is between them
    mask, back = mask.gather(1, order), order.argsort(1)
    live = running_sum(torch.where(mask, score_norm.gather(1, order), 0)) * mask
    least = _least(reward, group)
    index, total = _numbered(group), torch.zeros_like(live)
    weighted = total.index_add(0, index, live * (reward - least).to(live.dtype)[:, None])[index]
    weight = total.index_add(0, index, live)[index]
    baseline = least[:, None] + torch.where(weight > 0, weighted / weight, 0)
    has_baseline = mask
    if zero_tail:
        has_baseline = mask & (total.index_add(0, index, mask.to(live.dtype))[index] > 1)
    return torch.where(has_baseline, baseline, 0).gather(1, back)


def penalised_reward(
    reward: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    kl_coefficient: float,
    log_ratio: Float[Tensor, "B T"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "B T"]:
    """The reward at the last token, minus ``kl_coefficient`` times log(π/π_ref) at each token; 0 at masked positions.

    That is the k1 estimate of KL(π ‖ π_ref) where π sampled. None for no penalty. Source: arXiv 2203.02155.
    """
    per_token = torch.where(last_token(mask), reward[:, None].to(dtype), 0)
    return per_token if log_ratio is None else per_token - kl_coefficient * torch.where(mask, log_ratio, 0)


def generalised_advantage(
    reward: Float[Tensor, "B T"],
    value: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float,
    lam: float,
    after: Float[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalised advantages A, GAE(γ, λ), and the returns A + V; both [B, T], and 0 at masked positions.

    δ_t = r_t + γ V_{t+1} - V_t, A_t = δ_t + γλ A_{t+1}; ``after`` is the value after each row's last token, by default
    0, because a completion ends the episode. Raises ValueError for shapes that differ.
    Source: arXiv 1506.02438, eq. 16.
    """
    if reward.shape != value.shape or reward.shape != mask.shape:
        raise ValueError(f"shapes differ: {tuple(reward.shape)}, {tuple(value.shape)}, {tuple(mask.shape)}")
    value, length = torch.where(mask, value, 0), mask.shape[1]
    after = value.new_zeros(len(value)) if after is None else after.to(value.dtype)
    place = torch.where(mask, torch.arange(length, device=mask.device), length)
    next_place = functional.pad(place, (0, 1), value=length).flip(1).cummin(1).values.flip(1)[:, 1:]
    following = torch.cat([value, after[:, None]], 1).gather(1, next_place)
    delta = torch.where(mask, reward + gamma * following - value, 0)
    decay = torch.where(mask, torch.full_like(value, gamma * lam), 1)
    advantage = torch.where(mask, _discounted(delta, decay), 0)
    return advantage, torch.where(mask, advantage + value, 0)


def _discounted(x: Float[Tensor, "B T"], decay: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """y_t = x_t + d_t y_{t+1}, in log2(T) passes: each lets a position take in twice as many of those after it."""
    step = 1
    while step < x.shape[1]:
        reached = decay[:, :-step]
        x = torch.cat([x[:, :-step] + reached * x[:, step:], x[:, -step:]], 1)
        decay = torch.cat([reached * decay[:, step:], decay[:, -step:]], 1)
        step *= 2
    return x


def whiten(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], epsilon: float = 1e-8) -> Float[Tensor, "B T"]:
    """(x - mean) / sqrt(var + ε) over the unmasked entries; 0 elsewhere. Fewer than two entries are left unchanged.

    Equal entries give exactly 0, although their computed mean may round to another number.
    """
    kept, count = torch.where(mask, x, 0), mask.sum()
    mean = masked_mean(x, mask)
    if x.device.type == "cpu":
        variance = x[mask].var() if count > 1 else torch.ones_like(mean)
    else:
        variance = torch.where(mask, x - mean, 0).square().sum() / (count - 1)
    varied = torch.where(mask, x, torch.inf).amin() < torch.where(mask, x, -torch.inf).amax()
    whitened = torch.where(mask & varied, (x - mean) * (variance + epsilon).rsqrt(), 0)
    return torch.where(count < 2, kept, whitened)


def masked_mean(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
    """The mean over the unmasked entries; NaN if there are none.

    On a CPU the entries are gathered first, because zeros between them would change the last bits of the sum. On a GPU
    the host would have to wait for their number.
    """
    return x[mask].mean() if x.device.type == "cpu" else torch.where(mask, x, 0).sum() / mask.sum()


def last_token(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """True at the last unmasked position of each row that has one."""
    after = mask.flip(1).cumsum(1).flip(1)
    return mask & (after == 1)
