"""Splitting a batch over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rlhf_dist.core.errors import ConfigError


@dataclass(frozen=True)
class MicroBatching:
    """What one forward pass of one rank may hold."""

    size: int
    """Rows, where `tokens` is None."""
    tokens: int | None = None
    """Tokens: padding included, unless `packed`."""
    packed: bool = False
    """Whether forward passes are packed: sequences end to end, without padding."""


def partition(
    lengths: Sequence[int] | Tensor,
    num_ranks: int,
    limit: int | MicroBatching,
    num_sequences: int | Sequence[int] | Tensor = 1,
) -> list[list[list[int]]]:
    """Rank → micro-batch → rows.

    Rows are sorted by their tokens (sequences x length) and dealt back and forth over the ranks, so that ranks have equal
    work; each rank then takes its own by length, so that a micro-batch has little padding. Every rank gets the same number
    of micro-batches; where rows do not suffice, they are empty, and the worker still runs them, so that ZeRO-3's
    collectives stay aligned. Ceiling division alone would leave a rank out: 5 rows over 4 ranks by twos.

    Args:
        lengths: of each row's longest sequence, in tokens.
        num_ranks: ranks to split over.
        limit: of one micro-batch; an int is a number of rows.
        num_sequences: sequences that each row puts into a forward pass (a preference pair: 2); one number serves all rows.

    Raises:
        ConfigError: one row alone is over the token budget.
    """
    limit = limit if isinstance(limit, MicroBatching) else MicroBatching(limit)
    lengths = [int(length) for length in lengths]
    sequences = [num_sequences] * len(lengths) if isinstance(num_sequences, int) else [int(n) for n in num_sequences]
    order = sorted(range(len(lengths)), key=lambda i: (-sequences[i] * lengths[i], i))
    rows: list[list[int]] = [[] for _ in range(num_ranks)]
    for position, row in enumerate(order):
        turn, place = divmod(position, num_ranks)
        rows[place if turn % 2 == 0 else num_ranks - 1 - place].append(row)
    if not limit.packed:
        for share in rows:
            share.sort(key=lambda i: (-lengths[i], i))
    if limit.tokens is None:
        shares = [[r[i : i + limit.size] for i in range(0, len(r), limit.size)] for r in rows]
    else:
        shares = [_within_budget(r, lengths, sequences, limit.tokens, limit.packed) for r in rows]
    num_micro_batches = max(1, *map(len, shares))
    return [share + [[] for _ in range(num_micro_batches - len(share))] for share in shares]


def _within_budget(
    rows: list[int], lengths: list[int], sequences: list[int], budget: int, packed: bool
) -> list[list[int]]:
    """Rows, longest first (`packed`: most tokens first), each into the first micro-batch that has room for it."""
    micro_batches: list[list[int]] = []
    room: list[int] = []
    for row in rows:
        alone = sequences[row] * lengths[row]
        if alone > budget:
            raise ConfigError(
                f"micro_batch_tokens is {budget} but one row of a batch puts {alone} tokens into a forward pass "
                f"({sequences[row]} x {lengths[row]}); raise micro_batch_tokens to at least {alone} or lower "
                "data.max_length_tokens"
            )
        for i, micro in enumerate(micro_batches):
            # A padded micro-batch is as wide as its first row, which is its longest.
            cost = alone if packed else sequences[row] * lengths[micro[0]]
            if cost <= room[i]:
                micro.append(row)
                room[i] -= cost
                break
        else:
            micro_batches.append([row])
            room.append(budget - alone)
    return micro_batches
