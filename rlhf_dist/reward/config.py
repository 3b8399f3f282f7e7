"""Configuration of `rlhf-dist reward`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf_dist.config.base import NonNegative, Positive, Schema
from rlhf_dist.config.data import RewardData
from rlhf_dist.config.hosting import RunConfig, TrainedModel
from rlhf_dist.config.supervised import SupervisedSettings


class LowMarginConfig(Schema):
    """What is done about pairs whose margin is small, whose labels are often wrong: rlhf_dist/reward/low_margin.py."""

    below: Positive
    """A pair with a margin (difference of ratings, for ranked records) below this is a low-margin pair. One whose record states
    no margin is not."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.25
    """What the loss of a low-margin pair is multiplied by. 0 drops these pairs, and prompts that have no other; 1 trains on
    them like on all others. Accuracy on held-out pairs is reported for both classes in any case."""


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
    low_margin: LowMarginConfig | None = None
    """How pairs of small margins are treated; null treats them as all others, and does not report on them."""


class RewardStage(Schema):
    """What a reward-model run does, without where and how it is hosted."""

    model: TrainedModel
    data: RewardData
    reward: RewardSettings = RewardSettings()


class RewardConfig(RewardStage, RunConfig):
    """Reward modeling on preferences: pairs, or rankings of more responses."""
