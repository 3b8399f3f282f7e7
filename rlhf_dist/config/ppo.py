"""Configuration of `rlhf-dist ppo`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from rlhf_dist.config.base import Count, Fraction, NonNegative, Positive, PositiveInt, Schema
from rlhf_dist.config.data import PPOData
from rlhf_dist.config.hosting import (
    FrozenModel,
    InheritedFrozenModel,
    InheritedTrainedModel,
    Placement,
    Precision,
    RunConfig,
    TrainedModel,
)


class RolloutConfig(Placement):
    """Generation of responses."""

    engine: Literal["hf"] = "hf"
    """Generation engine: `hf` generates with transformers."""
    precision: Precision | None = None
    """Precision of the engine's weights; null takes the policy's."""
    max_response_tokens: PositiveInt = 128
    """Longest response in tokens; one that reaches it without EOS is truncated."""
    temperature: Positive = 1.0
    """Softmax temperature. The same temperature enters every log-prob of PPO (behaviour, old, new, reference)."""
    batch_size: PositiveInt = 64
    """Sequences generated at the same time by one rank."""


class PPOSettings(Schema):
    """The algorithm. Equations: rlhf_dist/algo."""

    num_iterations: PositiveInt = 100
    """Iterations of generate → score → advantages → update → sync."""
    prompts_per_iteration: PositiveInt = 64
    """Prompts drawn an iteration."""
    responses_per_prompt: PositiveInt = 1
    """Responses sampled for each prompt."""
    mini_batch_size: PositiveInt = 32
    """Responses in one optimiser step, over all ranks; must divide the responses of an iteration."""
    num_epochs: PositiveInt = 2
    """Passes over an iteration's responses."""
    kl_coef: NonNegative = 0.05
    """β, weight of the per-token KL penalty against the reference in the reward."""
    discount: Fraction = 1.0
    """Discount of future token rewards (γ of GAE)."""
    gae_lambda: Fraction = 0.95
    """λ of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0, variance 1 over all response tokens of the iteration."""
    clip_range: Positive = 0.2
    """ε of the clipped policy objective."""
    value_clip_range: Positive | None = 0.2
    """Range around the old value within which a new value is trusted; null switches value clipping off."""
    score_clip: Positive | None = None
    """Clip reward-model scores to ±this before they enter the rewards."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the score of a response that was cut off before its EOS."""
    ptx_coef: NonNegative = 0.0
    """γ of InstructGPT eq. 2: weight of the pretraining-mix (PTX) loss, a mean over its own tokens."""
    ptx_batch_size: PositiveInt = 32
    """PTX sequences in one optimiser step, over all ranks."""
    eval_every_iterations: Count = 0
    """Generate from and score the held-out prompts every so many iterations; 0 only before the first and after the last."""

    @property
    def responses_per_iteration(self) -> int:
        """Responses generated in one iteration."""
        return self.prompts_per_iteration * self.responses_per_prompt

    @property
    def updates_per_iteration(self) -> int:
        """Optimiser steps in one iteration."""
        return self.num_epochs * (self.responses_per_iteration // self.mini_batch_size)

    @property
    def num_updates(self) -> int:
        """Optimiser steps of the run."""
        return self.num_iterations * self.updates_per_iteration

    @model_validator(mode="after")
    def _mini_batches_are_whole(self) -> PPOSettings:
        if self.responses_per_iteration % self.mini_batch_size:
            raise ValueError(
                f"mini_batch_size {self.mini_batch_size} does not divide the {self.responses_per_iteration} responses of an "
                f"iteration (prompts_per_iteration {self.prompts_per_iteration} x responses_per_prompt "
                f"{self.responses_per_prompt}); choose a divisor"
            )
        return self


class PPOConfig(RunConfig):
    """PPO with a KL penalty and a pretraining-mix term."""

    policy: TrainedModel
    reward: FrozenModel
    value: InheritedTrainedModel = InheritedTrainedModel()
    reference: InheritedFrozenModel = InheritedFrozenModel()
    rollout: RolloutConfig = RolloutConfig()
    data: PPOData
    ppo: PPOSettings = PPOSettings()

    @model_validator(mode="after")
    def _ptx_has_text(self) -> PPOConfig:
        if self.ppo.ptx_coef > 0 and not self.data.ptx:
            raise ValueError(
                f"ppo.ptx_coef is {self.ppo.ptx_coef} but data.ptx names no text; add a source or set ptx_coef to 0"
            )
        return self

    @model_validator(mode="after")
    def _response_fits(self) -> PPOConfig:
        if self.rollout.max_response_tokens >= self.data.max_length_tokens:
            raise ValueError(
                f"rollout.max_response_tokens {self.rollout.max_response_tokens} leaves no room for a prompt in "
                f"data.max_length_tokens {self.data.max_length_tokens}; lower the first or raise the second"
            )
        return self

    @property
    def value_model(self) -> TrainedModel:
        """The value function with its starting weights filled in."""
        fields = self.value.model_dump(exclude={"model_path"})
        return TrainedModel(model_path=self.value.model_path or self.reward.model_path, **fields)

    @property
    def reference_model(self) -> FrozenModel:
        """The reference with its weights filled in."""
        fields = self.reference.model_dump(exclude={"model_path"})
        return FrozenModel(model_path=self.reference.model_path or self.policy.model_path, **fields)

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt in tokens."""
        return self.data.max_length_tokens - self.rollout.max_response_tokens
