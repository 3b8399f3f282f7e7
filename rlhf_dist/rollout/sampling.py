"""Sampling a token from logits with a given uniform number."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds the uniform number.

    One number a token makes sampling a pure function of (logits, u); float64 sums keep the point where the outcome
    changes stable against the last bits of the logits.

    Args:
        logits: [B, V].
        uniforms: [B] float64 in [0, 1).
        temperature: 0 takes the likeliest token.
        top_p: in (0, 1]: only the likeliest tokens, as many as make up this probability (the nucleus; Holtzman et al. 2020).

    Returns:
        ([B] int64 tokens, [B] fp32 log-probs of them under the distribution they were drawn from: softmax(logits /
        temperature), below top_p 1 within the nucleus).
    """
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros_like(tokens, dtype=torch.float32)
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        log_p = torch.log_softmax(log_p.masked_fill(~_nucleus(log_p, top_p), -torch.inf), dim=-1)
    cumulative = log_p.double().exp().cumsum(-1)
    # Scaled by the total, which differs from 1 in the last bits, so that a u close to 1 still meets a token.
    target = uniforms[:, None].to(cumulative) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens.squeeze(1), log_p.gather(1, tokens).squeeze(1)


def _nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """[B, V] bool: the smallest set of likeliest tokens whose probability reaches `top_p`."""
    p, order = log_p.double().exp().sort(dim=-1, descending=True, stable=True)
    needed = p.cumsum(-1) - p < top_p  # what stands before it does not suffice; so the likeliest token is always in
    return torch.zeros_like(needed).scatter(1, order, needed)
