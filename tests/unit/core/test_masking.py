"""Sums and statistics under a mask."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_dist.core.masking import masked_mean, masked_sum, masked_var, masked_whiten

X = torch.tensor([[1.0, 2.0, math.nan], [4.0, -math.inf, math.inf]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_what_is_outside_the_mask_never_matters():
    assert masked_sum(X, MASK) == 7.0
    assert masked_mean(X, MASK) == pytest.approx(7 / 3)
    assert masked_var(X, MASK) == pytest.approx(14 / 9)  # mean of squares 7, minus 49/9
    white = masked_whiten(X, MASK)
    assert torch.isfinite(white).all()
    assert (white[~MASK] == 0).all()


def test_the_gradient_of_a_masked_sum_is_the_mask():
    x = X.clone().requires_grad_()
    masked_sum(x, MASK).backward()
    assert torch.equal(x.grad, MASK.float())


def test_statistics_of_nothing_are_zero():
    nothing = torch.zeros_like(MASK)
    assert masked_sum(X, nothing) == masked_mean(X, nothing) == 0
    assert torch.equal(masked_whiten(X, nothing), torch.zeros_like(X))


def test_whitened_values_have_mean_0_and_variance_1():
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 100
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    kept = masked_whiten(x, mask)[mask].double()
    assert kept.mean().abs() < 1e-6
    assert kept.var(unbiased=False) == pytest.approx(1, abs=1e-6)
    assert masked_whiten(x, mask).dtype == torch.float32


def test_whitening_keeps_small_differences_on_a_large_mean():
    # In fp32 the squares of these values have no digits left for a variance of 1e-4.
    x = torch.tensor([[4096.0, 4096.01953125, 4096.0, 4096.01953125]])
    white = masked_whiten(x, torch.ones_like(x, dtype=torch.bool))
    assert torch.allclose(white, torch.tensor([[-1.0, 1.0, -1.0, 1.0]]), atol=1e-3)


def test_whitening_a_constant_gives_zeros():
    x = torch.full((2, 3), 7.5)
    assert torch.equal(masked_whiten(x, torch.ones(2, 3, dtype=torch.bool)), torch.zeros(2, 3))
