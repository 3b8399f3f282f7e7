"""Splitting a batch over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def partition(lengths: Sequence[int] | Tensor, num_ranks: int, micro_batch_size: int) -> list[list[list[int]]]:
    """Rank → micro-batch → rows.

    Rows are sorted by length and dealt back and forth over the ranks, so that ranks have equal work and a micro-batch
    little padding. Every rank gets the same number of micro-batches; where rows do not suffice, they are empty, and the
    worker still runs them, so that ZeRO-3's collectives stay aligned. Ceiling division alone would leave a rank out:
    5 rows over 4 ranks by twos.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i))
    rows: list[list[int]] = [[] for _ in range(num_ranks)]
    for position, row in enumerate(order):
        turn, place = divmod(position, num_ranks)
        rows[place if turn % 2 == 0 else num_ranks - 1 - place].append(row)
    num_micro_batches = max(1, -(-max(len(r) for r in rows) // micro_batch_size))
    return [[r[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(num_micro_batches)] for r in rows]
