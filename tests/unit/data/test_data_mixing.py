from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlhf_dist.config.mixing import MixingSettings
from rlhf_dist.core.errors import ConfigError, DataError
from rlhf_dist.data.mixing import (
    MixtureSampler,
    compose,
    largest_mixture,
    largest_remainder,
    mixing_rates,
    share_table,
    temperature_rates,
)

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=5)


def rates(sizes: list[int], **values: object) -> tuple[Fraction, ...]:
    return mixing_rates(MixingSettings.model_validate(values), sizes)


def test_rates_are_the_formulas_exactly() -> None:
    # min(n, 100) of (1000, 100, 50, 1) is (100, 100, 50, 1).
    assert rates([1000, 100, 50, 1], cap=100) == (
        Fraction(100, 251),
        Fraction(100, 251),
        Fraction(50, 251),
        Fraction(1, 251),
    )
    assert rates([3, 1]) == (Fraction(3, 4), Fraction(1, 4))
    assert rates([7, 7, 9], method="equal") == (Fraction(1, 3),) * 3
    assert rates([5, 5, 5], method="weights", weights=[0.7, 0.2, 0.1]) == (
        Fraction(7, 10),
        Fraction(1, 5),
        Fraction(1, 10),
    )
    assert rates([5, 5], method="weights", weights=[3, 1e-3]) == (Fraction(3000, 3001), Fraction(1, 3001))
    # Of square sizes T = 2 has exact roots: 10 : 5 : 1.
    assert rates([100, 25, 1], method="temperature", temperature=2) == pytest.approx(
        [10 / 16, 5 / 16, 1 / 16], rel=1e-15
    )
    # The cap counts before the power: (900, 16) under 64 are 64 : 16, so 8 : 4.
    assert rates([900, 16], method="temperature", temperature=2, cap=64) == pytest.approx([2 / 3, 1 / 3], rel=1e-15)
    assert rates([9, 3], method="temperature", temperature=1, cap=4) == (Fraction(4, 7), Fraction(3, 7))


def test_a_high_temperature_is_equal_mixing_and_rates_add_up_to_one() -> None:
    assert temperature_rates([10**9, 1], 1e9) == pytest.approx([0.5, 0.5], abs=1e-7)
    assert sum(temperature_rates([10**9, 37, 12], 3.7)) == 1


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(0, 10**6))
def test_rounding_keeps_the_total_and_stays_within_one(weights: list[int], total: int) -> None:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    counts = largest_remainder(shares, total)
    assert sum(counts) == total
    assert all(abs(count - share * total) < 1 for count, share in zip(counts, shares, strict=True))
    # No share of the same size gets more than one beyond another.
    for i, share in enumerate(shares):
        assert all(abs(counts[i] - counts[j]) <= 1 for j, other in enumerate(shares) if other == share)


@given(SIZES, st.sampled_from(["proportional", "equal", "temperature"]), st.integers(1, 80))
def test_the_largest_mixture_exhausts_the_scarcest_source_and_repeats_nothing(
    sizes: list[int], method: str, cap: int
) -> None:
    extra: dict[str, object] = {"proportional": {"cap": cap}, "temperature": {"temperature": 2.5}, "equal": {}}[method]
    given_rates = rates(sizes, method=method, **extra)
    total = largest_mixture(given_rates, sizes)
    counts = largest_remainder(given_rates, total)
    assert all(count <= size for count, size in zip(counts, sizes, strict=True))
    # One more would ask some source for more than it has, before any rounding.
    assert any(rate * (total + 1) > size for rate, size in zip(given_rates, sizes, strict=True))


def test_proportional_without_a_cap_takes_everything_once() -> None:
    composition = compose(MixingSettings(), ["a", "b", "c"], [1000, 10, 1])
    assert composition.counts == (1000, 10, 1)
    assert [share.epochs for share in composition.shares] == [1, 1, 1]


