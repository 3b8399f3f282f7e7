"""Splitting a batch over ranks and micro-batches."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.distributed.partition import MicroBatching, partition


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=0, max_size=40),
    num_ranks=st.integers(1, 9),
    size=st.integers(1, 7),
)
def test_every_row_once_and_every_rank_in_step(lengths: list[int], num_ranks: int, size: int):
    shares = partition(lengths, num_ranks, size)
    assert len(shares) == num_ranks
    assert sorted(row for share in shares for micro in share for row in micro) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1  # a rank with fewer would leave the others in a collective
    assert len(shares[0]) >= 1
    assert all(len(micro) <= size for share in shares for micro in share)
    rows = [sum(len(micro) for micro in share) for share in shares]
    assert max(rows) - min(rows) <= 1
    assert len(shares[0]) == max(1, -(-max(rows) // size))  # and none more than needed


def test_five_rows_over_four_ranks_leave_none_out():
    shares = partition([5, 4, 3, 2, 1], 4, 2)
    assert sorted(sum(len(micro) for micro in share) for share in shares) == [1, 1, 1, 2]
    assert {len(share) for share in shares} == {1}


def test_fewer_rows_than_ranks_leave_idle_micro_batches():
    assert partition([3, 9], 4, 2) == [[[1]], [[0]], [[]], [[]]]


def test_no_rows_still_run_one_idle_micro_batch():
    assert partition([], 2, 4) == [[[]], [[]]]


def test_work_is_balanced():
    lengths = list(range(1, 65))
    work = [sum(lengths[row] for micro in share for row in micro) for share in partition(lengths, 4, 4)]
    assert max(work) - min(work) <= 0.01 * sum(work)


def test_rows_of_a_micro_batch_have_like_lengths():
    lengths = [10, 500] * 8
    for share in partition(lengths, 2, 4):
        assert all(len({lengths[row] for row in micro}) == 1 for micro in share)


def cost(rows: list[int], lengths: list[int], sequences: list[int], packed: bool) -> int:
    """Tokens of a forward pass, counted as the worker lays them out: one entry a sequence, padded to the longest or not."""
    laid_out = [lengths[row] for row in rows for _ in range(sequences[row])]
    return sum(laid_out) if packed else len(laid_out) * max(laid_out)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 3)), min_size=0, max_size=30),
    num_ranks=st.integers(1, 4),
    budget=st.integers(270, 700),
    packed=st.booleans(),
)
def test_micro_batches_keep_within_a_token_budget(
    rows: list[tuple[int, int]], num_ranks: int, budget: int, packed: bool
):
    lengths, sequences = [length for length, _ in rows], [count for _, count in rows]
    limit = MicroBatching(size=1, tokens=budget, packed=packed)
    shares = partition(lengths, num_ranks, limit, sequences)
    assert len(shares) == num_ranks
    assert sorted(row for share in shares for micro in share for row in micro) == list(range(len(rows)))
    assert len({len(share) for share in shares}) == 1
    assert all(cost(micro, lengths, sequences, packed) <= budget for share in shares for micro in share if micro)
    counts = [sum(len(micro) for micro in share) for share in shares]
    assert max(counts) - min(counts) <= 1
    assert not rows or any(share[-1] for share in shares)  # no micro-batch that every rank idles through
    for share in shares:
        for i, micro in enumerate(share):  # and none that could have been spared
            for earlier in share[:i]:
                if micro:
                    assert cost([*earlier, micro[0]], lengths, sequences, packed) > budget
    assert partition(lengths, num_ranks, limit, sequences) == shares


def test_a_token_budget_takes_the_place_of_the_size():
    lengths = [8, 8, 4, 4, 2, 2, 1, 1]
    assert partition(lengths, 1, MicroBatching(2, tokens=16)) == [[[0, 1], [2, 3, 4, 5], [6, 7]]]
    assert partition(lengths, 1, MicroBatching(2, tokens=16, packed=True)) == [[[0, 1], [2, 3, 4, 5, 6, 7]]]
    assert partition(lengths, 1, MicroBatching(2, packed=True)) == partition(lengths, 1, 2)


def test_packed_rows_fill_what_longer_rows_leave():
    assert partition([7, 6, 4, 3], 1, MicroBatching(1, tokens=10, packed=True)) == [[[0, 3], [1, 2]]]


def test_a_pair_costs_twice_its_longer_side():
    lengths = [5, 5, 5, 5]
    assert partition(lengths, 1, MicroBatching(9, tokens=20)) == [[[0, 1, 2, 3]]]
    assert partition(lengths, 1, MicroBatching(9, tokens=20), 2) == [[[0, 1], [2, 3]]]
    assert partition(lengths, 1, MicroBatching(9, tokens=20), [1, 4, 1, 2]) == [[[0, 2, 3], [1]]]


def test_ranks_with_less_to_do_idle_through_their_last_micro_batches():
    shares = partition([9, 9, 1], 2, MicroBatching(9, tokens=9))
    assert shares == [[[0], []], [[1], [2]]]
    assert partition([9], 3, MicroBatching(9, tokens=9, packed=True)) == [[[0]], [[]], [[]]]
    assert partition([], 2, MicroBatching(9, tokens=9)) == [[[]], [[]]]


def test_a_row_over_the_budget_is_rejected():
    with pytest.raises(ConfigError, match=r"micro_batch_tokens is 19 .* 20 tokens .*\(2 x 10\); raise .* at least 20"):
        partition([10, 3], 2, MicroBatching(8, tokens=19), 2)


def test_rankings_of_varying_length_are_dealt_by_all_their_tokens():
    """By length alone, all the rankings of 9 responses would go to one rank: 18,432 tokens against 4,096."""
    sequences = [9, 2, 2, 9, 9, 2, 2, 9]
    for limit in (2, MicroBatching(1, tokens=9 * 512), MicroBatching(1, tokens=9 * 512, packed=True)):
        shares = partition([512] * 8, 2, limit, sequences)
        assert [sum(sequences[row] for micro in share for row in micro) for share in shares] == [22, 22]


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 9)), min_size=0, max_size=40),
    num_ranks=st.integers(1, 9),
    size=st.integers(1, 7),
)
def test_no_rank_has_more_than_one_rankings_tokens_above_another(
    rows: list[tuple[int, int]], num_ranks: int, size: int
):
    lengths, sequences = [length for length, _ in rows], [count for _, count in rows]
    shares = partition(lengths, num_ranks, size, sequences)
    assert sorted(row for share in shares for micro in share for row in micro) == list(range(len(rows)))
    assert len({len(share) for share in shares}) == 1
    assert all(len(micro) <= size for share in shares for micro in share)
    work = [sum(lengths[row] * sequences[row] for micro in share for row in micro) for share in shares]
    # Dealt back and forth in falling order, differences between ranks telescope to at most one row.
    assert max(work) - min(work) <= max((length * count for length, count in rows), default=0)


def test_a_ranks_rankings_share_micro_batches_by_length():
    lengths, sequences = [100, 500] * 8, [9, 1] * 8
    for share in partition(lengths, 2, 4, sequences):
        widths = [lengths[row] for micro in share for row in micro]
        assert widths == sorted(widths, reverse=True)
