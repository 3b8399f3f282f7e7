"""What the numbers of a sound run cannot be. Each check returns what is wrong, or "".

A tolerance is what rounding explains: the log-probs that are compared come from forward passes of different shapes (other
padding, other neighbors in the batch, a KV cache), whose sums are added in another order. Differences are cut off at 1 a
token, and in bf16 the tolerance grows as the number of tokens n falls, for there a single token can be far off.

Measured (tests/bench/README.md), mean over tokens of min(|ρ − 1|, 1): in bf16 on SmolLM2-135M 0.002 between two splits of a
batch, 0.02 between packed and padded, 0.05 between decoding with a KV cache and one pass; in fp32 at most 3e-6. A
temperature of 0.8 that is missing on one side gives 0.24 and more, log-probs shifted by a token 0.7 and more.

All of this is of the `hf` engine. vLLM gets the same tolerances; it has not been measured here.
"""

from __future__ import annotations

from math import sqrt

from torch import Tensor

from rlhf_dist.config.hosting import Precision
from rlhf_dist.core.masking import masked_mean


def tolerance(precision: Precision, num_tokens: int) -> float:
    """Largest mean difference a token of two log-probs that should be equal: 0.001 in fp32, 0.08 + 1/√n in bf16, and in fp16,
    which rounds eight times more finely but has not been measured."""
    return 1e-3 if precision == "fp32" else 0.08 + 1 / sqrt(max(1, num_tokens))


def off_policy(ratio_deviation: float, clip_fraction: float, num_tokens: int, precision: Precision) -> str:
    """What is wrong with the first step of an update, whose policy is the one that gave the old log-probs; "" if nothing.

    Args:
        ratio_deviation: mean min(|ρ − 1|, 1) over the step's tokens.
        clip_fraction: share of them that the clipping holds back. 0 in fp32; in bf16 it says more of the clip range than of the
            policy, and is not judged.
        num_tokens: of the step, over all ranks.
    """
    limit = tolerance(precision, num_tokens)
    if ratio_deviation <= limit and (clip_fraction == 0 or precision != "fp32"):
        return ""
    return (
        f"the first optimizer step of an update is off policy: mean |ratio - 1| over its {num_tokens} tokens is "
        f"{ratio_deviation:.3g} (at most {limit:.3g} in {precision}), the clip fraction {clip_fraction:.3g} (0 in fp32). Old "
        "and new log-probs must come from the same weights, positions and temperature; a model with dropout or other "
        "randomness in its forward pass cannot be trained by PPO. ppo.self_checks: false switches the check off"
    )


def disagreement(logprobs: Tensor, others: Tensor, response_mask: Tensor, precision: Precision) -> str:
    """What is wrong with two sets of log-probs of the same tokens under the same weights: by how much they differ.

    Args:
        logprobs, others: [B, R] fp32.
        response_mask: [B, R] bool.
        precision: the lower of the two models' precisions.
    """
    limit = tolerance(precision, int(response_mask.sum()))
    deviation = float(masked_mean((logprobs - others).abs().clamp(max=1), response_mask))
    if deviation <= limit:
        return ""
    return f"{deviation:.3g} nats a token on average (at most {limit:.3g} in {precision})"
