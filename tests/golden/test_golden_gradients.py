"""Autograd's gradients of the losses against central differences of the loops: a term that is detached by mistake, or a clip
that lets the gradient through, has the right value and the wrong gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference_loops as loops
import torch
from golden_ragged import POLICY_OPTIONS, Ragged, Rows
from torch import Tensor

from rlhf_dist.core.batches import length_mask
from rlhf_dist.ppo import losses
from rlhf_dist.reward.losses import ranking_loss


def assert_gradient(
    loss_of: Callable[[Tensor], Tensor], total_of: Callable[[Rows], float], at: Rows, ragged: Ragged
) -> None:
    """Autograd's gradient (in fp64) against central differences of the loop: a term that is detached by mistake, or a clip that
    lets the gradient through, has the right value and the wrong gradient."""
    x = ragged.padded(at, torch.float64).requires_grad_()
    (ours,) = torch.autograd.grad(loss_of(x), x)
    step = 1e-6
    for i, row in enumerate(at):
        for t in range(len(row)):
            up, down = [list(r) for r in at], [list(r) for r in at]
            up[i][t] += step
            down[i][t] -= step
            slope = (total_of(up) - total_of(down)) / (2 * step)
            assert float(ours[i, t]) == pytest.approx(slope, rel=1e-5, abs=1e-7)
    assert torch.all(ours[~ragged.mask] == 0)


@pytest.mark.parametrize("options", POLICY_OPTIONS, ids=str)
def test_gradient_of_the_policy_loss(options):
    ragged = Ragged(0)
    old, new, advantages = ragged.rows(0.5, -2), ragged.rows(0.9, -2), ragged.rows()
    low, bound = options["clip_range"], options.get("dual_clip")
    high = options.get("clip_range_high", low)
    wide_old, wide_advantages = (ragged.padded(rows, torch.float64) for rows in (old, advantages))

    def total(rows: Rows) -> float:
        return ragged.total(lambda n, o, a: loops.policy_token_loss(n, o, a, low, high, bound), rows, old, advantages)

    assert_gradient(
        lambda x: losses.policy_loss(x, wide_old, wide_advantages, ragged.mask, **options)[0], total, new, ragged
    )


@pytest.mark.parametrize("clip_range", [None, 0.3])
def test_gradient_of_the_value_loss(clip_range):
    ragged = Ragged(1)
    values, old, returns = ragged.rows(), ragged.rows(), ragged.rows(2.0)
    wide_old, wide_returns = (ragged.padded(rows, torch.float64) for rows in (old, returns))

    def total(rows: Rows) -> float:
        return ragged.total(lambda v, o, r: loops.value_token_loss(v, o, r, clip_range), rows, old, returns)

    assert_gradient(
        lambda x: losses.value_loss(x, wide_old, wide_returns, ragged.mask, clip_range)[0], total, values, ragged
    )


def test_gradient_of_the_ranking_loss():
    ragged = Ragged(2)
    ragged.lengths = torch.tensor([2, 5, 3, 4])
    ragged.mask = length_mask(ragged.lengths, 5)
    scores = ragged.rows(1.5)
    ratings = [sorted(row, reverse=True) for row in ragged.rows()]

    def total(rows: Rows) -> float:
        return sum(loops.prompt_ranking_loss(r, m, 0.1) for r, m in zip(rows, ratings, strict=True))

    assert_gradient(
        lambda x: ranking_loss(x, ragged.mask, ragged.padded(ratings, torch.float64), 0.1)[0],
        total,
        scores,
        ragged,
    )
