"""From scores to token rewards."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_dist.ppo.rewards import RunningMoments, normalize_scores, overlong_penalty, shape_scores, token_rewards


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


def test_running_moments_are_those_of_all_scores():
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, generator=g) * 3 + 1000 for n in (5, 1, 64)]
    moments = RunningMoments()
    for part in parts:
        moments = moments.updated(part)
    scores = torch.cat(parts).double()
    assert moments.count == 70
    assert moments.mean == pytest.approx(float(scores.mean()), rel=1e-12)
    assert moments.std == pytest.approx(float(scores.std(unbiased=False)), rel=1e-9)
    assert RunningMoments().std == 0


def test_normalized_scores():
    scores = torch.tensor([1.0, 3.0])
    moments = RunningMoments().updated(scores)  # mean 2, standard deviation 1
    assert normalize_scores(scores, moments, subtract_mean=True).tolist() == pytest.approx([-1, 1])
    assert normalize_scores(scores, moments, subtract_mean=False).tolist() == pytest.approx([1, 3])
    # A reward that is the same for everything so far has no scale to divide by.
    for same in (torch.full((3,), 7.3), torch.zeros(2), torch.tensor([0.1])):
        moments = RunningMoments().updated(same)
        assert torch.allclose(normalize_scores(same, moments, subtract_mean=True), torch.zeros_like(same), atol=1e-6)
        assert torch.equal(normalize_scores(same, moments, subtract_mean=False), same)


def test_the_overlong_penalty_grows_over_the_buffer():
    lengths = torch.tensor([1, 90, 95, 100])
    penalty = overlong_penalty(lengths, max_response_tokens=100, buffer_tokens=10, penalty=2.0)
    assert penalty.tolist() == [0.0, 0.0, 1.0, 2.0]
    assert penalty.dtype == torch.float32


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("eos", [0.0, 0.25])
@pytest.mark.parametrize("overlong", [None, 0.5])
@pytest.mark.parametrize("normalize", [False, True])
def test_every_combination_keeps_the_stated_order(clip, eos, overlong, normalize):
    # Score 8 of a cut-off response; scores so far have mean 4 and standard deviation 2: normalized, it is 2.
    score = 2.0 if normalize else 8.0
    score = score if clip is None else min(score, clip)
    expected = score - eos - (overlong or 0.0)
    scores = torch.tensor([8.0])
    if normalize:
        scores = normalize_scores(scores, RunningMoments(100, 4.0, 400.0), subtract_mean=True)
    penalty = None if overlong is None else torch.tensor([overlong])
    shaped = shape_scores(scores, torch.tensor([True]), score_clip=clip, missing_eos_penalty=eos, overlong=penalty)
    assert shaped.item() == pytest.approx(expected)
