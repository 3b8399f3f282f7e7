"""From sequence scores to per-token rewards."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1 estimator of KL(π ‖ π_ref) per token: log π − log π_ref of the taken token. Unbiased; can be negative.

    Source: Schulman, "Approximating KL divergence" (2020).
    """
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 estimator: exp(−k1) − 1 + k1. Unbiased, never negative, lower variance than k1. Source as `kl_k1`."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def shape_scores(
    scores: Tensor, truncated: Tensor, *, score_clip: float | None = None, missing_eos_penalty: float = 0.0
) -> Tensor:
    """What the reward model's score becomes before it enters the rewards, in this order: clip, then penalty.

    Args:
        scores: [B] fp32.
        truncated: [B] bool, True where the response was cut off before its EOS.
        score_clip: clip to ±this; None does not clip.
        missing_eos_penalty: subtracted where `truncated`; after the clip, so that it always counts in full.
    """
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    return scores - missing_eos_penalty * truncated.to(scores.dtype)


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = −β·kl_t, plus the score on the last response token (InstructGPT eq. 2, per token as in Ziegler et al. 2019).

    Args:
        scores: [B] fp32.
        kl: [B, R] fp32, per-token KL estimate.
        response_mask: [B, R] bool, a prefix of each row, at least one True.
        kl_coef: β.

    Returns:
        [B, R] fp32; 0 outside the mask.
    """
    rewards = torch.where(response_mask, -kl_coef * kl, 0.0)
    last = response_mask.sum(1) - 1
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last] += scores
    return rewards
