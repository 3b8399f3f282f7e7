"""Configuration of `rlhf-dist sft` and `rlhf-dist reward`."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import model_validator

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
    group_by_length: bool = False
    """Draw the records of a step from those of like length, which leaves less padding; every record is still met once an
    epoch, and which ones meet is drawn anew each epoch. Steps then differ more in length and in content."""


class SFTSettings(SupervisedSettings):
    """How a language model is fine-tuned, and how much plain text is mixed in."""

    pretraining_ratio: NonNegative = 0.0
    """Sequences of `data.pretraining` for each record of a step: a step of 32 records at 0.125 has 4 such sequences beside
    them. Rounded to whole sequences."""
    pretraining_coef: NonNegative | None = None
    """Weight of the text's mean loss over its tokens, added to the mean loss over the records' targets. null takes
    `pretraining_ratio`: a sequence of text then weighs as much as a record, however long the two are."""

    @property
    def pretraining_per_step(self) -> int:
        """Sequences of plain text in an optimiser step, over all ranks."""
        return math.floor(self.pretraining_ratio * self.batch_size + 0.5)

    @property
    def pretraining_weight(self) -> float:
        """The weight that `pretraining_coef` comes to."""
        return self.pretraining_ratio if self.pretraining_coef is None else self.pretraining_coef


class NearTiesConfig(Schema):
    """What is done about pairs whose margin is small, which often outnumber the clear ones. Formulas and sources:
    rlhf_dist/algo/near_ties.py."""

    below: Positive
    """A pair with a margin (difference of ratings, for ranked records) below this is a near-tie. One whose record states no
    margin is not."""
    treat: Literal["keep", "drop", "down_weight", "soft_labels"] = "down_weight"
    """`keep` trains on near-ties like on all others; `drop` leaves them out, and prompts that have no other pair; `down_weight`
    lowers their weight until in total they weigh no more than the clear pairs of the training set; `soft_labels` trains towards
    a preference of 50 % at margin 0, rising to 100 % at `below`. Accuracy is reported for both classes in any case."""


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
    near_ties: NearTiesConfig | None = None
    """How pairs of small margins are treated; null does not tell them apart."""

    @model_validator(mode="after")
    def _margins_are_used_once(self) -> RewardSettings:
        if self.near_ties is not None and self.near_ties.treat == "soft_labels" and self.margin_coef > 0:
            raise ValueError(
                f"margin_coef is {self.margin_coef} and near_ties.treat is soft_labels: the one asks for differences of "
                "scores above the margin, the other for small ones at small margins; set margin_coef to 0 or choose another "
                "treatment"
            )
        return self


class SFTStage(Schema):
    """What an SFT run does, without where and how it is hosted."""

    model: TrainedModel
    data: SFTData
    sft: SFTSettings = SFTSettings()

    @model_validator(mode="after")
    def _pretraining_text_and_its_ratio(self) -> SFTStage:
        settings, there = self.sft, bool(self.data.pretraining)
        if there and settings.pretraining_ratio == 0:
            raise ValueError(
                "data.pretraining names text, but sft.pretraining_ratio is 0, so none of it would be used; set the ratio (0.1 "
                "is one sequence for ten records), or remove data.pretraining"
            )
        if not there and (settings.pretraining_ratio > 0 or settings.pretraining_coef is not None):
            name = "pretraining_ratio" if settings.pretraining_ratio > 0 else "pretraining_coef"
            raise ValueError(
                f"sft.{name} is {getattr(settings, name):g}, but data.pretraining names no text; name some (kind text), or "
                f"remove sft.{name}"
            )
        if there and settings.pretraining_per_step == 0:
            raise ValueError(
                f"sft.pretraining_ratio {settings.pretraining_ratio:g} of sft.batch_size {settings.batch_size} comes to no "
                f"sequence a step; raise the ratio to at least {0.5 / settings.batch_size:g}, or raise batch_size"
            )
        return self


class RewardStage(Schema):
    """What a reward-model run does, without where and how it is hosted."""

    model: TrainedModel
    data: RewardData
    reward: RewardSettings = RewardSettings()


class SFTConfig(SFTStage, RunConfig):
    """Supervised (instruction) fine-tuning, or pretraining on plain text."""


class RewardConfig(RewardStage, RunConfig):
    """Reward modelling on preferences: pairs, or rankings of more responses."""
