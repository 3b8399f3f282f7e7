"""Losses, as *sums* over the tokens or pairs they are given.

`distributed/deepspeed/` alone divides, by the count over the whole optimizer step on all ranks, so that no loss depends on
how a batch is split. Each function also returns the sums that metrics are made of.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_dist.core.kl import KL_ESTIMATORS, kl_k3
from rlhf_dist.core.losses import Sums
from rlhf_dist.core.masking import masked_sum


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Sums]:
    """Clipped surrogate: Σ max(−A·ρ, −A·clip(ρ, 1−ε, 1+ε_high)), ρ = π/π_old (Schulman et al. 2017, eq. 7).

    With `dual_clip` = c, a token with A < 0 loses at most −c·A, whatever its ratio (Ye et al. 2020, eq. 5). `weights`
    multiply what a token loses in the end.

    Args:
        logprobs, old_logprobs, advantages: [B, R]; only `logprobs` carries a gradient.
        response_mask: [B, R] bool.
        clip_range: ε.
        clip_range_high: ε_high (DAPO's "clip-higher", Yu et al. 2025, eq. 10); None: ε.
        dual_clip: c > 1; None switches it off.
        weights: [B, R] importance weights (`ppo/importance.py`), without a gradient; None: 1.

    Returns:
        (sum over tokens, sums over tokens: `loss`, `clip_fraction`, `dual_clip_fraction`, `approx_kl` (k3 of old against
        new), `ratio`, `ratio_deviation` (min(|ρ − 1|, 1): no single token decides)).
    """
    high = clip_range if clip_range_high is None else clip_range_high
    # Padding is replaced before the exponential: an overflow there would give NaN gradients even when masked after.
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + high)
    losses = torch.maximum(unclipped, clipped)
    bounded = torch.zeros_like(response_mask)
    if dual_clip is not None:
        bounded = (advantages < 0) & (losses > -dual_clip * advantages)
        losses = torch.where(bounded, -dual_clip * advantages, losses)
    if weights is not None:
        losses = losses * torch.where(response_mask, weights, 0.0)
    loss = masked_sum(losses, response_mask)
    with torch.no_grad():
        sums = {
            "loss": loss.detach(),
            "clip_fraction": masked_sum((clipped > unclipped).to(ratio.dtype), response_mask),
            "dual_clip_fraction": masked_sum(bounded.to(ratio.dtype), response_mask),
            "approx_kl": masked_sum(kl_k3(old_logprobs, logprobs), response_mask),
            "ratio": masked_sum(ratio, response_mask),
            "ratio_deviation": masked_sum((ratio - 1).abs().clamp(max=1), response_mask),
        }
    return loss, sums


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, estimator: str) -> tuple[Tensor, Sums]:
    """Σ kl_t, for the KL to the reference as a term of the loss rather than of the reward.

    Args:
        logprobs, ref_logprobs: [B, R]; only `logprobs` carries a gradient.
        response_mask: [B, R] bool.
        estimator: `k2` (on policy, its gradient is that of KL(π ‖ π_ref)) or `k3` (as in GRPO, Shao et al. 2024, eq. 4). Not
            `k1`: the expectation of its gradient, E[∇ log π], is 0.
    """
    if estimator == "k1":
        raise ValueError("the gradient of k1 as a loss is 0 in expectation; use k2 or k3")
    # As in `policy_loss`: replaced before the exponential of k3.
    pair = (torch.where(response_mask, x, 0.0) for x in (logprobs, ref_logprobs))
    loss = masked_sum(KL_ESTIMATORS[estimator](*pair), response_mask)
    return loss, {"loss": loss.detach()}


def entropy_loss(entropies: Tensor, response_mask: Tensor) -> tuple[Tensor, Sums]:
    """−Σ H: minimizing it is the entropy bonus (Williams and Peng 1991; Schulman et al. 2017, eq. 9).

    Args:
        entropies: [B, R] nats, with a gradient.
        response_mask: [B, R] bool.
    """
    loss = -masked_sum(entropies, response_mask)
    return loss, {"entropy": -loss.detach()}


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, clip_range: float | None
) -> tuple[Tensor, Sums]:
    """½ Σ max((V − R)², (clip(V, V_old ± ε) − R)²) (as in OpenAI baselines' ppo2; ε None: no clipping).

    Args:
        values, old_values, returns: [B, R]; only `values` carries a gradient.
        response_mask: [B, R] bool.
        clip_range: ε.
    """
    # As in `policy_loss`: a NaN in padding would reach the gradients even when masked after.
    values, old_values, returns = (torch.where(response_mask, x, 0.0) for x in (values, old_values, returns))
    errors = (values - returns).square()
    clip_fraction = torch.zeros_like(errors)
    if clip_range is not None:
        change = values - old_values
        clipped = (old_values + change.clamp(-clip_range, clip_range) - returns).square()
        # Both conditions: inside the range, old + (new − old) may differ from new in the last bit.
        clip_fraction = ((change.abs() > clip_range) & (clipped > errors)).to(errors.dtype)
        errors = torch.maximum(errors, clipped)
    loss = 0.5 * masked_sum(errors, response_mask)
    return loss, {"loss": loss.detach(), "clip_fraction": masked_sum(clip_fraction, response_mask).detach()}


def explained_variance(values: Tensor, returns: Tensor, response_mask: Tensor) -> float:
    """1 − Var(R − V) / Var(R) over response tokens; 1 is perfect, ≤ 0 is no better than a constant. NaN if Var(R) = 0."""
    v, r = values[response_mask].double(), returns[response_mask].double()
    spread = r.var(unbiased=False)
    return float(1 - (r - v).var(unbiased=False) / spread) if spread > 0 else float("nan")
