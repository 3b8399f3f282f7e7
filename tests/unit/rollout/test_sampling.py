"""Inverse-CDF sampling."""

from __future__ import annotations

import pytest
import torch

from rlhf_dist.core.random import uniforms
from rlhf_dist.curation.config.generator import Sampling
from rlhf_dist.rollout.sampling import log_distribution, sample_tokens


def drawn(temperature: float = 1.0, **settings) -> Sampling:
    return Sampling(temperature=temperature, **settings)


LARGEST = 1 - 2**-53
"""The largest float64 below 1, and the largest number that numpy draws."""


def test_frequencies_are_the_probabilities():
    num = 8000
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, -torch.inf, 0.5])
    for temperature in (1.0, 0.5):
        u = uniforms(0, "test", 0, [1], num)[0]
        tokens, logprobs = sample_tokens(logits.expand(num, -1), u, drawn(temperature))
        p = torch.softmax(logits.double() / temperature, -1)
        expected, counts = p[p > 0] * num, torch.bincount(tokens, minlength=6)[p > 0]
        assert ((counts - expected).square() / expected).sum() < 18.5  # χ² with 4 degrees of freedom: P = 0.001
        assert (tokens != 4).all()
        assert torch.allclose(logprobs, p.log()[tokens].float(), atol=1e-6)


def test_the_uniform_number_walks_through_the_tokens_in_order():
    logits = torch.tensor([0.25, 0.5, 0.25]).log().expand(6, -1)
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, LARGEST], dtype=torch.float64)
    assert sample_tokens(logits, u, drawn())[0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("u", [0.0, 1e-300, 0.5, 1 - 2**-52, LARGEST])
@pytest.mark.parametrize("seed", range(8))
def test_a_token_of_probability_zero_is_never_drawn(u: float, seed: int):
    logits = torch.randn(64, 257, generator=torch.Generator().manual_seed(seed))
    logits[:, :3] = logits[:, 100:120] = logits[:, -5:] = -torch.inf
    tokens, logprobs = sample_tokens(logits, torch.full((64,), u, dtype=torch.float64), drawn())
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(logits.gather(1, tokens[:, None])).all()


def test_a_certain_token_is_drawn_whatever_the_number():
    logits = torch.full((3, 5), -torch.inf)
    logits[:, 2] = 3.0
    u = torch.tensor([0.0, 0.5, LARGEST], dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, u, drawn(0.7))
    assert tokens.tolist() == [2, 2, 2]
    assert logprobs.tolist() == [0, 0, 0]


def test_bf16_logits():
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    u = uniforms(0, "test", 0, [0], 16)[0]
    tokens, logprobs = sample_tokens(logits, u, drawn())
    same, _ = sample_tokens(logits.float(), u, drawn())
    assert torch.equal(tokens, same)
    assert logprobs.dtype == torch.float32


def test_temperature_0_takes_the_likeliest_token():
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = sample_tokens(logits, torch.full((16,), 0.9), drawn(0.0))
    assert torch.equal(tokens, logits.argmax(-1))
    assert logprobs.tolist() == [0.0] * 16


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.05, [1]), (0.49, [1]), (0.51, [1, 3]), (0.74, [1, 3]), (0.76, [0, 1, 3])]
)
def test_top_p_draws_from_the_smallest_set_that_reaches_it(top_p: float, expected: list[int]):
    p = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625], dtype=torch.float64)
    num = 4000
    tokens, logprobs = sample_tokens(p.log().expand(num, -1), uniforms(0, "test", 0, [1], num)[0], drawn(top_p=top_p))
    assert sorted(tokens.unique().tolist()) == expected
    kept = p[expected] / p[expected].sum()
    for token, probability in zip(expected, kept.tolist(), strict=True):
        share = (tokens == token).double().mean().item()
        assert abs(share - probability) < 4 * (probability * (1 - probability) / num) ** 0.5 + 1e-9
        assert torch.allclose(logprobs[tokens == token].exp(), torch.tensor(probability))


@pytest.mark.parametrize(
    ("top_k", "expected"), [(1, [1]), (2, [1, 3]), (3, [0, 1, 3]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_top_k_draws_from_as_many_tokens(top_k: int, expected: list[int]):
    p = torch.tensor([[0.125, 0.5, 0.0625, 0.25, 0.0625]])
    kept = log_distribution(p.log(), drawn(top_k=top_k)).exp()[0]
    assert kept.nonzero().flatten().tolist() == expected
    assert torch.allclose(kept[expected], p[0, expected] / p[0, expected].sum())


def test_of_equal_tokens_top_k_keeps_the_first():
    kept = log_distribution(torch.zeros(1, 6), drawn(top_k=2)).exp()[0]
    assert kept.tolist() == [0.5, 0.5, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("min_p", "expected"), [(0.12, [0, 1, 2, 3, 4]), (0.13, [0, 1, 3]), (0.26, [1, 3]), (1.0, [1])]
)
def test_min_p_is_measured_against_the_likeliest_token(min_p: float, expected: list[int]):
    p = torch.tensor([[0.125, 0.5, 0.0625, 0.25, 0.0625]])
    kept = log_distribution(p.log(), drawn(min_p=min_p)).exp()[0]
    assert kept.nonzero().flatten().tolist() == expected
    assert torch.allclose(kept[expected], p[0, expected] / p[0, expected].sum())


def test_top_p_is_of_what_min_p_and_top_k_leave():
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    # top_k leaves 4/7 and 3/7, of which the first reaches a half; of all four it would not.
    assert log_distribution(p.log(), drawn(top_k=2, top_p=0.5)).exp()[0].nonzero().flatten().tolist() == [0]
    assert log_distribution(p.log(), drawn(top_p=0.5)).exp()[0].nonzero().flatten().tolist() == [0, 1]


def test_without_limits_the_distribution_is_the_softmax_in_every_bit():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(log_distribution(logits, drawn(0.7)), torch.log_softmax(logits / 0.7, -1))
