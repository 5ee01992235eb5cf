"""Advantages against numbers derived by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from rlzoo.advantages import (
    generalised_advantage,
    group_centred,
    group_mean,
    group_normalised,
    last_token,
    leave_one_out,
    optimal_token_baseline,
    whiten,
)

NAN = math.nan


def double(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_gae_by_hand() -> None:
    # γ = 1/2, λ = 1/2, so γλ = 1/4.
    # Row 0: r = 0, 0, 1; V = 0.4, 0.2, 0.6.
    #   δ_2 = 1 + 0 - 0.6 = 0.4          A_2 = 0.4
    #   δ_1 = 0 + 0.3 - 0.2 = 0.1        A_1 = 0.1 + 0.4/4 = 0.2
    #   δ_0 = 0 + 0.1 - 0.4 = -0.3       A_0 = -0.3 + 0.2/4 = -0.25
    # Row 1 ends after one token: r = 2, V = 0.5, A_0 = δ_0 = 1.5.
    # Row 2 has a hole: r = 1, 3; V = 0.4, 0.8 at positions 0 and 2, which follow each other.
    #   A_2 = δ_2 = 3 - 0.8 = 2.2        A_0 = (1 + 0.4 - 0.4) + 2.2/4 = 1.55
    # Row 3 is masked.
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)
    reward = double([[0, 0, 1], [2, NAN, 9], [1, NAN, 3], [NAN, 7, 7]])
    value = double([[0.4, 0.2, 0.6], [0.5, 9, NAN], [0.4, NAN, 0.8], [7, NAN, 7]])
    advantage, returns = generalised_advantage(reward, value, mask, gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantage, double([[-0.25, 0.2, 0.4], [1.5, 0, 0], [1.55, 0, 2.2], [0, 0, 0]]))
    torch.testing.assert_close(returns, double([[0.15, 0.4, 1], [2, 0, 0], [1.95, 0, 3], [0, 0, 0]]))


def test_with_lambda_one_the_returns_are_discounted_sums() -> None:
    # γ = 1/2: R_2 = 4, R_1 = 2 + 4/2 = 4, R_0 = 1 + 4/2 = 3, whatever the values are.
    reward, mask = double([[1, 2, 4]]), torch.ones(1, 3, dtype=torch.bool)
    for value in (double([[0, 0, 0]]), double([[5, -3, 0.7]])):
        advantage, returns = generalised_advantage(reward, value, mask, gamma=0.5, lam=1.0)
        torch.testing.assert_close(returns, double([[3, 4, 4]]))
        torch.testing.assert_close(advantage, double([[3, 4, 4]]) - value)


def test_with_lambda_zero_the_advantage_is_the_one_step_error() -> None:
    # γ = 1/2: δ_0 = 1 + 2/2 - 3 = -1, δ_1 = 2 + 1/2 - 2 = 0.5, δ_2 = 4 - 1 = 3.
    reward, value = double([[1, 2, 4]]), double([[3, 2, 1]])
    advantage, _ = generalised_advantage(reward, value, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=0.0)
    torch.testing.assert_close(advantage, double([[-1, 0.5, 3]]))


def test_with_gamma_zero_the_return_is_the_reward() -> None:
    reward, value = double([[1, 2, 4]]), double([[3, 2, 1]])
    advantage, returns = generalised_advantage(reward, value, torch.ones(1, 3, dtype=torch.bool), gamma=0.0, lam=0.9)
    torch.testing.assert_close(advantage, double([[-2, 0, 3]]))
    torch.testing.assert_close(returns, reward)


def test_gae_of_an_episode_that_goes_on() -> None:
    # γ = 1/2, λ = 1: the value 8 after the last token adds 8/2, 8/4 and 8/8 to the returns 4, 4 and 3.
    reward, mask = double([[1, 2, 4], [1, 2, 4]]), torch.ones(2, 3, dtype=torch.bool)
    _, returns = generalised_advantage(reward, 0 * reward, mask, gamma=0.5, lam=1.0, after=double([8, 0]))
    torch.testing.assert_close(returns, double([[4, 6, 8], [3, 4, 4]]))


def test_gae_does_not_look_at_the_padding_or_change_its_input() -> None:
    reward, value = double([[0, 1, NAN]]), double([[0.5, 0.25, NAN]])
    before = reward.clone(), value.clone()
    mask = torch.tensor([[True, True, False]])
    wide = generalised_advantage(reward, value, mask, 0.9, 0.8)
    narrow = generalised_advantage(reward[:, :2], value[:, :2], mask[:, :2], 0.9, 0.8)
    for padded, cut in zip(wide, narrow, strict=True):
        assert torch.equal(padded[:, :2], cut)
    for tensor, copy in zip((reward, value), before, strict=True):
        torch.testing.assert_close(tensor, copy, equal_nan=True)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 300])
def test_gae_is_its_recurrence_whatever_the_length(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    reward, value = torch.randn(2, 4, length, dtype=torch.float64, generator=generator)
    mask = torch.rand(4, length, generator=generator) < 0.7
    after = torch.randn(4, dtype=torch.float64, generator=generator)
    expected = torch.zeros_like(value)
    for row in range(4):
        following, running = after[row], 0.0
        for t in reversed(mask[row].nonzero().flatten().tolist()):
            running = reward[row, t] + 0.97 * following - value[row, t] + 0.97 * 0.9 * running
            following, expected[row, t] = value[row, t], running
    advantage, returns = generalised_advantage(reward, value, mask, 0.97, 0.9, after)
    torch.testing.assert_close(advantage, expected)
    torch.testing.assert_close(returns, torch.where(mask, expected + value, 0))


def test_gae_refuses_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        generalised_advantage(torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool), 1.0, 1.0)


# Groups are neither sorted nor numbered from 0: rows 0, 2, 4 are group 9, rows 1, 3 group 2, row 5 group -1
GROUP = torch.tensor([9, 2, 9, 2, 9, -1])
REWARD = double([1, 4, 2, 4, 6, 5])


def test_group_mean_by_hand() -> None:
    torch.testing.assert_close(group_mean(REWARD, GROUP), double([3, 4, 3, 4, 3, 5]))


def test_group_normalised_by_hand() -> None:
    # Group 9: mean 3, deviations -2, -1, 3, variance 14/2 = 7. Group 2 has no spread, group -1 a single row.
    scale = math.sqrt(7) + 1e-4
    expected = double([-2 / scale, 0, -1 / scale, 0, 3 / scale, 0])
    torch.testing.assert_close(group_normalised(REWARD, GROUP), expected)


def test_leave_one_out_by_hand() -> None:
    # Group 9: 1 - (2 + 6)/2 = -3, 2 - (1 + 6)/2 = -1.5, 6 - (1 + 2)/2 = 4.5.
    torch.testing.assert_close(leave_one_out(REWARD, GROUP), double([-3, 0, -1.5, 0, 4.5, 0]))


def otb_advantage(reward: Tensor, group: Tensor) -> Tensor:
    """r - B_t of rows of three tokens with random score norms."""
    norm = torch.rand(len(reward), 3, dtype=reward.dtype, generator=torch.manual_seed(0))
    baseline = optimal_token_baseline(reward, group, norm, torch.ones_like(norm, dtype=torch.bool))
    return (reward[:, None] - baseline).flatten()


def whitened(reward: Tensor, _: Tensor) -> Tensor:
    return whiten(reward[None], torch.ones(1, len(reward), dtype=torch.bool))


ESTIMATORS = (group_centred, group_normalised, leave_one_out, otb_advantage, whitened)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@given(value=st.floats(-1e30, 1e30), size=st.integers(2, 12))
@example(value=1000.1, size=3)  # whose float32 mean is another number: A was 0.35
@example(value=0.1, size=3)
def test_equal_rewards_give_exactly_zero_whatever_their_scale(
    estimator: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, value: float, size: int
) -> None:
    reward, group = torch.full((size,), value, dtype=dtype), torch.zeros(size, dtype=torch.long)
    assert (estimator(reward, group) == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS[:4])
def test_a_large_offset_costs_no_digits(estimator: Callable[..., Tensor]) -> None:
    # 10⁹ + 0, ½, 1: in float32, whose numbers lie 64 apart there, they would all be equal
    reward, group = double([0, 0.5, 1, 7]), torch.tensor([0, 0, 0, 1])
    for offset in (0.0, 1e9, -1e9):
        torch.testing.assert_close(estimator(reward + offset, group), estimator(reward, group), rtol=1e-6, atol=1e-6)
    assert estimator(reward, group).abs().max() > 0.4
    if estimator is not otb_advantage:  # differences first, then fewer digits
        low = estimator(reward + 1e9, group, dtype=torch.float32)
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), estimator(reward, group), rtol=1e-6, atol=1e-6)


def test_whiten_by_hand() -> None:
    # Unmasked: 1, 2, 3, 6: mean 3, deviations -2, -1, 0, 3, variance 14/3.
    mask = torch.tensor([[True, True, False], [False, True, True]])
    found = whiten(double([[1, 2, NAN], [100, 3, 6]]), mask)
    scale = math.sqrt(14 / 3)
    torch.testing.assert_close(found, double([[-2 / scale, -1 / scale, 0], [0, 0, 3 / scale]]))


def test_whiten_leaves_a_single_entry_and_no_entry() -> None:
    one = torch.tensor([[True, False]])
    assert whiten(double([[5, NAN]]), one).tolist() == [[5, 0]]
    assert whiten(double([[NAN, NAN]]), ~one & one).tolist() == [[0, 0]]


def test_whiten_of_equal_entries_is_zero() -> None:
    assert whiten(double([[2, 2, 2]]), torch.ones(1, 3, dtype=torch.bool)).tolist() == [[0, 0, 0]]


def test_last_token_by_hand() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    expected = torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    assert torch.equal(last_token(mask), expected)
