"""Configuration of `rlhf-dist eval`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from rlhf_dist.config.base import Schema
from rlhf_dist.config.data import DataSettings, DataSource
from rlhf_dist.config.hosting import FrozenModel, HostedRun
from rlhf_dist.rollout.config import RolloutConfig


class EvalData(DataSettings):
    """Held-out records."""

    instructions: tuple[DataSource, ...] = ()
    """Loss of the policy on these: kinds `instruction`, `messages`, `text`."""
    preferences: tuple[DataSource, ...] = ()
    """Accuracy of the reward model on these: kinds `preference`, `ratings`."""
    prompts: tuple[DataSource, ...] = ()
    """The policy generates from these; the reward model, where given, scores the responses."""


class EvalStage(Schema):
    """What an evaluation measures, without where and how it is hosted."""

    policy: FrozenModel | None = None
    reward: FrozenModel | None = None
    reference: FrozenModel | None = None
    rollout: RolloutConfig = RolloutConfig()
    data: EvalData

    @model_validator(mode="after")
    def _response_fits(self) -> EvalStage:
        if self.data.prompts and self.rollout.max_response_tokens >= self.data.max_length_tokens:
            raise ValueError(
                f"rollout.max_response_tokens {self.rollout.max_response_tokens} leaves no room for a prompt in "
                f"data.max_length_tokens {self.data.max_length_tokens}; lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _models_for_the_data(self) -> EvalStage:
        data = self.data
        if not (data.instructions or data.preferences or data.prompts):
            raise ValueError(
                "data names nothing to evaluate on; set data.instructions, data.preferences or data.prompts"
            )
        for name, wanted, model in (
            ("data.instructions", data.instructions, "policy"),
            ("data.prompts", data.prompts, "policy"),
            ("data.preferences", data.preferences, "reward"),
        ):
            if wanted and getattr(self, model) is None:
                raise ValueError(f"{name} needs a model; set {model}.model_path")
        return self


class EvalConfig(EvalStage, HostedRun):
    """Measures a policy and/or a reward model on held-out records."""

    @property
    def resume(self) -> Literal["no"]:
        """An evaluation has no checkpoints: it is always run whole."""
        return "no"
