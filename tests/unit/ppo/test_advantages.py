"""Generalized advantage estimation against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_dist.core.batches import length_mask
from rlhf_dist.ppo.advantages import gae


def by_definition(rewards: list[float], values: list[float], discount: float, gae_lambda: float) -> list[float]:
    """A_t = Σ_l (γλ)^l δ_{t+l}, in float64, a sum over l for each t."""
    num = len(rewards)
    out = []
    for t in range(num):
        total = 0.0
        for k in range(t, num):
            next_value = values[k + 1] if k + 1 < num else 0.0
            total += (discount * gae_lambda) ** (k - t) * (rewards[k] + discount * next_value - values[k])
        out.append(total)
    return out


def test_by_hand():
    # δ_1 = 2 - 0.5 = 1.5; δ_0 = 1 + 0.5·0.5 - 1 = 0.25; A_0 = 0.25 + 0.5·0.5·1.5.
    advantages, returns = gae(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.5]]), torch.ones(1, 2, dtype=torch.bool), 0.5, 0.5
    )
    assert advantages.tolist() == [[0.625, 1.5]]
    assert returns.tolist() == [[1.625, 2.0]]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_equals_the_definition_row_by_row(discount: float, gae_lambda: float):
    lengths = torch.tensor([7, 1, 4, 6])
    g = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(4, 7, generator=g), torch.randn(4, 7, generator=g)
    mask = length_mask(lengths, 7)
    advantages, returns = gae(rewards, values, mask, discount, gae_lambda)
    for row, n in enumerate(lengths.tolist()):
        expected = by_definition(rewards[row, :n].tolist(), values[row, :n].tolist(), discount, gae_lambda)
        assert advantages[row, :n].tolist() == pytest.approx(expected, abs=1e-5)
        assert torch.allclose(returns[row, :n], advantages[row, :n] + values[row, :n])
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, 1e30])
def test_padding_never_enters(rubbish: float):
    g = torch.Generator().manual_seed(4)
    rewards, values = torch.randn(2, 5, generator=g), torch.randn(2, 5, generator=g)
    mask = length_mask(torch.tensor([2, 3]), 5)
    wide = gae(torch.where(mask, rewards, rubbish), torch.where(mask, values, rubbish), mask, 0.9, 0.9)
    narrow = gae(rewards[:, :3], values[:, :3], mask[:, :3], 0.9, 0.9)
    for a, b in zip(wide, narrow, strict=True):
        assert torch.equal(a[:, :3], b)
        assert (a[:, 3:] == 0).all()


def test_lambda_1_makes_returns_the_discounted_rewards_to_go():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[9.0, -3.0, 5.0]])
    _, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.5, 1.0)
    assert returns.tolist() == [[3.0, 4.0, 4.0]]


def test_a_truncated_response_goes_on_with_the_value_of_its_end():
    # Row 0 ended; row 1 was cut off after two tokens in a state worth 4: δ_1 = 2 + 0.5·4 - 0.5; A_0 = 0.25 + 0.25·3.5.
    rewards, values = torch.tensor([[1.0, 2.0, 9.0]] * 2), torch.tensor([[1.0, 0.5, 9.0]] * 2)
    mask = length_mask(torch.tensor([2, 2]), 3)
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5, torch.tensor([0.0, 4.0]))
    assert advantages.tolist() == [[0.625, 1.5, 0.0], [1.125, 3.5, 0.0]]
    assert returns.tolist() == [[1.625, 2.0, 0.0], [2.125, 4.0, 0.0]]


def test_bootstrapping_makes_a_cut_of_no_consequence_for_a_perfect_critic():
    # Rewards of 1 a token for ever, discounted by 0.9: every state is worth 10, wherever the response is cut.
    mask = length_mask(torch.tensor([5, 2]), 5)
    rewards, values = torch.ones(2, 5), torch.full((2, 5), 10.0)
    advantages, returns = gae(rewards, values, mask, 0.9, 0.95, torch.tensor([10.0, 10.0]))
    assert advantages.abs().max() < 1e-5
    assert torch.allclose(returns[mask], torch.tensor(10.0))


def test_a_full_row_ends_at_the_edge():
    ends = torch.tensor([2.0])
    advantages, _ = gae(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), 0.5, 0.5, ends)
    assert advantages.item() == 1.0
