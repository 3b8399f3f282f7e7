"""Losses, as *sums* over the tokens or pairs they are given.

`engine/` alone divides, by the count over the whole optimiser step on all ranks, so that no loss depends on how a
batch is split. Each function also returns the sums that metrics are made of.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_dist.algo.masking import masked_sum
from rlhf_dist.algo.rewards import kl_k3

Sums = dict[str, Tensor]


def nll_loss(logprobs: Tensor) -> tuple[Tensor, Sums]:
    """−Σ log p(target) (SFT, pretraining, PTX).

    Args:
        logprobs: [N] log-probs of the target tokens.
    """
    loss = -logprobs.sum()
    return loss, {"loss": loss.detach()}


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Sums]:
    """−Σ log σ(r_chosen − r_rejected) (InstructGPT eq. 1 with K = 2; Bradley–Terry).

    Args:
        chosen, rejected: [P] scores.
    """
    margin = chosen - rejected
    loss = -logsigmoid(margin).sum()
    return loss, {
        "loss": loss.detach(),
        "accuracy": (margin > 0).sum().detach(),
        "margin": margin.sum().detach(),
    }


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, clip_range: float
) -> tuple[Tensor, Sums]:
    """Clipped surrogate: Σ max(−A·ρ, −A·clip(ρ, 1−ε, 1+ε)), ρ = π/π_old (Schulman et al. 2017, eq. 7).

    Args:
        logprobs, old_logprobs, advantages: [B, R]; only `logprobs` carries a gradient.
        response_mask: [B, R] bool.
        clip_range: ε.
    """
    # Padding is replaced before the exponential: an overflow there would give NaN gradients even when masked after.
    log_ratio = torch.where(response_mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_sum(torch.maximum(unclipped, clipped), response_mask)
    with torch.no_grad():
        sums = {
            "loss": loss.detach(),
            "clip_fraction": masked_sum((clipped > unclipped).to(ratio.dtype), response_mask),
            "approx_kl": masked_sum(kl_k3(old_logprobs, logprobs), response_mask),
            "ratio": masked_sum(ratio, response_mask),
        }
    return loss, sums


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
