"""Importance weights of rollouts: their tokens were drawn from μ, and the update starts from π_old.

The two differ where the rollout engine computes with other kernels or in another precision than the trainer, where its
sampling cuts tokens off (top_p, top_k, min_p), and where its weights are those of an iteration before
(`ppo.off_policy_iterations`). Clipping compares π with π_old and knows nothing of μ; the weights here do (decoupled PPO: Hilton
et al. 2022). They are constants of the policy's loss: no gradient flows through them, and its divisor stays the number of
response tokens of the optimizer step, masked sequences included, so that no weight depends on how a batch is split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_dist.core.kl import kl_k3
from rlhf_dist.core.masking import masked_mean


@dataclass(frozen=True)
class Correction:
    """How a difference of μ and π_old is corrected; by default not at all."""

    cap: float | None = None
    """C, the largest weight of a token; None: tokens have no weights of their own."""
    sequence_range: float | None = None
    """r > 1: sequences whose mean ratio is outside [1/r, r] are masked; None masks none."""


UNCORRECTED = Correction()


def importance_weights(
    logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor, correction: Correction
) -> Tensor | None:
    """[B, R] fp32: min(π_old / μ, C) of each response token (truncated importance sampling: Ionides 2008; for rollout engines:
    Yao et al. 2025), 0 in masked sequences and on padding; None where nothing is corrected.

    A sequence is masked where the geometric mean of its tokens' ratios, exp(mean_t log(π_old / μ)), is outside [1/r, r] (the
    mean as in GSPO, Zheng et al. 2025, eq. 7; the mask as verl's of rollouts).

    Args:
        logprobs: [B, R] log π_old.
        rollout_logprobs: [B, R] log μ.
        response_mask: [B, R] bool.
    """
    if correction == UNCORRECTED:
        return None
    log_ratio = torch.where(response_mask, logprobs.double() - rollout_logprobs.double(), 0.0)
    weights = torch.ones_like(log_ratio)
    if correction.cap is not None:
        weights = log_ratio.exp().clamp(max=correction.cap)
    if correction.sequence_range is not None:
        mean = log_ratio.sum(1) / response_mask.sum(1).clamp(min=1)
        kept = (mean.exp() <= correction.sequence_range) & (mean.exp() >= 1 / correction.sequence_range)
        weights = torch.where(kept[:, None], weights, 0.0)
    return torch.where(response_mask, weights, 0.0).to(logprobs.dtype)


def importance_metrics(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    response_mask: Tensor,
    weights: Tensor | None,
    correction: Correction,
) -> dict[str, float]:
    """How far μ is from π_old, and what the weights do about it. Arguments as in `importance_weights`, and its result.

    `kl/rollout_per_token` estimates KL(μ ‖ π_old) by k3 on the tokens that μ gave. `rollout/importance_ess` is the effective
    sample size of the response tokens as a fraction, (Σ w)² / (N Σ w²) (Kong 1992): 1 where all weights are equal, 1/N where
    one token has all of it.
    """
    mu, old = (torch.where(response_mask, x, 0.0).double() for x in (rollout_logprobs, logprobs))
    metrics = {
        "kl/rollout_per_token": float(masked_mean(kl_k3(mu, old), response_mask)),
        "rollout/logprob_mismatch": float((rollout_logprobs - logprobs).abs()[response_mask].max()),
    }
    if weights is None:
        return metrics
    used = weights[response_mask].double()
    # 0 where every sequence is masked.
    metrics["rollout/importance_ess"] = float(used.sum().square() / (len(used) * used.square().sum()).clamp(min=1e-30))
    if correction.cap is not None:
        above = (old - mu)[response_mask].exp() > correction.cap
        metrics["rollout/importance_truncated_fraction"] = float(above.double().mean())
    if correction.sequence_range is not None:
        metrics["rollout/importance_masked_fraction"] = float((weights == 0).all(1).double().mean())
    return metrics
