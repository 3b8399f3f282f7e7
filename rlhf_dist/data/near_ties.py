"""How many pairs of a set are near-ties, and how much they weigh."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_dist.core.near_ties import pair_margins
from rlhf_dist.core.rankings import ranked_pairs


class NearTieCounts:
    """Pairs and weights of the two classes of `algo/near_ties.py`."""

    def __init__(self, below: float) -> None:
        self.below = below
        self.num_near = 0
        """Pairs of a margin below the threshold."""
        self.num_clear = 0
        """The others."""
        self.num_unrated = 0
        """Of these, pairs of records that state no margin."""
        self.near_total = 0.0
        """W_near."""
        self.clear_total = 0.0
        """W_clear."""
        self.with_clear: list[int] = []
        """Items that have a clear pair."""
        self._num_items = 0

    def add(self, present: Tensor, ranks: Tensor, ratings: Tensor, rated: Tensor) -> None:
        """Count further items: [P, K], [P, K], [P, K] and [P] of a `PreferenceBatch`."""
        better, worse, weights = ranked_pairs(present, ranks)
        _, near = pair_margins(ratings, rated, better, worse, self.below)
        pairs, weights = weights > 0, weights.double()
        self.num_near += int((pairs & near).sum())
        self.num_clear += int((pairs & ~near).sum())
        self.num_unrated += int((pairs & ~rated[:, None]).sum())
        self.near_total += float((weights * near).sum())
        self.clear_total += float((weights * ~near).sum())
        self.with_clear += (self._num_items + torch.nonzero((pairs & ~near).any(1)).flatten()).tolist()
        self._num_items += len(present)
