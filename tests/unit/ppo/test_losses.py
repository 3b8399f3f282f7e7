"""Losses by hand, where they are flat, and what padding does to them."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_dist.core.losses import nll_loss
from rlhf_dist.ppo.losses import entropy_loss, explained_variance, kl_loss, policy_loss, value_loss
from rlhf_dist.reward.losses import pairwise_loss, ranking_loss

ALL = torch.ones(1, 1, dtype=torch.bool)


def one(x: float) -> torch.Tensor:
    return torch.tensor([[x]])


def test_nll_is_a_sum():
    loss, sums = nll_loss(torch.tensor([-1.0, -2.5]))
    assert loss == sums["loss"] == 3.5


def test_pairwise_by_hand():
    chosen, rejected = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])
    loss, sums = pairwise_loss(chosen, rejected)
    expected = math.log1p(math.exp(-1)) + math.log1p(math.exp(1)) + math.log(2)
    assert loss.item() == pytest.approx(expected)
    assert (sums["accuracy"], sums["margin"]) == (1, 0)  # a tie is not counted as right


def test_pairwise_stays_finite_for_huge_margins():
    chosen = torch.tensor([-300.0]).requires_grad_()
    loss, _ = pairwise_loss(chosen, torch.tensor([300.0]))
    loss.backward()
    assert loss.item() == pytest.approx(600)
    assert chosen.grad == -1


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.1, 2.0, -2.2, -2.2, 0),  # inside the range: −A·ρ, and dρ/d log π = ρ
        (0.9, -2.0, 1.8, 1.8, 0),
        (1.5, 2.0, -2.4, 0.0, 1),  # a good token is already likelier than 1 + ε: flat
        (0.5, -2.0, 1.6, 0.0, 1),  # a bad token is already less likely than 1 − ε: flat
        (0.5, 2.0, -1.0, -1.0, 0),  # on the wrong side of the range the gradient must pull back
        (1.5, -2.0, 3.0, 3.0, 0),
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_policy_loss_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: int):
    logprobs = one(math.log(ratio) - 3.0).requires_grad_()
    actual, sums = policy_loss(logprobs, one(-3.0), one(advantage), ALL, 0.2)
    actual.backward()
    assert actual.item() == pytest.approx(loss, abs=1e-6)
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert int(sums["clip_fraction"]) == clipped
    assert float(sums["ratio"]) == pytest.approx(ratio)
    assert float(sums["approx_kl"]) == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "gradient", "clipped"),
    [
        (1.0, 0.9, 3.0, 0.2, 2.0, -2.0, 0),  # inside: ½(V − R)²
        (1.0, 0.0, 3.0, 0.2, 3.92, 0.0, 1),  # moved up past the range towards R: flat, at ½(0.2 − 3)²
        (-1.0, 0.0, -3.0, 0.2, 3.92, 0.0, 1),  # the same downwards
        (1.0, 0.0, -3.0, 0.2, 8.0, 4.0, 0),  # moved away from R: the unclipped error is the larger
        (1.0, 0.0, 3.0, None, 2.0, -2.0, 0),
    ],
)
def test_value_loss_by_hand(value, old, target, clip, loss, gradient, clipped):
    values = one(value).requires_grad_()
    actual, sums = value_loss(values, one(old), one(target), ALL, clip)
    actual.backward()
    assert actual.item() == pytest.approx(loss, abs=1e-6)
    assert values.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert int(sums["clip_fraction"]) == clipped


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 1e4])
def test_padding_changes_no_loss_and_no_gradient(rubbish: float):
    g = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    inputs = [torch.randn(2, 3, generator=g) for _ in range(3)]
    for loss in (
        lambda a, b, c: policy_loss(a, b, c, mask, 0.2),
        lambda a, b, c: value_loss(a, b, c, mask, 0.2),
        lambda a, b, c: value_loss(a, b, c, mask, None),
        lambda a, b, c: policy_loss(a, b, c, mask, 0.2, 0.3, 2.0),
        lambda a, b, c: kl_loss(a, b, mask, "k2"),
        lambda a, b, c: kl_loss(a, b, mask, "k3"),
        lambda a, b, c: entropy_loss(a, mask),
    ):
        results = []
        for padding in (0.0, rubbish):
            trained, *fixed = (torch.where(mask, x, padding) for x in inputs)
            trained.requires_grad_()
            total, sums = loss(trained, *fixed)
            total.backward()
            results.append((total.detach(), trained.grad, sums))
        (clean, clean_grad, clean_sums), (dirty, dirty_grad, dirty_sums) = results
        assert torch.equal(clean, dirty)
        assert torch.equal(clean_grad, dirty_grad)
        assert (dirty_grad[~mask] == 0).all()
        assert all(torch.equal(clean_sums[name], dirty_sums[name]) for name in clean_sums)


def test_losses_are_sums_so_that_parts_add_up():
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(4, 3, generator=g) for _ in range(3)]
    mask = torch.ones(4, 3, dtype=torch.bool)
    whole = policy_loss(*x, mask, 0.2)[0] + value_loss(*x, mask, 0.2)[0]
    parts = sum(
        policy_loss(*(t[i : i + 1] for t in x), mask[:1], 0.2)[0]
        + value_loss(*(t[i : i + 1] for t in x), mask[:1], 0.2)[0]
        for i in range(4)
    )
    assert torch.allclose(whole, torch.as_tensor(parts), atol=1e-5)


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 3.0, math.nan]]), torch.tensor([[True, True, False]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((1, 3), 2.0), returns, mask) == 0
    assert explained_variance(-returns, returns, mask) == -3
    assert math.isnan(explained_variance(returns, torch.ones(1, 3), mask))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.25, 2.0, -2.5, -2.5),  # between 1 + ε and 1 + ε_high: a gradient where ε alone would have stopped it
        (1.5, 2.0, -2.56, 0.0),
        (0.7, -2.0, 1.6, 0.0),  # the lower side keeps ε
    ],
)
def test_clip_higher_by_hand(ratio: float, advantage: float, loss: float, gradient: float):
    logprobs = one(math.log(ratio) - 3.0).requires_grad_()
    actual, _ = policy_loss(logprobs, one(-3.0), one(advantage), ALL, 0.2, 0.28)
    actual.backward()
    assert actual.item() == pytest.approx(loss, abs=1e-6)
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "bounded"),
    [
        (10.0, -2.0, 6.0, 0.0, 1),  # a bad token that became ten times likelier: 20 without the bound
        (2.0, -2.0, 4.0, 4.0, 0),
        (10.0, 2.0, -2.4, 0.0, 0),  # good tokens are the upper clip's business
    ],
)
def test_dual_clip_by_hand(ratio: float, advantage: float, loss: float, gradient: float, bounded: int):
    logprobs = one(math.log(ratio) - 3.0).requires_grad_()
    actual, sums = policy_loss(logprobs, one(-3.0), one(advantage), ALL, 0.2, dual_clip=3.0)
    actual.backward()
    assert actual.item() == pytest.approx(loss, rel=1e-5)
    assert logprobs.grad.item() == pytest.approx(gradient, abs=1e-5)
    assert int(sums["dual_clip_fraction"]) == bounded


def test_the_gradient_of_k2_is_that_of_the_kl_divergence_and_of_k1_is_0():
    # Exact expectations over a distribution of four tokens, tokens drawn from the (detached) policy itself.
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, generator=g, dtype=torch.float64).requires_grad_()
    ref = torch.log_softmax(torch.randn(4, generator=g, dtype=torch.float64), -1)
    log_p = torch.log_softmax(logits, -1)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - ref)).sum(), logits, retain_graph=True)
    mask = torch.ones(1, 1, dtype=torch.bool)

    def gradient(estimator) -> torch.Tensor:
        per_token = torch.stack([estimator(log_p[v].reshape(1, 1), ref[v].reshape(1, 1)) for v in range(4)])
        return torch.autograd.grad((log_p.detach().exp() * per_token).sum(), logits, retain_graph=True)[0]

    assert torch.allclose(gradient(lambda a, b: kl_loss(a, b, mask, "k2")[0]), exact)
    assert gradient(lambda a, b: (a - b).sum()).abs().max() < 1e-12
    assert not torch.allclose(gradient(lambda a, b: kl_loss(a, b, mask, "k3")[0]), exact, rtol=1e-2)
    with pytest.raises(ValueError, match="0 in expectation"):
        kl_loss(one(-1.0), one(-1.0), mask, "k1")


def test_the_entropy_bonus_is_a_sum_with_a_sign():
    entropies, mask = torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([[True, True, False]])
    loss, sums = entropy_loss(entropies, mask)
    assert (loss, sums["entropy"]) == (-3.0, 3.0)


def test_a_ranking_of_k_is_the_mean_of_its_pairs():
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.5], [1.0, 0.0, 7.0, 9.0]], requires_grad=True)
    present = torch.tensor([[True] * 4, [True, True, False, False]])
    loss, sums = ranking_loss(scores, present)
    losses, right = [], []
    for i in range(4):
        for j in range(i + 1, 4):
            difference = (scores[0, i] - scores[0, j]).item()
            losses.append(math.log1p(math.exp(-difference)))
            right.append(difference > 0)
    assert loss.item() == pytest.approx(sum(losses) / 6 + math.log1p(math.exp(-1)))
    assert float(sums["accuracy"]) == pytest.approx(sum(right) / 6 + 1)
    loss.backward()
    assert (scores.grad[1, 2:] == 0).all()


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -1e30])
def test_an_absent_response_changes_no_ranking(rubbish: float):
    present = torch.tensor([[True, True, False]])
    results = []
    for absent in (0.0, rubbish):
        scores = torch.tensor([[1.0, 0.5, absent]], requires_grad=True)
        ratings = torch.tensor([[3.0, 1.0, absent]])
        loss, sums = ranking_loss(scores, present, ratings, centering_coef=0.1)
        loss.backward()
        results.append((loss.detach(), scores.grad, *sums.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # A single response ranks against nobody.
    assert ranking_loss(torch.tensor([[1.0, rubbish]]), torch.tensor([[True, False]]))[0] == 0


def test_margins_and_centering_by_hand():
    chosen, rejected, margins = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([0.5])
    loss, sums = pairwise_loss(chosen, rejected, margins, centering_coef=0.01)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5)) + 0.01 * 9)
    assert float(sums["margin"]) == 1.0  # of the scores, before what is required of them
    # In a ranking, a pair's margin is the difference of its ratings.
    scores, ratings = torch.tensor([[2.0, 1.0, 0.5]]), torch.tensor([[4.0, 3.5, 1.0]])
    loss, _ = ranking_loss(scores, torch.ones(1, 3, dtype=torch.bool), ratings)
    pairs = [(1.0, 0.5), (1.5, 3.0), (0.5, 2.5)]
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(m - d)) for d, m in pairs) / 3)
