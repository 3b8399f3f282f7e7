"""A draw is a function of what it is for."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_dist.core.random import derived_seed, permutation, uniforms

NUMBERS = st.integers(0, 2**40)


@settings(max_examples=25, deadline=None)
@given(seed=NUMBERS, iteration=NUMBERS, items=st.lists(NUMBERS, min_size=1, max_size=6), num=st.integers(1, 9))
def test_a_row_depends_on_its_own_item_only(seed: int, iteration: int, items: list[int], num: int):
    rows = uniforms(seed, "rollout", iteration, items, num)
    assert rows.shape == (len(items), num)
    assert rows.dtype == torch.float64
    assert ((rows >= 0) & (rows < 1)).all()
    for i, item in enumerate(items):
        assert torch.equal(rows[i], uniforms(seed, "rollout", iteration, [item], num)[0])
        assert torch.equal(rows[i], uniforms(seed, "rollout", iteration, torch.tensor([item]), num + 5)[0, :num])


def test_every_coordinate_of_the_counter_changes_the_draw():
    base = ("rollout", 3, [5])
    draws = [
        uniforms(1, *base, 4),
        uniforms(2, *base, 4),
        uniforms(1, "eval", 3, [5], 4),
        uniforms(1, "rollout", 4, [5], 4),
        uniforms(1, "rollout", 3, [6], 4),
        uniforms(1, "rollout", 5, [3], 4),  # item and iteration are not interchangeable
    ]
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert not (a == b).any()


def test_neighboring_items_do_not_overlap():
    # If items were offsets into one stream, item 1 would repeat what item 0 draws a little later.
    numbers = uniforms(0, "rollout", 0, range(50), 200).reshape(-1)
    assert len(numbers.unique()) == len(numbers)


def test_draws_are_uniform():
    numbers = uniforms(0, "rollout", 7, range(100), 100).reshape(-1)
    counts = torch.histc(numbers, bins=10, min=0, max=1)
    assert ((counts - 1000).square() / 1000).sum() < 27.9  # χ² with 9 degrees of freedom: P = 0.001
    by_row = numbers.reshape(100, 100)
    assert torch.corrcoef(by_row[:2])[0, 1].abs() < 0.33


def test_the_draws_of_a_release_stay_those_of_the_next():
    # A changed generator would silently change every recorded run.
    assert uniforms(0, "rollout", 0, [0], 2)[0].tolist() == [0.6096311987741754, 0.30677436640916733]


def test_no_item_gives_no_row():
    assert uniforms(0, "rollout", 0, [], 3).shape == (0, 3)


@settings(max_examples=25, deadline=None)
@given(seed=NUMBERS, iteration=NUMBERS, num=st.integers(0, 50))
def test_a_permutation_is_one(seed: int, iteration: int, num: int):
    order = permutation(seed, "order", iteration, num)
    assert order.dtype == torch.long
    assert sorted(order.tolist()) == list(range(num))
    assert torch.equal(order, permutation(seed, "order", iteration, num))


def test_permutations_of_different_epochs_and_streams_differ():
    orders = [permutation(0, "a", 0, 40), permutation(0, "a", 1, 40), permutation(0, "b", 0, 40)]
    assert len({tuple(order.tolist()) for order in orders}) == 3


def test_derived_seeds_are_accepted_by_torch_and_differ():
    seeds = {derived_seed(0, "dropout", step, rank) for step in range(20) for rank in range(4)}
    assert len(seeds) == 80
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))
