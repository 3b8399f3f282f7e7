"""Which items a step takes, as a function of the step alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.core.random import permutation

MEGA_BATCH_STEPS = 50
"""Most steps whose records are sorted by length together; as many as in transformers' `LengthGroupedSampler`."""

TRAINING_ORDER = "training order"
"""Stream of the draws that order a supervised run's records."""


class Sampler(Protocol):
    """An endless sequence of items, of which any part can be asked for: a resumed run needs only its cursor."""

    num_items: int
    """Items of an epoch."""

    def indices(self, start: int, count: int) -> Tensor:
        """[count] int64, the items at positions start..start+count-1."""
        ...


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
        return _part(self._epoch, self.num_items, start, count)


class LengthGroupedSampler:
    """The items of another sampler, epoch by epoch, in an order in which the items of a step are of like length.

    As in transformers' `LengthGroupedSampler`, an epoch is cut into mega-batches of up to `MEGA_BATCH_STEPS` steps, at least
    four of them where it is long enough, and each is sorted by length; here all have the same number of steps, to within one.
    There the steps then come longest first, and lengths fall through every mega-batch; here their order is drawn, so that a
    step's length says nothing about when it comes. A step that spans the end of one epoch and the beginning of the next takes
    what comes, without regard to length.

    An epoch's order is a function of seed, stream and epoch, and it has the items of the other sampler's epoch.
    """

    def __init__(self, base: Sampler, lengths: np.ndarray, batch_size: int, seed: int, stream: str) -> None:
        """`lengths`: of every item that `base` may give; `batch_size`: items of a step, which begins at a multiple of it."""
        self.num_items = base.num_items
        self._base, self._lengths, self._batch_size = base, torch.from_numpy(np.asarray(lengths)), batch_size
        self._seed, self._stream = seed, stream
        self._most_steps = min(max(self.num_items // (4 * batch_size), 1), MEGA_BATCH_STEPS)
        """Of a mega-batch."""
        self._epoch = lru_cache(maxsize=2)(self._draw)

    def indices(self, start: int, count: int) -> Tensor:
        """See `Sampler`."""
        return _part(self._epoch, self.num_items, start, count)

    def _draw(self, epoch: int) -> Tensor:
        """[num_items] the items of an epoch."""
        items = self._base.indices(epoch * self.num_items, self.num_items)
        head = min(-epoch * self.num_items % self._batch_size, self.num_items)
        num_steps = (self.num_items - head) // self._batch_size
        whole, tail = items[head:].split(
            [num_steps * self._batch_size, len(items) - head - num_steps * self._batch_size]
        )
        parts = [items[:head]]
        mega_batches = whole.reshape(num_steps, self._batch_size).tensor_split(
            max(1, -(-num_steps // self._most_steps))
        )
        for number, mega_batch in enumerate(mega_batches):
            # Stable: of equal length, the order that was drawn.
            by_length = torch.argsort(self._lengths[mega_batch.flatten()], descending=True, stable=True)
            steps = mega_batch.flatten()[by_length].reshape(mega_batch.shape)
            order = permutation(self._seed, f"{self._stream}/{epoch}", number, len(steps))
            parts.append(steps[order].flatten())
        return torch.cat([*parts, tail])


def _part(epoch_of: Callable[[int], Tensor], num_items: int, start: int, count: int) -> Tensor:
    """Positions start..start+count-1 of the epochs laid end to end."""
    if start < 0 or count < 0:
        raise ValueError(f"start {start} and count {count} must not be negative")
    parts = [torch.zeros(0, dtype=torch.long)]
    while count > 0:
        epoch, offset = divmod(start, num_items)
        part = epoch_of(epoch)[offset : offset + count]
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return torch.cat(parts)
