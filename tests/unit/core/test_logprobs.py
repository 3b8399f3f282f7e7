"""Log-probs and entropies of taken tokens."""

from __future__ import annotations

import pytest
import torch

from rlhf_dist.core.logprobs import taken_logprobs

N, V = 11, 37


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(0)) * 4


@pytest.fixture
def taken() -> torch.Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))


def in_float64(logits: torch.Tensor, taken: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    p = torch.softmax(logits.double() / temperature, -1)
    return p[torch.arange(len(taken)), taken].log(), torch.distributions.Categorical(probs=p).entropy()


@pytest.mark.parametrize("chunk", [1, 3, 11, 512])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_equals_softmax_in_float64(logits, taken, chunk: int, temperature: float):
    expected = in_float64(logits, taken, temperature)
    for actual, wanted in zip(taken_logprobs(logits, taken, temperature, chunk), expected, strict=True):
        assert actual.dtype == torch.float32
        assert torch.allclose(actual.double(), wanted, atol=3e-6)


def test_bf16_logits_are_widened_before_the_softmax(logits, taken):
    narrow = logits.bfloat16()
    actual, _ = taken_logprobs(narrow, taken)
    assert actual.dtype == torch.float32
    assert torch.allclose(actual.double(), in_float64(narrow, taken, 1.0)[0], atol=3e-6)


@pytest.mark.parametrize("chunk", [2, 512])
def test_gradients_do_not_depend_on_the_chunks(logits, taken, chunk: int):
    ours, plain = (logits.clone().requires_grad_() for _ in range(2))
    weights = torch.linspace(-1, 2, N)
    logprobs, entropies = taken_logprobs(ours, taken, 0.8, chunk)
    (logprobs * weights).sum().add(0.3 * entropies.sum()).backward()
    log_p = torch.log_softmax(plain / 0.8, -1)
    entropy = -(log_p.exp() * log_p).sum()
    ((log_p[torch.arange(N), taken] * weights).sum() + 0.3 * entropy).backward()
    assert torch.allclose(ours.grad, plain.grad, atol=1e-6)


def test_the_backward_pass_keeps_no_softmax_alive(logits, taken):
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        taken_logprobs(logits.clone().requires_grad_(), taken, chunk_positions=2)
    assert max(saved, default=0) <= 2 * V  # views of the logits, a chunk each; never [N, V]


def test_impossible_tokens_do_not_make_the_entropy_nan(logits, taken):
    logits[:, 5:] = -torch.inf
    logprobs, entropies = taken_logprobs(logits, taken % 5)
    expected, entropy = in_float64(logits[:, :5], taken % 5, 1.0)
    assert torch.allclose(logprobs.double(), expected, atol=3e-6)
    assert torch.allclose(entropies.double(), entropy, atol=3e-6)


def test_no_position_gives_no_value():
    logprobs, entropies = taken_logprobs(torch.zeros(0, V), torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropies.shape == (0,)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_rejected(logits, taken, temperature: float):
    with pytest.raises(ValueError, match=f"temperature is {temperature}"):
        taken_logprobs(logits, taken, temperature)
