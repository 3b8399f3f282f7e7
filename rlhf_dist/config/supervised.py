"""Configuration of `rlhf-dist sft` and `rlhf-dist reward`."""

from __future__ import annotations

from rlhf_dist.config.base import Count, Positive, PositiveInt, Schema


class SupervisedSettings(Schema):
    """Length and rhythm of a supervised run. A step is one optimiser step over `batch_size` records."""

    batch_size: PositiveInt = 32
    """Records (sequences; or prompts with a pair or ranking of responses) in one optimiser step, over all ranks."""
    num_epochs: Positive = 1.0
    """Passes over the training set, when `num_steps` is null."""
    num_steps: PositiveInt | None = None
    """Optimiser steps of the run; overrides `num_epochs`."""
    eval_every_steps: Count = 0
    """Evaluate on the held-out set every so many steps; 0 only before the first and after the last."""
    group_by_length: bool = False
    """Draw the records of a step from those of like length, which leaves less padding; every record is still met once an
    epoch, and which ones meet is drawn anew each epoch. Steps then differ more in length and in content."""
