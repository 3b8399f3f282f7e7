"""Which items a step takes, as a function of the step alone."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from rlhf_dist.algo.random import permutation


class EpochSampler:
    """An endless sequence of items, shuffled anew each epoch.

    Epoch e is the permutation drawn from (seed, stream, e). Position p of the sequence is therefore known without the
    positions before it: a resumed run needs only its cursor, and no item is lost or doubled at an epoch's border.
    """

    def __init__(self, num_items: int, seed: int, stream: str) -> None:
        if num_items < 1:
            raise ValueError(f"num_items is {num_items}; an endless sequence needs at least 1 item")
        self.num_items = num_items
        self._epoch = lru_cache(maxsize=2)(lambda epoch: permutation(seed, stream, epoch, num_items))

    def indices(self, start: int, count: int) -> Tensor:
        """[count] int64, the items at positions start..start+count-1; epochs follow one another without a gap."""
        if start < 0 or count < 0:
            raise ValueError(f"start {start} and count {count} must not be negative")
        parts = [torch.zeros(0, dtype=torch.long)]
        while count > 0:
            epoch, offset = divmod(start, self.num_items)
            part = self._epoch(epoch)[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)
