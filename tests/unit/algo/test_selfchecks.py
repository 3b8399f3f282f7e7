"""What the self-checks let pass, and what they stop."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_dist.algo.selfchecks import not_the_reference, off_policy


def test_rounding_passes():
    assert off_policy(2e-5, 0.0, "fp32") == ""
    assert off_policy(0.011, 0.006, "bf16") == ""


@pytest.mark.parametrize(
    ("deviation", "clipped", "precision"),
    [(0.01, 0.0, "fp32"), (1e-6, 1e-4, "fp32"), (0.2, 0.0, "bf16"), (0.0, 0.1, "bf16"), (math.nan, 0.0, "fp32")],
)
def test_an_update_that_starts_off_policy_is_named_with_its_numbers(deviation, clipped, precision):
    message = off_policy(deviation, clipped, precision)
    assert f"{deviation:.3g}" in message
    assert "ppo.self_checks" in message


def test_a_policy_that_is_its_reference():
    g = torch.Generator().manual_seed(0)
    ref, mask = -torch.rand(2, 3, generator=g), torch.tensor([[True, True, False], [True, False, False]])
    padded = torch.where(mask, ref + 1e-5, math.nan)
    assert not_the_reference(padded, ref, mask, "fp32") == ""
    assert "0.01 nats" in not_the_reference(torch.where(mask, ref + 0.01, math.nan), ref, mask, "fp32")
    assert not_the_reference(ref + 0.01, ref, mask, "bf16") == ""
    assert "nan nats" in not_the_reference(torch.full((2, 3), math.nan), ref, mask, "bf16")
