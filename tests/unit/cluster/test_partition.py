"""Splitting a batch over ranks and micro-batches."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.cluster.partition import partition


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
