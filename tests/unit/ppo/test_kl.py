"""KL estimators against the divergence itself, and the controller of its coefficient by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_dist.core.kl import kl_k1, kl_k2, kl_k3
from rlhf_dist.ppo.kl_controller import adapted_kl_coef

P, Q = (torch.tensor(x, dtype=torch.float64) for x in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
EXACT = float((P * (P / Q).log()).sum())


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_average_to_the_kl_divergence(estimator):
    assert (P * estimator(P.log(), Q.log())).sum() == pytest.approx(EXACT, rel=1e-12)


def test_k2_is_biased_but_close_for_close_distributions():
    assert (P * kl_k2(P.log(), Q.log())).sum() != pytest.approx(EXACT, rel=5e-3)
    near = torch.softmax(P.log() + torch.tensor([0.01, -0.01, 0.0]), -1)
    exact = (P * (P / near).log()).sum()
    assert (P * kl_k2(P.log(), near.log())).sum() == pytest.approx(float(exact), rel=0.02)


def test_k1_has_a_sign_and_the_others_have_none():
    logprobs, ref = torch.tensor([-1.0, -3.0, -2.0]), torch.tensor([-2.0, -1.0, -2.0])
    assert kl_k1(logprobs, ref).tolist() == [1.0, -2.0, 0.0]
    assert kl_k2(logprobs, ref).tolist() == [0.5, 2.0, 0.0]
    assert kl_k3(logprobs, ref).tolist() == pytest.approx([math.exp(-1), math.exp(2) - 3, 0.0])
    assert kl_k3(torch.tensor([0.0]), torch.tensor([1e-4])) > 0  # expm1: exp(x) - 1 - x would have lost its digits


def test_the_coefficient_rises_above_the_target_and_falls_below_it():
    # 10 % over the target, 256 of 10,000 responses: 1 + 0.1 * 0.0256.
    assert adapted_kl_coef(0.2, 6.6, target=6.0, horizon=10_000, num_responses=256) == pytest.approx(0.2 * 1.00256)
    assert adapted_kl_coef(0.2, 5.4, target=6.0, horizon=10_000, num_responses=256) == pytest.approx(0.2 * 0.99744)
    assert adapted_kl_coef(0.2, 6.0, target=6.0, horizon=10_000, num_responses=256) == 0.2


@pytest.mark.parametrize(("kl", "factor"), [(600.0, 1.02), (-5.0, 0.98), (0.0, 0.98)])
def test_the_error_is_clipped_so_that_one_iteration_moves_little(kl: float, factor: float):
    assert adapted_kl_coef(1.0, kl, target=6.0, horizon=1000, num_responses=100) == pytest.approx(factor)


def test_over_a_horizon_of_responses_a_clipped_error_moves_by_e_to_a_fifth():
    coef = 1.0
    for _ in range(1000):
        coef = adapted_kl_coef(coef, 100.0, target=1.0, horizon=10_000, num_responses=10)
    assert coef == pytest.approx(math.exp(0.2), rel=1e-3)
