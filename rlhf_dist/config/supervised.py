"""Configuration of `rlhf-dist sft` and `rlhf-dist reward`."""

from __future__ import annotations

from rlhf_dist.config.base import Count, NonNegative, Positive, PositiveInt, Schema
from rlhf_dist.config.data import RewardData, SFTData
from rlhf_dist.config.hosting import RunConfig, TrainedModel


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


class RewardSettings(SupervisedSettings):
    """How a reward model is trained. All pairs of a prompt together weigh as much as the one pair of another."""

    margin_coef: NonNegative = 0.0
    """Weight of the records' margins (differences of ratings, for ranked records): a pair's loss is
    -log sigmoid(score difference - margin_coef * margin). 0 ignores the margins."""
    centering_coef: NonNegative = 0.0
    """Weight of (score better + score worse)^2 in a pair's loss, which keeps scores around 0; 0.01 is usual. 0 leaves their
    level free: a pair only says by how much its two scores differ."""
    bag_of_words_baseline: bool = False
    """Also fit a linear model of the words of the responses (TF-IDF and logistic regression, scikit-learn) on the training
    records, and say what it reaches on the held-out ones. A reward model that does not beat it has learnt little."""


class SFTStage(Schema):
    """What an SFT run does, without where and how it is hosted."""

    model: TrainedModel
    data: SFTData
    sft: SupervisedSettings = SupervisedSettings()


class RewardStage(Schema):
    """What a reward-model run does, without where and how it is hosted."""

    model: TrainedModel
    data: RewardData
    reward: RewardSettings = RewardSettings()


class SFTConfig(SFTStage, RunConfig):
    """Supervised (instruction) fine-tuning, or pretraining on plain text."""


class RewardConfig(RewardStage, RunConfig):
    """Reward modelling on preferences: pairs, or rankings of more responses."""
