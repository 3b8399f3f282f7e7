"""The adaptive KL controller of the coefficient β."""

from __future__ import annotations

MAX_PROPORTIONAL_ERROR = 0.2


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: int, num_responses: int) -> float:
    """β of the next iteration, moved so that the KL comes to a target.

        e = clip(KL / KL_target − 1, ±0.2)
        β ← β · (1 + e · n / horizon)

    Source: Ziegler et al. 2019, section 2.2, with the horizon of their code (K_β = n / horizon; 0.1 in the paper).

    Args:
        kl_coef: β of the iteration.
        kl: its mean KL, nats a response.
        target: KL_target, nats a response, > 0.
        horizon: responses over which β can change by a factor of about e^±0.2.
        num_responses: n ≤ horizon, responses of the iteration. (With more, one step could turn β negative.)
    """
    error = min(max(kl / target - 1, -MAX_PROPORTIONAL_ERROR), MAX_PROPORTIONAL_ERROR)
    return kl_coef * (1 + error * num_responses / horizon)
