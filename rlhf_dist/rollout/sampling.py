"""Sampling a token from logits with a given uniform number."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Distribution(Protocol):
    """What makes a distribution over tokens out of logits: `rollout.config.SamplingConfig` has it."""

    @property
    def temperature(self) -> float:
        """0 takes the likeliest token."""
        ...

    @property
    def top_p(self) -> float:
        """In (0, 1]."""
        ...

    @property
    def top_k(self) -> int:
        """0: off."""
        ...

    @property
    def min_p(self) -> float:
        """In [0, 1]."""
        ...


def sample_tokens(logits: Tensor, uniforms: Tensor, distribution: Distribution) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds the uniform number.

    One number a token makes sampling a pure function of (logits, u); float64 sums keep the point where the outcome
    changes stable against the last bits of the logits.

    Args:
        logits: [B, V].
        uniforms: [B] float64 in [0, 1).
        distribution: see `log_distribution`; at temperature 0 the likeliest token is taken.

    Returns:
        ([B] int64 tokens, [B] fp32 log-probs of them under the distribution they were drawn from).
    """
    if distribution.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros_like(tokens, dtype=torch.float32)
    log_p = log_distribution(logits, distribution)
    cumulative = log_p.double().exp().cumsum(-1)
    # Scaled by the total, which differs from 1 in the last bits, so that a u close to 1 still meets a token.
    target = uniforms[:, None].to(cumulative) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens.squeeze(1), log_p.gather(1, tokens).squeeze(1)


def log_distribution(logits: Tensor, distribution: Distribution) -> Tensor:
    """[B, V] logits → [B, V] fp32: log of softmax(logits / temperature), normalized over what min_p, then top_k, then top_p
    leave (the order of vLLM's sampler); -inf on the others.

    min_p keeps tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024), top_p the likeliest, as many as
    make up this probability (the nucleus; Holtzman et al. 2020).
    """
    log_p = torch.log_softmax(logits.float() / distribution.temperature, dim=-1)
    if distribution.min_p > 0:
        least = log_p.max(-1, keepdim=True).values.double() + torch.tensor(distribution.min_p).double().log().item()
        log_p = _kept(log_p, log_p >= least)
    if 0 < distribution.top_k < log_p.shape[-1]:
        # Equal ones: the first. (A threshold would keep all of them.)
        order = log_p.argsort(dim=-1, descending=True, stable=True)[:, : distribution.top_k]
        log_p = _kept(log_p, torch.zeros_like(log_p, dtype=torch.bool).scatter(1, order, True))
    if distribution.top_p < 1:
        log_p = _kept(log_p, _nucleus(log_p, distribution.top_p))
    return log_p


def _kept(log_p: Tensor, keep: Tensor) -> Tensor:
    return torch.log_softmax(log_p.masked_fill(~keep, -torch.inf), dim=-1)


def _nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """[B, V] bool: the smallest set of likeliest tokens whose probability reaches `top_p`."""
    p, order = log_p.double().exp().sort(dim=-1, descending=True, stable=True)
    needed = p.cumsum(-1) - p < top_p  # what stands before it does not suffice; so the likeliest token is always in
    return torch.zeros_like(needed).scatter(1, order, needed)
