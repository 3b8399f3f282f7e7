"""What the self-checks let pass, and what they stop."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_dist.ppo.sanity_checks import disagreement, off_policy


@pytest.mark.parametrize(
    ("deviation", "clipped", "num_tokens", "precision"),
    [
        (2e-5, 0.0, 1, "fp32"),
        (0.011, 0.006, 170, "bf16"),  # SmolLM2-135M, packed against padded
        (0.06, 0.03, 40, "bf16"),  # one token of 40 far off
        (0.5, 0.5, 2, "bf16"),  # one of two
    ],
)
def test_rounding_passes(deviation, clipped, num_tokens, precision):
    assert off_policy(deviation, clipped, num_tokens, precision) == ""


@pytest.mark.parametrize(
    ("deviation", "clipped", "num_tokens", "precision"),
    [
        (0.01, 0.0, 10, "fp32"),
        (1e-6, 1e-4, 10_000, "fp32"),
        (0.18, 0.39, 256, "bf16"),  # a temperature of 0.8 that is missing on one side
        (0.8, 0.7, 20, "bf16"),  # shifted by one token
        (math.nan, 0.0, 10, "fp32"),
        (math.nan, 0.0, 10, "bf16"),
    ],
)
def test_an_update_that_starts_off_policy_is_named_with_its_numbers(deviation, clipped, num_tokens, precision):
    message = off_policy(deviation, clipped, num_tokens, precision)
    assert f"over its {num_tokens} tokens is {deviation:.3g}" in message
    assert "ppo.self_checks" in message


def test_two_copies_of_a_model_agree():
    g = torch.Generator().manual_seed(0)
    ref, mask = -torch.rand(20, 3, generator=g), torch.tensor([[True, True, False]] * 20)
    padded = torch.where(mask, ref + 1e-5, math.nan)
    assert disagreement(padded, ref, mask, "fp32") == ""
    assert disagreement(torch.where(mask, ref + 0.01, math.nan), ref, mask, "fp32").startswith("0.01 nats a token")
    assert disagreement(ref + 0.01, ref, mask, "bf16") == ""
    outlier = ref.clone()
    outlier[3, 1] -= 50
    assert disagreement(outlier, ref, mask, "bf16") == ""
    assert disagreement(ref + 0.5, ref, mask, "bf16").startswith("0.5 nats")
    assert disagreement(torch.full_like(ref, math.nan), ref, mask, "bf16").startswith("nan nats")
