"""Log-probabilities and entropies of taken tokens, without a [B, T, V] tensor in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_POSITIONS = 512
"""Positions whose logits are held in fp32 at the same time."""


def _chunk(logits: Tensor, taken: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    logprobs = log_p.gather(-1, taken[:, None]).squeeze(-1)
    if not with_entropy:
        return logprobs, None
    # p·log p → 0 as p → 0; a logit of −inf would otherwise give 0 · −inf = NaN.
    return logprobs, -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)


def taken_logprobs(
    logits: Tensor,
    taken: Tensor,
    temperature: float = 1.0,
    chunk_positions: int = CHUNK_POSITIONS,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature)[taken], and the entropy of the same distribution.

    Args:
        logits: [N, V] in the model's dtype; row i is the distribution that token i was taken from.
        taken: [N] int64.
        temperature: > 0; must be the one the tokens were sampled at.
        chunk_positions: rows held in fp32 at once. In training, chunks beyond the first are why each is recomputed in the
            backward pass; a single one is within the bound and is kept.
        with_entropy: whether to compute the entropy, which costs as much as the log-probs.

    Returns:
        ([N] fp32 log-probs, [N] fp32 entropies in nats or None).
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    recompute = torch.is_grad_enabled() and logits.requires_grad and len(taken) > chunk_positions
    chunks = []
    for rows, tokens in zip(logits.split(chunk_positions), taken.split(chunk_positions), strict=True):
        if recompute:
            chunks.append(checkpoint(_chunk, rows, tokens, temperature, with_entropy, use_reentrant=False))
        else:
            chunks.append(_chunk(rows, tokens, temperature, with_entropy))
    logprobs = torch.cat([chunk[0] for chunk in chunks])
    return logprobs, torch.cat([chunk[1] for chunk in chunks]) if with_entropy else None
