"""What a reward model's scores are worth on pairs that people judged: accuracy, calibration, what else the scores follow.

A pair is told by Δ = r(x, y_w) − r(x, y_l). The model's own probability that y_w is the better is σ(Δ) (Bradley and Terry,
1952).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """How often the model is right, by how sure it is. Each entry of a list is a bin of confidence, from 0.5 up to 1."""

    confidence: list[float]
    """Mean of max(σ(Δ), 1 − σ(Δ)) over the bin's pairs."""
    accuracy: list[float]
    """Share of the bin's pairs whose better response scores higher; equal scores count one half."""
    weight: list[float]
    """The bin's share of all pairs."""
    ece: float
    """Expected calibration error: Σ_bins weight · |accuracy − confidence|."""


def accuracy(deltas: Tensor, weights: Tensor) -> float:
    """Weighted share of pairs with Δ > 0; Δ = 0 counts one half. NaN without pairs.

    Args:
        deltas: [N] Δ.
        weights: [N] ≥ 0.
    """
    right = (deltas > 0).double() + 0.5 * (deltas == 0)
    return float((right * weights).sum() / weights.sum()) if weights.sum() > 0 else float("nan")


def calibration(deltas: Tensor, weights: Tensor, num_bins: int = 10) -> Calibration:
    """Reliability of σ(|Δ|) as the probability of being right, in `num_bins` bins of equal width over [0.5, 1].

    The two orders of a pair say the same (σ(−Δ) = 1 − σ(Δ)), so each pair counts once, on the side of the model's choice.
    Bins without pairs are skipped. Source: Guo et al. 2017, "On calibration of modern neural networks", eq. 3.

    Args:
        deltas: [N] Δ.
        weights: [N] ≥ 0, not all 0.
        num_bins: ≥ 1.
    """
    weights = weights.double() / weights.double().sum()
    confidence = torch.sigmoid(deltas.double().abs())
    right = (deltas > 0).double() + 0.5 * (deltas == 0)
    index = ((confidence - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    total, sure, hit = (
        torch.zeros(num_bins, dtype=torch.float64).index_add(0, index, weights * values)
        for values in (torch.ones_like(confidence), confidence, right)
    )
    used = total > 0
    total, sure, hit = total[used], sure[used], hit[used]
    return Calibration(
        confidence=(sure / total).tolist(),
        accuracy=(hit / total).tolist(),
        weight=total.tolist(),
        ece=float((hit - sure).abs().sum()),
    )


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of two [N] tensors; NaN where one does not vary."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = a.norm() * b.norm()
    return float((a * b).sum() / scale) if scale > 0 else float("nan")


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two [N] tensors, with mean ranks for equal values; NaN where one does not vary."""
    return pearson(_mean_ranks(a), _mean_ranks(b))


def _mean_ranks(values: Tensor) -> Tensor:
    distinct, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    first = torch.cumsum(counts, 0) - counts
    return (first + (counts - 1) / 2)[inverse] if len(distinct) else values.double()
