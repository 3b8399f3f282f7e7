"""Configuration of the rollout engines."""

from __future__ import annotations

from typing import Literal

from rlhf_dist.config.base import Positive, PositiveInt
from rlhf_dist.config.hosting import (
    Placement,
    Precision,
)


class RolloutConfig(Placement):
    """Generation of responses."""

    engine: Literal["hf"] = "hf"
    """Generation engine: `hf` generates with transformers."""
    precision: Precision | None = None
    """Precision of the engine's weights; null takes the policy's."""
    max_response_tokens: PositiveInt = 128
    """Longest response in tokens; one that reaches it without EOS is truncated."""
    temperature: Positive = 1.0
    """Softmax temperature. The same temperature enters every log-prob of PPO (behavior, old, new, reference)."""
    batch_size: PositiveInt = 64
    """Sequences generated at the same time by one rank."""
