"""The KL divergence from the reference: estimators of it, and the controller of its coefficient β."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1 = log π − log π_ref of the taken token: unbiased for KL(π ‖ π_ref), can be negative.

    Source: Schulman, "Approximating KL divergence" (2020).

    Args:
        logprobs, ref_logprobs: one shape, usually [B, R] fp32.
    """
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2 = ½ (log π − log π_ref)²: biased, never negative. Source as `kl_k1`.

    As a loss, on policy, its gradient is exactly that of KL(π(·|s) ‖ π_ref(·|s)) at the states s that were visited. How a token
    moves the KL of the tokens after it, which a KL in the rewards counts, is not in it.
    """
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = exp(−k1) − 1 + k1: unbiased, never negative, lower variance than k1 where π is close to π_ref. Source as `kl_k1`.

    As a *loss* its gradient is (1 − π_ref/π)·∇log π, which is not that of KL(π ‖ π_ref) but close to it near π = π_ref.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
"""By the name that a configuration gives."""
