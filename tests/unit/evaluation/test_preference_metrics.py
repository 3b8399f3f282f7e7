"""Accuracy, calibration and correlations, against numbers by hand, scikit-learn and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.calibration import calibration_curve

from rlhf_dist.evaluation.preference_metrics import accuracy, calibration, pearson, spearman


def noise(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_accuracy_by_hand() -> None:
    deltas, weights = torch.tensor([2.0, -1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 0.5])
    assert accuracy(deltas, weights) == pytest.approx((1 + 0.5 + 0.5) / 3.5)
    assert math.isnan(accuracy(torch.zeros(0), torch.zeros(0)))


def test_calibration_by_hand() -> None:
    # σ(0.4) = 0.5987, σ(3) = 0.9526: bins 1 and 9 of ten over [0.5, 1].
    found = calibration(torch.tensor([0.4, -0.4, 0.4, 3.0]), torch.ones(4))
    sure = [1 / (1 + math.exp(-0.4)), 1 / (1 + math.exp(-3))]
    assert found.confidence == pytest.approx(sure)
    assert found.accuracy == pytest.approx([2 / 3, 1])
    assert found.weight == pytest.approx([0.75, 0.25])
    assert found.ece == pytest.approx(0.75 * abs(2 / 3 - sure[0]) + 0.25 * (1 - sure[1]))


def test_calibration_is_scikit_learns_of_the_models_choice() -> None:
    deltas = 2 * noise(2000)
    found = calibration(deltas, torch.ones(2000), num_bins=5)
    sure, right = torch.sigmoid(deltas.abs()).numpy(), (deltas > 0).numpy()
    # scikit-learn's bins lie over [0, 1]: ten of them put five over [0.5, 1].
    expected_right, expected_sure = calibration_curve(right, sure, n_bins=10)
    np.testing.assert_allclose(found.accuracy, expected_right)
    np.testing.assert_allclose(found.confidence, expected_sure)


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large() -> None:
    truth = 1.5 * noise(20_000)
    won = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) < torch.sigmoid(truth)
    deltas = torch.where(won, truth, -truth)
    ones = torch.ones(20_000)
    assert calibration(deltas, ones).ece < 0.01
    assert calibration(5 * deltas, ones).ece > 0.1


def test_weights_count_as_repetition() -> None:
    deltas = noise(50)
    repeats = torch.randint(1, 4, (50,), generator=torch.Generator().manual_seed(0))
    whole = calibration(deltas.repeat_interleave(repeats), torch.ones(int(repeats.sum())))
    assert calibration(deltas, repeats.double()).ece == pytest.approx(whole.ece)
    assert accuracy(deltas, repeats.double()) == pytest.approx(
        accuracy(deltas.repeat_interleave(repeats), torch.ones(int(repeats.sum())))
    )


def test_correlations_are_scipys_with_ties() -> None:
    a = noise(300)
    b = (a + noise(300, 1) * 2).round()
    assert pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0])
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0])
    assert math.isnan(pearson(a, torch.ones(300)))
    assert math.isnan(spearman(torch.ones(3), torch.ones(3)))
