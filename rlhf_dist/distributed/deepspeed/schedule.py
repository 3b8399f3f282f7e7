"""Learning-rate schedules as pure functions of the optimizer step."""

from __future__ import annotations

import math

from rlhf_dist.config.hosting import OptimizerConfig


def learning_rate_factor(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate at optimizer step `step` (0-based) of `num_steps`.

    Warm-up rises linearly and never starts at 0: a step at rate 0 would be a step wasted. `linear` and `cosine` reach 0
    one step after the last.
    """
    num_warmup = round(config.warmup_fraction * num_steps)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup))
    return 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
