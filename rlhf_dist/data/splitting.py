"""Which records are held out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np

from rlhf_dist.core.errors import DataError
from rlhf_dist.core.random import permutation

R = TypeVar("R")


def hold_out(
    records: Sequence[R], fraction: float, seed: int, together: Callable[[R], Hashable] | None = None
) -> tuple[list[R], list[R]]:
    """Records to train on and records held out, both in the order of `records`.

    Args:
        records: all.
        fraction: share to hold out.
        seed: draws which; the result depends on the arguments only.
        together: a record's group (default: each stands alone). A group is never divided; the number of records held out
            is the nearest to `fraction` that whole groups add up to, the lower of two.

    Raises:
        DataError: a side would be empty.
    """
    num_eval = round(len(records) * fraction)
    if not 0 < num_eval < len(records):
        raise DataError(
            f"data.eval_fraction {fraction} of {len(records)} records holds out {num_eval} and leaves "
            f"{len(records) - num_eval} to train on; both must be at least 1: change eval_fraction or give more records"
        )
    groups: dict[Hashable, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(i if together is None else together(record), []).append(i)
    if len(groups) == 1:
        raise DataError(
            f"data.eval_fraction {fraction} cannot split {len(records)} records of one prompt, text or labelled row, "
            "which would be on both sides; give records of others, name held-out sets in data.eval, or set eval_fraction to 0"
        )
    order = permutation(seed, "data/eval_split", 0, len(groups)).tolist()
    members = list(groups.values())
    drawn = [members[i] for i in order]
    held = {i for number in _nearest_sum([len(group) for group in drawn], num_eval) for i in drawn[number]}
    # In file order on both sides, so that neither depends on how the other was drawn.
    return (
        [record for i, record in enumerate(records) if i not in held],
        [record for i, record in enumerate(records) if i in held],
    )


def _nearest_sum(sizes: Sequence[int], wanted: int) -> list[int]:
    """Which of two or more sizes, but not all, add up to `wanted`, or nearest to it."""
    totals = np.cumsum(sizes)
    if (first := int(np.searchsorted(totals, wanted))) < len(totals) and totals[first] == wanted:
        return list(range(first + 1))  # always so where each size is 1
    # Where a sum up to `wanted` exists, one above twice `wanted` is farther off; else the smallest size is the nearest.
    most = min(max(2 * wanted, min(sizes)), sum(sizes) - 1)
    last = np.full(most + 1, -1)
    """Of each sum that some of the sizes so far add up to, the last of them; -1: none do."""
    reached = np.zeros(most + 1, dtype=bool)
    reached[0] = True
    for number, size in enumerate(sizes):
        sums = np.flatnonzero(reached[: max(most + 1 - size, 0)] & ~reached[size:]) + size
        last[sums] = number
        reached[sums] = True
        if reached[wanted]:
            break
    sums = np.flatnonzero(reached)[1:]
    left = int(sums[np.abs(sums - wanted).argmin()])
    chosen = []
    while left:
        chosen.append(int(last[left]))
        left -= sizes[chosen[-1]]
    return chosen
