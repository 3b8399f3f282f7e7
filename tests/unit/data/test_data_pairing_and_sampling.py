from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.data import EpochSampler
from rlhf_dist.data.ratings import pair_by_rating

RATINGS = st.lists(st.sampled_from([-4.0, -1.2, 0.0, 0.3, 1.0, 3.5]), max_size=30)


@settings(deadline=None)
@given(RATINGS, st.integers(0, 5), st.sampled_from([0.0, 0.5, 2.0]))
def test_pairs_are_ordered_disjoint_and_as_many_as_the_rest_allows(ratings, seed, min_margin):
    pairs = pair_by_rating(ratings, seed, min_margin)
    used = [i for pair in pairs for i in pair]
    assert len(used) == len(set(used))
    for i, j in pairs:
        assert ratings[i] > ratings[j]
        assert ratings[i] - ratings[j] >= min_margin
    rest = [rating for i, rating in enumerate(ratings) if i not in used]
    # Nothing that is left could still be paired.
    assert not rest or max(rest) - min(rest) < max(min_margin, 1e-9)
    assert pairs == pair_by_rating(ratings, seed, min_margin)


def test_pairs_depend_on_seed_and_group():
    ratings = [float(i) for i in range(50)]
    drawn = {tuple(pair_by_rating(ratings, seed, 0.5, group)) for seed in (0, 1) for group in (0, 1)}
    assert len(drawn) == 4


def test_few_pairable_items_are_found():
    assert pair_by_rating([0.0] * 99 + [1.0], 0, 0.5)[0][0] == 99
    assert len(pair_by_rating([0.0] * 50 + [1.0] * 50, 0, 0.5)) >= 45


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 40), st.lists(st.integers(0, 9), max_size=6))
def test_any_cut_gives_the_same_sequence(num_items, start, counts):
    whole = EpochSampler(num_items, 7, "s").indices(start, sum(counts))
    parts = [torch.zeros(0, dtype=torch.long)]
    for count in counts:  # a fresh sampler each time: what a resumed run has
        parts.append(EpochSampler(num_items, 7, "s").indices(start, count))
        start += count
    assert torch.equal(whole, torch.cat(parts))
    assert whole.dtype == torch.int64


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 5))
def test_each_epoch_holds_every_item_once(num_items, epoch):
    sampler = EpochSampler(num_items, 0, "s")
    assert sorted(sampler.indices(epoch * num_items, num_items).tolist()) == list(range(num_items))


def test_epochs_seeds_and_streams_differ():
    orders = [
        EpochSampler(30, seed, stream).indices(epoch * 30, 30).tolist()
        for seed in (0, 1)
        for stream in ("a", "b")
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 8


def test_refusals():
    with pytest.raises(ValueError, match="at least 1 item"):
        EpochSampler(0, 0, "s")
    with pytest.raises(ValueError, match="must not be negative"):
        EpochSampler(1, 0, "s").indices(-1, 1)