def test_oversampling_is_done_only_when_asked() -> None:
    equal = MixingSettings(method="equal")
    assert compose(equal, ["a", "b"], [900, 100]).counts == (100, 100)
    asked = equal.model_copy(update={"num_records": 1000})
    with pytest.raises(
        ConfigError, match=r"500 records of source 'b' .*which has 100; lower num_records to 200 .*oversample"
    ):
        compose(asked, ["a", "b"], [900, 100])
    repeated = compose(asked.model_copy(update={"oversample": True}), ["a", "b"], [900, 100])
    assert repeated.counts == (500, 500)
    assert [share.epochs for share in repeated.shares] == [500 / 900, 5]
    assert compose(MixingSettings(method="equal", oversample=True), ["a", "b"], [900, 100]).counts == (500, 500)


def test_impossible_mixtures_are_invalid_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="weights has 1 numbers for 2 sources"):
        compose(MixingSettings(method="weights", weights=(1.0,)), ["a", "b"], [3, 3])
    with pytest.raises(DataError, match="source 'b' has no records"):
        compose(MixingSettings(), ["a", "b"], [3, 0])
    with pytest.raises(ConfigError, match=r"source 'b' would give no record.*0\.001 of 100 .*raise num_records"):
        compose(MixingSettings(method="weights", weights=(0.999, 0.001), num_records=100), ["a", "b"], [999, 9])


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"method": "equal", "cap": 3}, "cap is 3, but method 'equal'"),
        ({"temperature": 2}, "temperature is 2, but method 'proportional'"),
        ({"method": "weights"}, "method 'weights' needs weights"),
        ({"method": "temperature"}, "method 'temperature' needs temperature"),
        ({"method": "temperature", "temperature": 0.5}, "greater than or equal to 1"),
        ({"method": "weights", "weights": [1, 0]}, "greater than 0"),
    ],
)
def test_settings_that_contradict_each_other_are_invalid(values: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        MixingSettings.model_validate(values)


def test_the_table_shows_what_is_there_what_is_asked_and_what_is_taken() -> None:
    composition = compose(MixingSettings(method="weights", weights=(2.0, 1.0), num_records=100), ["a", "b"], [1234, 50])
    assert share_table(composition) == [
        ("a", "1,234", "66.6667%", "67", "67.0000%", "0.054"),
        ("b", "50", "33.3333%", "33", "33.0000%", "0.660"),
        ("all", "1,284", "100%", "100", "100%", "0.078"),
    ]


@settings(deadline=None)
@given(SIZES, st.integers(1, 150), st.integers(0, 5), st.booleans())
def test_each_mixture_has_its_counts_and_repeats_as_little_as_can_be(
    sizes: list[int], total: int, mixture: int, equal: bool
) -> None:
    wanted = MixingSettings(
        method="equal" if equal else "proportional", num_records=total + len(sizes) * 60, oversample=True
    )
    composition = compose(wanted, [str(i) for i in range(len(sizes))], sizes)
    sampler = MixtureSampler(composition, 3, "test")
    taken = sampler.indices(mixture * sampler.num_items, sampler.num_items)
    assert Counter(sampler.sources(taken).tolist()) == dict(enumerate(composition.counts))
    often = Counter(taken.tolist())
    start = 0
    for size, count in zip(sizes, composition.counts, strict=True):
        times = [often[record] for record in range(start, start + size)]
        assert {count // size, -(-count // size)} >= set(times)
        start += size


def test_a_position_is_known_without_those_before_it_and_depends_on_the_seed() -> None:
    composition = compose(MixingSettings(method="equal", num_records=7, oversample=True), ["a", "b"], [50, 2])
    whole = MixtureSampler(composition, 0, "s").indices(0, 40)
    for start, count in ((0, 1), (6, 2), (13, 20), (39, 1)):
        # A new sampler each time, as after a restart.
        assert (
            MixtureSampler(composition, 0, "s").indices(start, count).tolist() == whole[start : start + count].tolist()
        )
    assert MixtureSampler(composition, 1, "s").indices(0, 40).tolist() != whole.tolist()


def test_a_capped_source_gives_other_records_in_the_next_mixture() -> None:
    composition = compose(MixingSettings(cap=10, num_records=20), ["large", "small"], [40, 10])
    sampler = MixtureSampler(composition, 0, "s")
    four = sampler.indices(0, 80).tolist()
    assert sorted(record for record in four if record < 40) == list(range(40))
    assert Counter(record for record in four if record >= 40) == dict.fromkeys(range(40, 50), 4)
