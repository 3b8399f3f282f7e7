"""Configuration of `rlhf-dist sft`."""

from __future__ import annotations

import math

from pydantic import model_validator

from rlhf_dist.config.base import NonNegative, Schema
from rlhf_dist.config.data import SFTData
from rlhf_dist.config.hosting import RunConfig, TrainedModel
from rlhf_dist.config.supervised import SupervisedSettings


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
        """Sequences of plain text in an optimizer step, over all ranks."""
        return math.floor(self.pretraining_ratio * self.batch_size + 0.5)

    @property
    def pretraining_weight(self) -> float:
        """The weight that `pretraining_coef` comes to."""
        return self.pretraining_ratio if self.pretraining_coef is None else self.pretraining_coef


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


class SFTConfig(SFTStage, RunConfig):
    """Supervised (instruction) fine-tuning, or pretraining on plain text."""
