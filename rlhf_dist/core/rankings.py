"""Pairs of ranked responses, and their weights."""

from __future__ import annotations

import torch
from torch import Tensor


def ranked_pairs(
    present: Tensor, ranks: Tensor | None = None, left_out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of ranked responses, and how much each weighs.

    Args:
        present: [P, K] bool, a prefix of each row: prompts may have fewer than K responses.
        ranks: [P, K], rising along a row. A pair of equal ranks is a tie and is left out, as InstructGPT's are; None: no ties.
        left_out: [P, C(K,2)] bool, True for pairs that are to be none either.

    Returns:
        (columns of the better, columns of the worse, weights [P, C(K,2)] fp32: 1 / number of the prompt's pairs, and 0 where
        there is no pair).
    """
    num = present.shape[1]
    better, worse = torch.triu_indices(num, num, offset=1, device=present.device)
    pairs = present[:, better] & present[:, worse]
    if ranks is not None:
        pairs = pairs & (ranks[:, better] < ranks[:, worse])
    if left_out is not None:
        pairs = pairs & ~left_out
    return better, worse, pairs / pairs.sum(1, keepdim=True).clamp(min=1)
