"""Importance weights of rollouts: by hand, and against a loop."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_dist.ppo.importance import Correction, importance_metrics, importance_weights
from rlhf_dist.ppo.losses import policy_loss

# Three responses of three, two and one tokens: ratios π_old / μ of (0.5, 1, 4), (3, 3) and (1.25).
RATIOS = [[0.5, 1.0, 4.0], [3.0, 3.0], [1.25]]
MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
MU = torch.tensor([[-1.0, -2.0, -3.0], [-1.5, -2.5, math.nan], [-0.75, math.inf, math.nan]])
OLD = torch.tensor(
    [
        [-1.0 - math.log(2), -2.0, -3.0 + math.log(4)],
        [-1.5 + math.log(3), -2.5 + math.log(3), 0.0],
        [-0.75 + math.log(1.25), 0.0, math.nan],
    ]
)


def weights_of(old: torch.Tensor, mu: torch.Tensor, correction: Correction, mask: torch.Tensor = MASK) -> torch.Tensor:
    weights = importance_weights(old, mu, mask, correction)
    assert weights is not None
    return weights


def test_token_weights_are_truncated():
    weights = weights_of(OLD, MU, Correction(cap=2.0))
    assert torch.allclose(weights, torch.tensor([[0.5, 1.0, 2.0], [2.0, 2.0, 0.0], [1.25, 0.0, 0.0]]))


def test_sequences_far_from_the_policy_are_masked():
    # Geometric means: (0.5 · 1 · 4)^(1/3) = 1.26, 3 and 1.25.
    weights = weights_of(OLD, MU, Correction(sequence_range=2.0))
    assert torch.equal(weights, torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))
    swapped = weights_of(MU, OLD, Correction(sequence_range=2.0))  # means 0.79, 1/3 and 0.8
    assert torch.equal(swapped, weights)
    both = weights_of(OLD, MU, Correction(cap=2.0, sequence_range=1.255))
    assert torch.allclose(both, torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.25, 0.0, 0.0]]))


def test_without_a_correction_there_are_no_weights():
    assert importance_weights(OLD, MU, MASK, Correction()) is None


def test_metrics_by_hand():
    correction = Correction(cap=2.0, sequence_range=2.0)
    weights = importance_weights(OLD, MU, MASK, correction)
    found = importance_metrics(OLD, MU, MASK, weights, correction)
    # Weights 0.5, 1, 2, 0, 0, 1.25: sum 4.75, of squares 6.8125; 4.75² / (6 · 6.8125).
    assert found["rollout/importance_ess"] == pytest.approx(0.551988, abs=1e-6)
    assert found["rollout/importance_truncated_fraction"] == pytest.approx(0.5)  # 4, 3 and 3
    assert found["rollout/importance_masked_fraction"] == pytest.approx(1 / 3)
    # Ratios less 1 less their logarithms: 0.193147 + 0 + 1.613706 + 2 · 0.901388 + 0.026856, over 6.
    assert found["kl/rollout_per_token"] == pytest.approx(0.606081, abs=1e-6)
    assert found["rollout/logprob_mismatch"] == pytest.approx(1.386294, abs=1e-6)


def test_metrics_of_a_batch_that_is_all_masked_and_of_no_correction():
    far = Correction(sequence_range=1.1)
    weights = importance_weights(OLD, MU, MASK, far)
    found = importance_metrics(OLD, MU, MASK, weights, far)
    assert (found["rollout/importance_ess"], found["rollout/importance_masked_fraction"]) == (0.0, 1.0)
    assert "rollout/importance_truncated_fraction" not in found
    plain = importance_metrics(OLD, OLD, MASK, None, Correction())
    assert plain == {"kl/rollout_per_token": 0.0, "rollout/logprob_mismatch": 0.0}


def test_equal_log_probs_weigh_exactly_one():
    weights = weights_of(OLD, OLD, Correction(cap=2.0, sequence_range=1.01))
    assert torch.equal(weights, MASK.float())


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_weighted_policy_loss_against_a_loop(dual_clip: float | None):
    """In float64: the loss, and its gradient by finite differences."""
    g = torch.Generator().manual_seed(4)
    old, mu, advantages = (torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(3))
    lengths = [5, 2, 4, 1]
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    new = old + 0.4 * torch.randn(4, 5, generator=g, dtype=torch.float64)

    def loop(logprobs: torch.Tensor) -> float:
        total = 0.0
        for b, n in enumerate(lengths):
            mean = sum(float(old[b, t] - mu[b, t]) for t in range(n)) / n
            if not 1 / 1.3 <= math.exp(mean) <= 1.3:
                continue
            for t in range(n):
                weight = min(math.exp(float(old[b, t] - mu[b, t])), 1.5)
                ratio, a = math.exp(float(logprobs[b, t] - old[b, t])), float(advantages[b, t])
                gain = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
                if dual_clip is not None and a < 0:
                    gain = max(gain, dual_clip * a)
                total -= weight * gain
        return total

    weights = weights_of(old, mu, Correction(cap=1.5, sequence_range=1.3), mask)
    assert 0 < int((weights == 0).all(1).sum()) < 4, "some sequences are masked"
    leaf = new.clone().requires_grad_()
    loss, sums = policy_loss(leaf, old, advantages, mask, 0.2, dual_clip=dual_clip, weights=weights)
    loss.backward()
    assert leaf.grad is not None
    assert loss.item() == pytest.approx(loop(new), rel=1e-12)
    assert float(sums["loss"]) == loss.item()
    for b in range(4):
        for t in range(5):
            up, down = new.clone(), new.clone()
            up[b, t] += 1e-6
            down[b, t] -= 1e-6
            assert leaf.grad[b, t].item() == pytest.approx((loop(up) - loop(down)) / 2e-6, abs=1e-7)


def test_weights_on_padding_reach_no_gradient():
    g = torch.Generator().manual_seed(0)
    logprobs, old, advantages = (torch.randn(3, 3, generator=g) for _ in range(3))
    gradients = []
    for padding in (0.0, math.nan):
        leaf = logprobs.clone().requires_grad_()
        weights = torch.where(MASK, 1.5, padding)
        policy_loss(leaf, old, advantages, MASK, 0.2, weights=weights)[0].backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_weights_of_one_change_no_bit():
    g = torch.Generator().manual_seed(0)
    logprobs, old, advantages = (torch.randn(3, 3, generator=g) for _ in range(3))
    results = []
    for weights in (None, torch.ones(3, 3)):
        leaf = logprobs.clone().requires_grad_()
        loss, _ = policy_loss(leaf, old, advantages, MASK, 0.2, weights=weights)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
