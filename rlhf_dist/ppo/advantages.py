"""Generalized advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    gae_lambda: float,
    end_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each response token.

        δ_t = r_t + γ·V_{t+1} − V_t           V after the last response token is V_end
        A_t = δ_t + γ·λ·A_{t+1}
        R_t = A_t + V_t

    Source: Schulman et al. 2016, eq. 11 and 16; V_end ≠ 0 where an episode was cut off rather than ended: "partial-episode
    bootstrapping" of Pardo et al. 2018, "Time limits in reinforcement learning". Padding never enters: the recursion restarts
    at each row's own end.

    Args:
        rewards, values: [B, R] fp32.
        response_mask: [B, R] bool, a prefix of each row.
        gamma: γ.
        gae_lambda: λ.
        end_values: [B] fp32, V_end: the value of the state after the last response token where the response was truncated,
            0 where it ended. None: 0 everywhere.

    Returns:
        (advantages, returns), each [B, R] fp32; 0 outside the mask.
    """
    keep = response_mask.to(rewards.dtype)
    rewards, values = torch.where(response_mask, rewards, 0.0), torch.where(response_mask, values, 0.0)
    is_last = response_mask & ~torch.nn.functional.pad(response_mask[:, 1:], (0, 1))
    ends = torch.zeros_like(rewards[:, 0]) if end_values is None else end_values
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * torch.where(is_last[:, t], ends, next_value) - values[:, t]
        next_advantage = (delta + gamma * gae_lambda * next_advantage) * keep[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, torch.where(response_mask, advantages + values, 0.0)
