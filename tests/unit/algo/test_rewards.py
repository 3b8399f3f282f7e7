"""From scores to token rewards."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_dist.algo.kl import kl_k1, kl_k3
from rlhf_dist.algo.rewards import shape_scores, token_rewards


def test_kl_estimators_average_to_the_kl_divergence():
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    exact = (p * (p / q).log()).sum()
    for estimator in (kl_k1, kl_k3):
        assert (p * estimator(p.log(), q.log())).sum() == pytest.approx(float(exact), rel=1e-12)


def test_k1_has_a_sign_and_k3_has_none():
    logprobs, ref = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-2.0, -1.0, -2.0])
    assert kl_k1(logprobs, ref).tolist() == [1.0, -2.0, 0.0]
    assert kl_k3(logprobs, ref).tolist() == pytest.approx([math.exp(-1), math.exp(2) - 3, 0.0])
    assert kl_k3(torch.tensor([0.0]), torch.tensor([1e-4])) > 0  # expm1: exp(x) - 1 - x would have lost its digits


def test_the_penalty_comes_after_the_clip():
    scores, truncated = torch.tensor([10.0, 10.0, -10.0, 1.0]), torch.tensor([False, True, True, True])
    shaped = shape_scores(scores, truncated, score_clip=5.0, missing_eos_penalty=2.0)
    assert shaped.tolist() == [5.0, 3.0, -7.0, -1.0]
    assert scores.tolist() == [10.0, 10.0, -10.0, 1.0]
    assert torch.equal(shape_scores(scores, truncated), scores)


def test_token_rewards_by_hand():
    kl = torch.tensor([[0.1, 0.2, 0.3], [1.0, math.nan, math.inf]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), kl, mask, kl_coef=0.5)
    assert torch.allclose(rewards, torch.tensor([[-0.05, -0.1, 1.85], [-1.5, 0.0, 0.0]]))


def test_the_score_counts_in_full_without_a_kl_penalty():
    mask = torch.tensor([[True, True, False]])
    rewards = token_rewards(torch.tensor([3.0]), torch.full((1, 3), 9.0), mask, kl_coef=0.0)
    assert rewards.tolist() == [[0.0, 3.0, 0.0]]
