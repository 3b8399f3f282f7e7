"""Configuration of `rlhf-dist sft` and `rlhf-dist reward`."""

from __future__ import annotations

from rlhf_dist.config.base import Count, Positive, PositiveInt, Schema
from rlhf_dist.config.data import RewardData, SFTData
from rlhf_dist.config.hosting import RunConfig, TrainedModel


class SupervisedSettings(Schema):
    """Length and rhythm of a supervised run. A step is one optimiser step over `batch_size` records."""

    batch_size: PositiveInt = 32
    """Records (sequences, or pairs) in one optimiser step, over all ranks."""
    num_epochs: Positive = 1.0
    """Passes over the training set, when `num_steps` is null."""
    num_steps: PositiveInt | None = None
    """Optimiser steps of the run; overrides `num_epochs`."""
    eval_every_steps: Count = 0
    """Evaluate on the held-out set every so many steps; 0 only before the first and after the last."""


class SFTConfig(RunConfig):
    """Supervised (instruction) fine-tuning, or pretraining on plain text."""

    model: TrainedModel
    data: SFTData
    sft: SupervisedSettings = SupervisedSettings()


class RewardConfig(RunConfig):
    """Reward modelling on preference pairs."""

    model: TrainedModel
    data: RewardData
    reward: SupervisedSettings = SupervisedSettings()
