"""Configuration of `rlhf-dist sft` and `rlhf-dist reward`."""

from __future__ import annotations

from rlhf_dist.config.base import Count, Positive, PositiveInt, Result, RunLength, Schema


class SupervisedSettings(Schema):
    """Length and rhythm of a supervised run. A step is one optimizer step over `batch_size` records."""

    batch_size: Result[PositiveInt] = 32
    """Records (sequences; or prompts with a pair or ranking of responses) in one optimizer step, over all ranks."""
    num_epochs: RunLength[Positive] = 1.0
    """Passes over the training set, when `num_steps` is null."""
    num_steps: RunLength[PositiveInt | None] = None
    """Optimizer steps of the run; overrides `num_epochs`."""
    eval_every_steps: Count = 0
    """Evaluate on the held-out set every so many steps; 0 only before the first and after the last."""
    group_by_length: Result[bool] = False
    """Draw the records of a step from those of like length, which leaves less padding; every record is still met once an
    epoch, and which ones meet is drawn anew each epoch. Steps then differ more in length and in content."""
