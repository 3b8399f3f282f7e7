"""Pairs out of single ratings."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_dist.core.random import permutation

_NUM_ROUNDS = 4
"""Random rounds before what is left is paired by sorting. Each leaves about half of those that found no partner."""


def pair_by_rating(ratings: Sequence[float], seed: int, min_margin: float, group: int = 0) -> list[tuple[int, int]]:
    """Pairs (i, j) of items of which i is rated higher than j, by at least `min_margin`.

    Every item is in one pair at most, and as many are in one as random partners allow: neighbours of a random order are
    paired where they differ enough, the others meet again in a new order; of those that stay, low meets high. The
    result depends on the arguments only; `group` sets the draws of different prompts apart.
    """

    def ordered(i: int, j: int) -> tuple[int, int] | None:
        high, low = (i, j) if ratings[i] > ratings[j] else (j, i)
        margin = ratings[high] - ratings[low]
        return (high, low) if margin > 0 and margin >= min_margin else None

    pairs: list[tuple[int, int]] = []
    left = list(range(len(ratings)))
    for shuffle in range(_NUM_ROUNDS):
        order = permutation(seed, f"data/ratings/{shuffle}", group, len(left)).tolist()
        left = [left[k] for k in order]
        unpaired = left[len(left) // 2 * 2 :]
        for i, j in zip(left[::2], left[1::2], strict=False):
            pair = ordered(i, j)
            if pair is None:
                unpaired += [i, j]
            else:
                pairs.append(pair)
        left = unpaired
    # Two pointers over the lower and the upper half of the sorted rest make the most pairs of it.
    left.sort(key=lambda i: ratings[i])
    low = 0
    for high in range((len(left) + 1) // 2, len(left)):
        if low < len(left) // 2 and (pair := ordered(left[low], left[high])):
            pairs.append(pair)
            low += 1
    return pairs
