"""From a reward model's scores to per-token rewards.

Order of operations, whichever of them are on:

    score ─► 1. normalize ─► 2. clip ─► 3. − missing-EOS penalty ─► 4. − overlong penalty ─► 5. on the last token
    KL    ─► 6. × −β, on every token                                                     ─► r_t = 5 + 6

Penalties come after normalizing and clipping, so that they always count in full; the KL penalty is never scaled by them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RunningMoments:
    """Count, mean and sum of squared deviations of all scores so far (Chan et al. 1983, parallel update), in float64."""

    count: int = 0
    mean: float = 0.0
    sum_squares: float = 0.0

    def updated(self, scores: Tensor) -> RunningMoments:
        """With the scores [B] of one more iteration."""
        new = scores.double()
        n, total = len(new), self.count + len(new)
        mean, squares = float(new.mean()), float((new - new.mean()).square().sum())
        delta = mean - self.mean
        return RunningMoments(
            count=total,
            mean=self.mean + delta * n / total,
            sum_squares=self.sum_squares + squares + delta * delta * self.count * n / total,
        )

    @property
    def std(self) -> float:
        """Population standard deviation; 0 when nothing was seen."""
        return (self.sum_squares / self.count) ** 0.5 if self.count else 0.0


def normalize_scores(scores: Tensor, moments: RunningMoments, *, subtract_mean: bool) -> Tensor:
    """(s − mean) / std, or s / std; without the division while all scores so far are the same.

    Dividing alone keeps the sign and the zero of the reward model; subtracting too removes what is common to all responses.

    Args:
        scores: [B] fp32.
        moments: of the scores so far, this iteration's included: the first iteration has a scale, too.
        subtract_mean: whether to subtract.
    """
    wide = scores.double() - (moments.mean if subtract_mean else 0.0)
    varies = moments.std > 1e-6 * abs(moments.mean)
    return (wide / moments.std if varies else wide).to(scores.dtype)


def overlong_penalty(
    response_lengths: Tensor, *, max_response_tokens: int, buffer_tokens: int, penalty: float
) -> Tensor:
    """Grows linearly over the last `buffer_tokens` before the length limit:

        penalty · clip((L_y − (L_max − L_buffer)) / L_buffer, 0, 1)

    Source: DAPO (Yu et al. 2025), eq. 13 ("soft overlong punishment"), with the sign turned: it is subtracted.

    Args:
        response_lengths: [B] int64.
        buffer_tokens: L_buffer, 1..L_max.
        penalty: ≥ 0, what a response of L_max tokens loses.

    Returns:
        [B] fp32, ≥ 0.
    """
    over = response_lengths - (max_response_tokens - buffer_tokens)
    return penalty * (over / buffer_tokens).clamp(0, 1).float()


def shape_scores(
    scores: Tensor,
    truncated: Tensor,
    *,
    score_clip: float | None = None,
    missing_eos_penalty: float = 0.0,
    overlong: Tensor | None = None,
) -> Tensor:
    """Steps 2 to 4 of the order of operations: clip, then the two penalties.

    Args:
        scores: [B] fp32, normalized where that is on.
        truncated: [B] bool, True where the response was cut off before its EOS.
        score_clip: clip to ±this; None does not clip.
        missing_eos_penalty: subtracted where `truncated`.
        overlong: [B] fp32, subtracted: `overlong_penalty`.
    """
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    scores = scores - missing_eos_penalty * truncated.to(scores.dtype)
    return scores if overlong is None else scores - overlong


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
