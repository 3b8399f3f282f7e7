"""Configuration of `rlhf-dist reward`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from rlhf_dist.config.base import NonNegative, Positive, Schema
from rlhf_dist.config.data import RewardData
from rlhf_dist.config.hosting import RunConfig, TrainedModel
from rlhf_dist.config.supervised import SupervisedSettings


class NearTiesConfig(Schema):
    """What is done about pairs whose margin is small, which often outnumber the clear ones. Formulas and sources:
    rlhf_dist/core/near_ties.py."""

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


class RewardStage(Schema):
    """What a reward-model run does, without where and how it is hosted."""

    model: TrainedModel
    data: RewardData
    reward: RewardSettings = RewardSettings()


class RewardConfig(RewardStage, RunConfig):
    """Reward modelling on preferences: pairs, or rankings of more responses."""
