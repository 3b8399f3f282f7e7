"""Weight transfer: what the checksum sees, and that nothing can be missing."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf_dist.core.errors import TrainingError
from rlhf_dist.distributed.weight_sync import WeightSource
from rlhf_dist.rollout import weights
from rlhf_dist.rollout.weights import WeightTarget


def checksum(name: str, values: torch.Tensor) -> int:
    return int(weights.checksum(name, values)) % 2**64


DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def tensor(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["odd", "even"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_changes_the_checksum(dtype: torch.dtype, name: str, data: st.DataObject):
    original = tensor(dtype)
    raw = original.clone().view(torch.uint8)
    byte, bit = data.draw(st.integers(0, raw.numel() - 1)), data.draw(st.integers(0, 7))
    raw.view(-1)[byte] ^= 1 << bit
    assert checksum(name, raw.view(dtype)) != checksum(name, original)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapped_elements_change_the_checksum(dtype: torch.dtype):
    original = tensor(dtype)
    for i, j in ((0, 1), (0, 19), (7, 12)):
        swapped = original.clone().view(-1)
        swapped[[i, j]] = swapped[[j, i]]
        assert checksum("weight", swapped.view(4, 5)) != checksum("weight", original)


def test_swapped_parameters_change_the_checksum_of_the_whole():
    # k_proj and v_proj have one shape, and names of one length.
    k, v = tensor(torch.float32), tensor(torch.float32) + 1
    right = checksum("layers.0.k_proj.weight", k) + checksum("layers.0.v_proj.weight", v)
    wrong = checksum("layers.0.k_proj.weight", v) + checksum("layers.0.v_proj.weight", k)
    assert right % 2**64 != wrong % 2**64


def test_the_layout_in_memory_does_not_enter_the_checksum():
    original = tensor(torch.float32)
    strided = torch.zeros(4, 10)[:, ::2].copy_(original)
    assert not strided.is_contiguous()
    assert checksum("weight", strided) == checksum("weight", original)


@pytest.mark.parametrize("bucket_bytes", [1, 40_000, 2**30])
def test_a_transfer_makes_the_models_equal(tiny_lm: Path, bucket_bytes: int):
    policy, engine = (AutoModelForCausalLM.from_pretrained(tiny_lm) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    source, target = WeightSource(policy, bucket_bytes), WeightTarget(engine)
    for transfer in range(2):  # a second transfer starts from clean counters
        for index in range(source.num_buckets):
            target.load_bucket(source.bucket(index))
        assert target.finish() == source.checksum(), transfer
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), engine.parameters(), strict=True))


def test_buckets_are_bounded_and_hold_every_parameter_once():
    model = nn.Sequential(*[nn.Linear(10, 10, bias=False) for _ in range(7)])  # 400 bytes each
    for bucket_bytes, sizes in ((1, [1] * 7), (800, [2, 2, 2, 1]), (1199, [2, 2, 2, 1]), (10**6, [7])):
        source = WeightSource(model, bucket_bytes)
        buckets = [source.bucket(i) for i in range(source.num_buckets)]
        assert [len(bucket) for bucket in buckets] == sizes
        assert [name for bucket in buckets for name in bucket] == [name for name, _ in model.named_parameters()]


def test_tied_parameters_are_sent_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert list(WeightSource(model).bucket(0)) == ["0.weight"]


def test_a_bucket_is_a_copy():
    model = nn.Linear(3, 3)
    bucket = WeightSource(model).bucket(0)
    before = bucket["weight"].clone()
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(bucket["weight"], before)


def test_the_checksum_is_of_what_was_sent_even_where_the_engine_is_narrower():
    policy, engine = nn.Linear(8, 8), nn.Linear(8, 8).bfloat16()
    source, target = WeightSource(policy), WeightTarget(engine)
    target.load_bucket(source.bucket(0))
    assert target.finish() == source.checksum()
    assert torch.equal(engine.weight, policy.weight.bfloat16())


def test_a_parameter_that_did_not_arrive_stops_the_run():
    policy, engine = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)
    target = WeightTarget(engine)
    target.load_bucket(WeightSource(policy).bucket(0))
    with pytest.raises(TrainingError, match=r"1 of 2 parameters did not arrive.*bias"):
        target.finish()


def test_a_parameter_the_engine_does_not_have_stops_the_run():
    target = WeightTarget(nn.Linear(3, 3, bias=False))
    with pytest.raises(TrainingError, match="bias"):
        target.load_bucket(WeightSource(nn.Linear(3, 3)).bucket(0))


def test_a_parameter_of_another_shape_stops_the_run():
    target = WeightTarget(nn.Linear(3, 4, bias=False))
    with pytest.raises(TrainingError, match="weight"):
        target.load_bucket(WeightSource(nn.Linear(3, 1, bias=False)).bucket(0))


def test_the_checksum_does_not_depend_on_the_parts_it_is_taken_in(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.randn(1000)
    whole = checksum("w", tensor)
    monkeypatch.setattr(weights, "_CHECKSUM_WORDS", 7)
    assert checksum("w", tensor) == whole


def test_a_rank_that_does_not_send_copies_and_sums_nothing(monkeypatch: pytest.MonkeyPatch):
    source = WeightSource(nn.Linear(3, 3))
    monkeypatch.setattr(weights, "checksum", lambda *_: pytest.fail("summed"))
    assert not source.bucket(0, wanted=False)
    assert source.checksum() == 0


@pytest.mark.parametrize("num", [0, 1, 3, 4, 5, 2**20 + 3])
def test_the_checksum_is_its_formula(num: int):
    """In Python's integers, word by word, over several parts and a rest that fills no word."""
    values = torch.randn(num, generator=torch.Generator().manual_seed(1)).bfloat16()
    raw = values.view(torch.uint8).numpy().tobytes()
    words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8)]
    first = 1 + zlib.crc32(b"w")
    assert checksum("w", values) == sum(x * (2 * (first + i) + 1) for i, x in enumerate(words)) % 2**64


def test_a_view_that_starts_between_two_words_has_the_checksum_of_its_copy():
    values = torch.randn(33, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert checksum("w", values[1:]) == checksum("w", values[1:].clone())
