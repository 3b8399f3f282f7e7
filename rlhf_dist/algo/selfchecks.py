"""What the numbers of a sound run cannot be. Each check returns what is wrong, or "".

A tolerance is what rounding explains: the log-probs that are compared come from forward passes of different shapes (other
padding, other neighbours in the batch), whose sums are added in another order. Measured on SmolLM2-135M in bf16, one pass
packed, the other padded: a mean of 0.011 and, at temperature 0.3, 0.6% of tokens out of a clip range of 0.2; in fp32 less than
1e-5. What the checks are for is far larger: on a random two-layer model, a temperature of 0.8 that is missing on one side
gives a mean of 0.18 and 39% out of range.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_dist.algo.masking import masked_mean
from rlhf_dist.config import Precision

MAX_RATIO_DEVIATION = {"fp32": 1e-3, "bf16": 0.1}
"""Precision → largest mean |ρ − 1| of an on-policy step that rounding explains: log-probs before and during the update come
from forward passes of different shapes."""
MAX_CLIP_FRACTION = {"fp32": 0.0, "bf16": 0.05}
"""Precision → largest share of tokens that rounding alone may move out of the clip range."""


def off_policy(ratio_deviation: float, clip_fraction: float, precision: Precision) -> str:
    """What is wrong with the first step of an update, whose policy is the one that gave the old log-probs; "" if nothing.

    Args:
        ratio_deviation: mean |ρ − 1| over the step's tokens.
        clip_fraction: share of them that the clipping holds back.
    """
    limit, clips = MAX_RATIO_DEVIATION[precision], MAX_CLIP_FRACTION[precision]
    if ratio_deviation <= limit and clip_fraction <= clips:
        return ""
    return (
        f"the first optimiser step of an update is off policy: mean |ratio - 1| is {ratio_deviation:.3g} (at most {limit:g} in "
        f"{precision}), the clip fraction {clip_fraction:.3g} (at most {clips:g}). Old and new log-probs must come from the "
        "same weights, positions and temperature; a model with dropout or other randomness in its forward pass cannot be "
        "trained by PPO. ppo.self_checks: false switches the check off"
    )


MAX_REFERENCE_DEVIATION = {"fp32": 1e-3, "bf16": 0.1}
"""Precision → largest mean |log π − log π_ref| (nats a token) of two copies of one model that rounding explains."""


def not_the_reference(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, precision: Precision) -> str:
    """What is wrong with a policy that was not trained yet, whose weights are the reference's.

    Args:
        logprobs, ref_logprobs: [B, R] fp32.
        response_mask: [B, R] bool.
        precision: the lower of the two models' precisions.
    """
    limit = MAX_REFERENCE_DEVIATION[precision]
    deviation = float(masked_mean((logprobs - ref_logprobs).abs(), response_mask))
    if deviation <= limit:
        return ""
    return (
        f"before the first update, policy and reference are the same model, but their log-probs differ by {deviation:.3g} nats "
        f"a token on average (at most {limit:g} in {precision}): one of them was loaded or is run wrongly, and a KL penalty "
        "would pull towards that. Compare the two roles' settings (precision, packed, attention); ppo.self_checks: false "
        "switches the check off"
    )
