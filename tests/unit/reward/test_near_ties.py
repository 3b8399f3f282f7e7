"""Near-ties: which they are, what they weigh, and the loss of each treatment, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.core.near_ties import NearTieRule, pair_margins
from rlhf_dist.core.rankings import ranked_pairs
from rlhf_dist.reward.losses import ranking_loss

PRESENT = torch.tensor([[True, True, False], [True, True, True], [True, True, False]])
RATINGS = torch.tensor([[2.0, 0.0, 0.0], [4.1, 3.6, 3.5], [0.0, 0.0, 0.0]])
RATED = torch.tensor([True, True, False])
RANKS = torch.tensor([[0, 1, 0], [0, 1, 2], [0, 1, 0]])
SCORES = torch.tensor([[1.0, 0.5, 9.0], [0.2, 0.7, -0.4], [0.3, 0.1, 9.0]])


def margins(below: float) -> tuple[torch.Tensor, torch.Tensor]:
    better, worse, _ = ranked_pairs(PRESENT, RANKS)
    return pair_margins(RATINGS, RATED, better, worse, below)


def loss(rule: NearTieRule, scores: torch.Tensor = SCORES) -> tuple[float, dict[str, float]]:
    value, sums = ranking_loss(scores, PRESENT, ranks=RANKS, near_ties=rule, margins=margins(rule.below))
    return value.item(), {name: float(number) for name, number in sums.items()}


def nll(difference: float) -> float:
    return math.log1p(math.exp(-difference))


def test_a_margin_at_the_threshold_is_clear_and_none_is_too():
    """4.1 − 3.6 is 0.49999976 in fp32; the third record states nothing, though its ratings are equal."""
    _, near = margins(0.5)
    _, _, weights = ranked_pairs(PRESENT, RANKS)
    assert (near & (weights > 0)).tolist() == [[False, False, False], [False, False, True], [False, False, False]]


def test_keep_changes_nothing_and_counts():
    plain, _ = ranking_loss(SCORES, PRESENT, ranks=RANKS)
    kept, sums = loss(NearTieRule(0.5, "keep"))
    assert kept == plain.item()
    # Near: the pair (0.7, -0.4) of the second prompt, a third of it. Clear: the rest.
    assert sums["near_pairs"] == pytest.approx(1 / 3)
    assert sums["near_accuracy"] == pytest.approx(1 / 3)
    assert sums["clear_pairs"] == pytest.approx(1 + 2 / 3 + 1)
    assert sums["clear_accuracy"] == pytest.approx(1 + 1 / 3 + 1)


def test_dropped_pairs_hand_their_weight_to_the_prompts_others():
    found, sums = loss(NearTieRule(0.5, "drop"))
    assert found == pytest.approx(nll(0.5) + (nll(-0.5) + nll(0.6)) / 2 + nll(0.2))
    assert sums["near_pairs"] == pytest.approx(1 / 3), "still counted"


def test_a_prompt_of_near_ties_only_has_no_loss_and_no_gradient():
    scores = SCORES.clone().requires_grad_()
    value, _ = ranking_loss(scores, PRESENT, ranks=RANKS, near_ties=NearTieRule(9.0, "drop"), margins=margins(9.0))
    value.backward()
    assert value.item() == pytest.approx(nll(0.2))
    assert not scores.grad[:2].any()


def test_down_weighted_by_hand():
    found, _ = loss(NearTieRule(0.5, "down_weight", near_weight=0.25, clear_weight=1.5))
    second = (1.5 * nll(-0.5) + 1.5 * nll(0.6) + 0.25 * nll(1.1)) / 3
    assert found == pytest.approx(1.5 * nll(0.5) + second + 1.5 * nll(0.2))


def test_soft_labels_by_hand():
    """At t = 2: margins 0.5, 0.6 and 0.1 give 62.5 %, 65 % and 52.5 %."""
    found, _ = loss(NearTieRule(2.0, "soft_labels"))
    soft = [(0.625, -0.5), (0.65, 0.6), (0.525, 1.1)]
    second = sum(p * nll(d) + (1 - p) * nll(-d) for p, d in soft) / 3
    assert found == pytest.approx(nll(0.5) + second + nll(0.2), rel=1e-5)


def test_a_soft_label_is_what_the_scores_are_drawn_to():
    """The loss of a pair is least where σ(Δ) = p."""
    rule = NearTieRule(2.0, "soft_labels")
    chosen = torch.tensor(0.0, requires_grad=True)
    one = torch.ones(1, 2, dtype=torch.bool)
    better, worse, _ = ranked_pairs(one)
    found = pair_margins(torch.tensor([[0.8, 0.0]]), torch.tensor([True]), better, worse, 2.0)
    optimizer = torch.optim.SGD([chosen], lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        scores = torch.stack([chosen, torch.zeros(())])[None]
        ranking_loss(scores, one, near_ties=rule, margins=found)[0].backward()
        optimizer.step()
    assert torch.sigmoid(chosen).item() == pytest.approx(0.7, abs=1e-4)


@given(near=st.floats(0.01, 1e6), clear=st.floats(0.01, 1e6))
def test_near_ties_never_outweigh_clear_pairs_and_prompts_weigh_one_on_average(near: float, clear: float):
    rule = NearTieRule.of(0.5, "down_weight", near, clear)
    assert rule.near_weight * near <= rule.clear_weight * clear * (1 + 1e-9)
    assert rule.near_weight * near + rule.clear_weight * clear == pytest.approx(near + clear)
    if near <= clear:
        assert rule.near_weight == rule.clear_weight == 1
    else:
        assert rule.near_weight * near == pytest.approx(rule.clear_weight * clear)


@pytest.mark.parametrize("treat", ["keep", "drop", "soft_labels"])
def test_other_treatments_weigh_nothing(treat):
    rule = NearTieRule.of(0.5, treat, 90.0, 10.0)
    assert rule.weights(torch.tensor([[True, False]])) is None
