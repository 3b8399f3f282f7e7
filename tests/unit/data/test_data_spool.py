"""Records on disk."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_dist.core.errors import DataError
from rlhf_dist.data.spool import RecordStore, Spool


@given(st.lists(st.binary(max_size=6), max_size=20), st.lists(st.integers(0, 19), max_size=30), st.integers(1, 7))
def test_a_spool_gives_back_what_it_took(
    tmp_path_factory: pytest.TempPathFactory, items: list[bytes], wanted: list[int], block: int
) -> None:
    with Spool(tmp_path_factory.mktemp("spool") / "s") as spool:
        for number, item in enumerate(items):
            spool.append(item)
            assert spool[number] == item
        assert list(spool) == items
        assert spool.lengths().tolist() == [len(item) for item in items]
        numbers = [number for number in wanted if number < len(items)]
        assert list(spool.in_order_of(numbers, block)) == [items[number] for number in numbers]


@given(st.lists(st.text(max_size=3), max_size=9), st.data())
def test_a_store_of_records_is_a_sequence(items: list[str], data: st.DataObject) -> None:
    store = RecordStore(iter(items))
    picks = st.lists(st.integers(-len(items), len(items) - 1), max_size=9) if items else st.just([])
    first, second = data.draw(picks), data.draw(st.lists(st.integers(0, 8), max_size=9))
    some = [items[i] for i in first]
    second = [i for i in second if i < len(some)]
    assert list(store) == [store[i] for i in range(len(store))] == items
    assert list(store.select(first)) == some
    assert list(store.select(first).each(len).each(str).select(second)) == [str(len(some[i])) for i in second]
    assert list(store[1:]) == items[1:]
    assert bool(store) == bool(items)
    with pytest.raises(IndexError):
        store[len(items)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(*_: object) -> None:
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(Spool, "flush", full)
    with pytest.raises(DataError, match=r"disk of .* is full \([\d,]+ of [\d,]+ bytes are free\).* HF_DATASETS_CACHE"):
        RecordStore(["a"])
