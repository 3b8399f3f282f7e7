"""Sampling a token from logits with a given uniform number."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds the uniform number.

    One number a token makes sampling a pure function of (logits, u); float64 sums keep the point where the outcome
    changes stable against the last bits of the logits.

    Args:
        logits: [B, V].
        uniforms: [B] float64 in [0, 1).
        temperature: > 0.

    Returns:
        ([B] int64 tokens, [B] fp32 log-probs of them under softmax(logits / temperature)).
    """
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    cumulative = log_p.double().exp().cumsum(-1)
    # Scaled by the total, which differs from 1 in the last bits, so that a u close to 1 still meets a token.
    target = uniforms[:, None].to(cumulative) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens.squeeze(1), log_p.gather(1, tokens).squeeze(1)
