from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.data.preferences import pair_by_rating
from rlhf_dist.data.sampler import EpochSampler, LengthGroupedSampler

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
def test_each_epoch_has_every_item_once(num_items, epoch):
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


def test_invalid_arguments():
    with pytest.raises(ValueError, match="at least 1 item"):
        EpochSampler(0, 0, "s")
    with pytest.raises(ValueError, match="must not be negative"):
        EpochSampler(1, 0, "s").indices(-1, 1)


def by_length(num_items: int, batch_size: int, seed: int = 7) -> LengthGroupedSampler:
    lengths = np.random.default_rng(num_items).integers(1, 500, num_items)
    return LengthGroupedSampler(EpochSampler(num_items, seed, "s"), lengths, batch_size, seed, "s/by length")


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 90), st.lists(st.integers(0, 9), max_size=6))
def test_grouped_by_length_any_cut_gives_the_same_sequence_and_an_epoch_every_item(
    num_items, batch_size, start, counts
):
    whole = by_length(num_items, batch_size).indices(start, sum(counts))
    parts, at = [torch.zeros(0, dtype=torch.long)], start
    for count in counts:
        parts.append(by_length(num_items, batch_size).indices(at, count))
        at += count
    assert torch.equal(whole, torch.cat(parts))
    for epoch in range(3):
        items = by_length(num_items, batch_size).indices(epoch * num_items, num_items)
        assert sorted(items.tolist()) == list(range(num_items))


def test_items_of_a_step_are_of_like_length():
    """Also in later epochs, which do not begin where a step does; of the steps at a border nothing is asked."""
    num_items, batch_size = 1003, 8
    grouped, drawn = by_length(num_items, batch_size), EpochSampler(num_items, 7, "s")
    lengths = np.random.default_rng(num_items).integers(1, 500, num_items)

    def spread(sampler, step):
        items = lengths[sampler.indices(step * batch_size, batch_size).numpy()]
        return items.max() - items.min()

    for epoch in range(3):
        steps = range(-(-epoch * num_items // batch_size), (epoch + 1) * num_items // batch_size)
        # A mega-batch of 25 steps holds 200 of lengths up to 500: a step spans some 20.
        assert max(spread(grouped, step) for step in steps) < 60
        assert min(spread(drawn, step) for step in steps) > 100
        means = [lengths[grouped.indices(step * batch_size, batch_size).numpy()].mean() for step in steps]
        # No order of lengths within an epoch: the early steps are not the long ones.
        assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3


def test_which_items_meet_in_a_step_differs_from_epoch_to_epoch_and_by_seed():
    def steps(seed, epoch):
        items = by_length(800, 8, seed).indices(epoch * 800, 800).reshape(-1, 8)
        return {frozenset(step.tolist()) for step in items}

    assert not steps(7, 0) & steps(7, 1)
    assert not steps(7, 0) & steps(8, 0)


def test_grouping_keeps_the_shares_of_what_it_groups():
    base = EpochSampler(7, 0, "s")
    grouped = LengthGroupedSampler(base, np.arange(1, 8), batch_size=2, seed=0, stream="g")
    assert grouped.num_items == 7
    assert sorted(grouped.indices(7, 7).tolist()) == sorted(base.indices(7, 7).tolist())
    with pytest.raises(ValueError, match="must not be negative"):
        grouped.indices(0, -1)
