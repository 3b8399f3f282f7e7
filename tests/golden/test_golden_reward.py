"""The pairwise loss against real steps of TRL 1.16.0's `RewardTrainer`."""

from __future__ import annotations

import pytest
import torch
from golden_data import load, tensors

from rlhf_dist.reward.losses import pairwise_loss

CASES = load("trl_reward.json")["cases"]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_loss_and_metrics(number):
    case = tensors(CASES[number])
    chosen, rejected = case["chosen"], case["rejected"]
    loss, sums = pairwise_loss(chosen, rejected, case["margins"], case["centering_coef"] or 0.0)
    assert float(loss) / len(chosen) == pytest.approx(case["loss"], rel=1e-6)
    assert float(sums["accuracy"]) / len(chosen) == pytest.approx(case["accuracy"], rel=1e-6)
    # Both report the margin that was reached, not what is left of it above the one asked for.
    assert float(sums["margin"]) / len(chosen) == pytest.approx(case["margin"], rel=1e-6)


def test_every_combination_of_terms_was_recorded():
    assert {(c["margins"] is not None, c["centering_coef"]) for c in CASES} == {
        (margins, coef) for margins in (False, True) for coef in (None, 0.01, 0.5)
    }


def test_the_terms_move_the_recorded_loss():
    """A fixture in which margins or centering change nothing would prove nothing."""
    for case in map(tensors, CASES):
        plain, _ = pairwise_loss(case["chosen"], case["rejected"])
        has_terms = case["margins"] is not None or case["centering_coef"] is not None
        assert has_terms == (abs(float(plain) / len(case["chosen"]) - case["loss"]) > 1e-3)


def test_centering_squares_the_sum_of_a_pair():
    """Not the two scores apart: for r_w = −r_l the term is 0, however large they are."""
    chosen = torch.tensor([3.0, 0.5])
    with_term, _ = pairwise_loss(chosen, -chosen, centering_coef=0.5)
    without, _ = pairwise_loss(chosen, -chosen)
    assert float(with_term) == float(without)
