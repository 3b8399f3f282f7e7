"""Sums and statistics over the positions a mask keeps (True = keep)."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` where `mask`; a NaN or inf outside the mask cannot reach the result."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask`; 0 when the mask keeps nothing."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance of `x` where `mask` (divides by the count, not count − 1)."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def masked_whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """(x − mean) / √(var + eps) over the kept positions; 0 elsewhere.

    Computed in float64 over the whole batch on the driver, so the number of ranks cannot change it.
    """
    wide = x.double()
    white = (wide - masked_mean(wide, mask)) / (masked_var(wide, mask) + eps).sqrt()
    return torch.where(mask, white, 0.0).to(x.dtype)
