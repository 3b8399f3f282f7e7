"""Pairs of ranked responses, and their weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_dist.core.batches import PreferenceBatch

PairWeights = Callable[[PreferenceBatch, Tensor, Tensor], Tensor]
"""(batch, columns of the better [C], of the worse [C]) → [P, C] what the loss of each pair is multiplied by; 0 drops it."""
PairClasses = Callable[[PreferenceBatch, Tensor, Tensor], dict[str, Tensor]]
"""The same arguments → name of a class → [P, C] bool, which pairs are of it."""


def ranked_pairs(
    present: Tensor, ranks: Tensor | None = None, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of ranked responses, and how much each weighs.

    Args:
        present: [P, K] bool, a prefix of each row: prompts may have fewer than K responses.
        ranks: [P, K], rising along a row. A pair of equal ranks is a tie and does not count, as in InstructGPT; None: no ties.
        excluded: [P, C(K,2)] bool, True for pairs that do not count either.

    Returns:
        (columns of the better, columns of the worse, weights [P, C(K,2)] fp32: 1 / number of the prompt's pairs, and 0 where
        there is no pair).
    """
    num = present.shape[1]
    better, worse = torch.triu_indices(num, num, offset=1, device=present.device)
    pairs = present[:, better] & present[:, worse]
    if ranks is not None:
        pairs = pairs & (ranks[:, better] < ranks[:, worse])
    if excluded is not None:
        pairs = pairs & ~excluded
    return better, worse, pairs / pairs.sum(1, keepdim=True).clamp(min=1)


def weighted_pairs(batch: PreferenceBatch, pair_weights: PairWeights | None) -> tuple[Tensor, Tensor, Tensor]:
    """`ranked_pairs` of a batch, with the weights [P, C(K,2)] times the pair weights; None: 1."""
    if pair_weights is None:
        return ranked_pairs(batch.present, batch.ranks)
    better, worse, _ = ranked_pairs(batch.present, batch.ranks)
    factors = pair_weights(batch, better, worse)
    return better, worse, ranked_pairs(batch.present, batch.ranks, factors == 0)[2] * factors
