"""Log-probabilities and entropies of taken tokens, without a [B, T, V] tensor in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_POSITIONS = 512
"""Positions whose logits are held in fp32 at the same time."""


def _chunk(logits: Tensor, taken: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    logprobs = log_p.gather(-1, taken[:, None]).squeeze(-1)
    # p·log p → 0 as p → 0; a logit of −inf would otherwise give 0 · −inf = NaN.
    entropy = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)
    return logprobs, entropy


def taken_logprobs(
    logits: Tensor, taken: Tensor, temperature: float = 1.0, chunk_positions: int = CHUNK_POSITIONS
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[taken], and the entropy of the same distribution.

    Args:
        logits: [N, V] in the model's dtype; row i is the distribution that token i was taken from.
        taken: [N] int64.
        temperature: > 0; must be the one the tokens were sampled at.
        chunk_positions: rows held in fp32 at once. In training each chunk is recomputed in the backward pass.

    Returns:
        ([N] fp32 log-probs, [N] fp32 entropies in nats).
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    chunks = []
    for rows, tokens in zip(logits.split(chunk_positions), taken.split(chunk_positions), strict=True):
        if torch.is_grad_enabled() and logits.requires_grad:
            chunks.append(checkpoint(_chunk, rows, tokens, temperature, use_reentrant=False))
        else:
            chunks.append(_chunk(rows, tokens, temperature))
    if not chunks:
        empty = logits.new_zeros(0, dtype=torch.float32)
        return empty, empty
    logprobs, entropies = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
