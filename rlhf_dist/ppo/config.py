"""Configuration of `rlhf-dist ppo`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from rlhf_dist.config.base import Count, Fraction, NonNegative, Positive, PositiveInt, Result, RunLength, Schema
from rlhf_dist.config.data import PPOData
from rlhf_dist.config.hosting import DEFAULT_MODEL, FrozenModel, OptionalPath, RunConfig, TrainedModel
from rlhf_dist.rollout.config import RolloutConfig


def _auto_off_or_positive(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """One message for a value that is neither."""
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(f"importance_cap is {value!r}; set it to auto, off or a number above 0") from None


class PPOSettings(Schema):
    """The algorithm. Equations: rlhf_dist/ppo/README.md."""

    num_iterations: RunLength[PositiveInt] = 100
    """Iterations of generate → score → advantages → update → sync."""
    prompts_per_iteration: Result[PositiveInt] = 64
    """Prompts drawn an iteration."""
    responses_per_prompt: Result[PositiveInt] = 1
    """Responses sampled for each prompt."""
    mini_batch_size: Result[PositiveInt] = 32
    """Responses in one optimizer step, over all ranks; must divide the responses of an iteration."""
    num_epochs: Result[PositiveInt] = 2
    """Passes over an iteration's responses."""
    off_policy_iterations: Result[Literal[0, 1]] = 0
    """Iterations by which rollouts lag behind. With 1, the responses of the next iteration are generated while policy and value
    learn from those of this one, hence by the weights before the update."""
    old_logprobs: Result[Literal["policy", "rollout"]] = "policy"
    """Whose log-probs of the responses the update starts from: the `policy`'s, for one more forward pass, or those that the
    `rollout` engine sampled with, where it computes exactly as the policy does."""
    importance_cap: Result[Annotated[Literal["auto", "off"] | Positive, WrapValidator(_auto_off_or_positive)]] = "auto"
    """C of truncated importance sampling: a token's policy loss is weighted with min(π_old / μ, C), where μ is the distribution
    that it was drawn from. `auto`: 2 where μ differs from the policy (rollout.engine vllm, top_p, top_k or min_p,
    off_policy_iterations 1), otherwise off."""
    importance_range: Result[float | None] = Field(default=None, gt=1, allow_inf_nan=False)
    """r: a response whose tokens have a geometric mean of π_old / μ outside [1/r, r] does not enter the policy's loss; null
    keeps all."""
    kl_coef: Result[NonNegative] = 0.05
    """β, weight of the per-token KL penalty against the reference (with `adaptive_kl_target`: at the start)."""
    kl_in: Result[Literal["reward", "loss"]] = "reward"
    """Where the KL penalty stands: in the token rewards, as in InstructGPT, or as a term of the policy's loss, as in GRPO."""
    kl_estimator: Result[Literal["k1", "k2", "k3"]] = "k1"
    """Estimator of the KL per token (rlhf_dist/core/kl.py). In the loss k2 or k3."""
    adaptive_kl_target: Result[Positive | None] = None
    """Adapt β so that the KL to the reference (nats a response) comes to this (Ziegler et al. 2019); null keeps β."""
    kl_horizon: Result[PositiveInt] = 10_000
    """Responses over which an adapted β can change by a factor of about e^±0.2."""
    early_stop_kl: Result[Positive | None] = None
    """Skip the rest of an iteration's policy updates once the KL to the policy before them (nats a token, mean of a
    mini-batch) exceeds this, and the texts that were mixed into it; null never does."""
    gamma: Result[Fraction] = 1.0
    """Discount of future token rewards (γ of GAE)."""
    gae_lambda: Result[Fraction] = 0.95
    """λ of generalized advantage estimation."""
    whiten_advantages: Result[bool] = True
    """Shift and scale advantages to mean 0, variance 1 over all response tokens of the iteration."""
    bootstrap_truncated: Result[bool] = False
    """Treat a cut-off response as unfinished, not as ended: the return of its last token includes the value of what follows."""
    clip_range: Result[float] = Field(default=0.2, gt=0, lt=1)
    """ε of the clipped policy objective."""
    clip_range_high: Result[Positive | None] = None
    """Upper ε (ratio up to 1 + this), for a range that is not symmetric; null takes `clip_range`."""
    dual_clip: Result[float | None] = Field(default=None, gt=1)
    """c of dual-clip PPO: a token with a negative advantage A loses at most c·|A|; null switches it off."""
    entropy_coef: Result[NonNegative] = 0.0
    """Weight of the entropy bonus."""
    value_clip_range: Result[Positive | None] = 0.2
    """Range around the old value within which a new value is trusted; null switches value clipping off."""
    value_warmup_iterations: Result[Count] = 0
    """Iterations at the start that train the value function only, on responses of the unchanged policy."""
    reward_template: Result[Literal["own", "policy"]] = "own"
    """In which chat template the reward model reads prompts and responses, where it is not the policy's: its `own`, as it was
    trained, also with a tokenizer of its own; or the `policy`'s, which hands over the tokens as they are."""
    normalize_scores: Result[Literal["no", "std", "mean_std", "saved"]] = "no"
    """Divide reward-model scores by the standard deviation of all scores of the run so far (`std`), after subtracting their
    mean (`mean_std`), or by the mean and standard deviation that `rlhf-dist reward` saved with the model (`saved`); before
    anything else is done to them."""
    score_clip: Result[Positive | None] = None
    """Clip (normalized) scores to ±this before they enter the rewards."""
    missing_eos_penalty: Result[NonNegative] = 0.0
    """Subtracted from the clipped score of a response that was cut off before its EOS."""
    overlong_penalty: Result[NonNegative] = 0.0
    """Subtracted from the clipped score of a response at the length limit; less for the `overlong_buffer_tokens` before it."""
    overlong_buffer_tokens: Result[PositiveInt] = 16
    """Tokens before the length limit over which the overlong penalty grows from 0."""
    ema_decay: Result[float | None] = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of the policy's weights, with this decay an optimizer step, and save it as
    `model_ema/`; null keeps none."""
    ptx_coef: Result[NonNegative] = 0.0
    """γ of InstructGPT eq. 2: weight of the pretraining-mix (PTX) loss, a mean over its own tokens. `policy.optimizer.
    max_grad_norm` clips the gradient of both together."""
    ptx_batch_size: Result[PositiveInt] = 32
    """PTX sequences in one optimizer step, over all ranks."""
    ptx_ratio_every_iterations: Count = 10
    """Measure the gradient norm of PTX against that of PPO every so many iterations, for one more forward and backward pass of
    the first optimizer step; 0 never."""
    self_checks: bool = True
    """Stop where the numbers cannot be right: an update that starts off policy, rollouts that are not the policy's, a first
    iteration whose policy is not its reference. (What is not finite stops a run in any case.)"""
    eval_every_iterations: Count = 0
    """Generate from and score the held-out prompts every so many iterations; 0 only before the first and after the last."""

    @property
    def responses_per_iteration(self) -> int:
        """Responses generated in one iteration."""
        return self.prompts_per_iteration * self.responses_per_prompt

    @property
    def updates_per_iteration(self) -> int:
        """Optimizer steps in one iteration."""
        return self.num_epochs * (self.responses_per_iteration // self.mini_batch_size)

    def trains_policy(self, iteration: int) -> bool:
        """Whether the value function is warm in iteration `iteration` (0-based)."""
        return iteration >= self.value_warmup_iterations

    def policy_version(self, iteration: int) -> int:
        """Version of the policy's weights before iteration `iteration`: the iterations that trained it."""
        return max(0, iteration - self.value_warmup_iterations)

    @property
    def num_updates(self) -> int:
        """Optimizer steps of the value function in the run."""
        return self.num_iterations * self.updates_per_iteration

    @property
    def num_policy_updates(self) -> int:
        """Optimizer steps of the policy in the run: none while the value function warms up."""
        return (self.num_iterations - self.value_warmup_iterations) * self.updates_per_iteration

    @model_validator(mode="after")
    def _mini_batches_are_whole(self) -> PPOSettings:
        if self.responses_per_iteration % self.mini_batch_size:
            raise ValueError(
                f"mini_batch_size {self.mini_batch_size} does not divide the {self.responses_per_iteration} responses of an "
                f"iteration (prompts_per_iteration {self.prompts_per_iteration} x responses_per_prompt "
                f"{self.responses_per_prompt}); choose a divisor"
            )
        return self

    @model_validator(mode="after")
    def _warm_up_ends(self) -> PPOSettings:
        if self.value_warmup_iterations >= self.num_iterations:
            raise ValueError(
                f"value_warmup_iterations {self.value_warmup_iterations} leaves none of the {self.num_iterations} iterations "
                "to train the policy; lower it or raise num_iterations"
            )
        return self

    @model_validator(mode="after")
    def _kl_has_a_gradient(self) -> PPOSettings:
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_in is loss and kl_estimator is k1, whose gradient is 0 in expectation; use k2 (on policy the gradient of "
                "each token's KL) or k3"
            )
        if self.adaptive_kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                f"adaptive_kl_target is {self.adaptive_kl_target} but kl_coef is 0, and an adapted coefficient is "
                "multiplied; start from a positive kl_coef, or set adaptive_kl_target to null"
            )
        if self.adaptive_kl_target is not None and self.responses_per_iteration > self.kl_horizon:
            raise ValueError(
                f"kl_horizon {self.kl_horizon} is shorter than one iteration of {self.responses_per_iteration} responses, "
                "after which the KL coefficient would overshoot; raise it, best to many iterations"
            )
        if self.early_stop_kl is not None and self.updates_per_iteration == 1:
            raise ValueError(
                f"early_stop_kl is {self.early_stop_kl}, but an iteration has one optimizer step, which starts at a KL of "
                "0 and cannot be stopped; raise num_epochs, lower mini_batch_size, or set early_stop_kl to null"
            )
        return self


class PPOStage(Schema):
    """What a PPO run does, without where and how it is hosted."""

    policy: TrainedModel
    reward: FrozenModel
    value: Annotated[TrainedModel, OptionalPath("reward")] = DEFAULT_MODEL
    """The value model (critic); without a model_path it starts from the reward model."""
    reference: Annotated[FrozenModel, OptionalPath("policy")] = DEFAULT_MODEL
    """The frozen reference of the KL penalty; without a model_path it is the policy's starting point."""
    rollout: RolloutConfig = RolloutConfig()
    data: PPOData
    ppo: PPOSettings = PPOSettings()
    colocate: bool = False
    """Roles that share GPUs (gpus_per_rank below 1) take turns: each moves to host memory what it does not need in a phase of
    an iteration, so that a GPU has to hold the largest phase and not the sum of the roles. Policy and value function are then
    updated one after the other. Changes memory and speed, never the result."""

    @model_validator(mode="after")
    def _phases_do_not_overlap(self) -> PPOStage:
        if not self.colocate:
            return self
        for name, value, needed in (
            ("rollout.num_chunks", self.rollout.num_chunks, 1),
            ("ppo.off_policy_iterations", self.ppo.off_policy_iterations, 0),
        ):
            if value != needed:
                raise ValueError(
                    f"colocate is true and {name} is {value}, by which phases overlap that are to take turns; set {name} to "
                    f"{needed}, or colocate to false"
                )
        return self

    @model_validator(mode="after")
    def _ptx_has_text(self) -> PPOStage:
        if self.ppo.ptx_coef > 0 and not self.data.ptx:
            raise ValueError(
                f"ppo.ptx_coef is {self.ppo.ptx_coef} but data.ptx names no text; add a source or set ptx_coef to 0"
            )
        return self

    @model_validator(mode="after")
    def _embeddings_are_resized_before(self) -> PPOStage:
        for role in ("policy", "value"):
            if getattr(self, role).resize_embeddings:
                raise ValueError(
                    f"{role}.resize_embeddings is true, but the models of a PPO run share a vocabulary; set "
                    "model.resize_embeddings in the SFT and reward runs that they come from"
                )
        return self

    @model_validator(mode="after")
    def _average_is_of_weights(self) -> PPOStage:
        if self.policy.lora is not None and self.ppo.ema_decay is not None:
            raise ValueError(
                f"ppo.ema_decay is {self.ppo.ema_decay} and policy.lora is set, but averages of the two factors of an adapter "
                "make no average of their product; set one of the two to null"
            )
        return self

    @model_validator(mode="after")
    def _response_fits(self) -> PPOStage:
        if self.rollout.max_response_tokens >= self.data.max_length_tokens:
            raise ValueError(
                f"rollout.max_response_tokens {self.rollout.max_response_tokens} leaves no room for a prompt in "
                f"data.max_length_tokens {self.data.max_length_tokens}; lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def _overlong_buffer_fits(self) -> PPOStage:
        limit, buffer = self.rollout.max_response_tokens, self.ppo.overlong_buffer_tokens
        if self.ppo.overlong_penalty > 0 and buffer > limit:
            raise ValueError(
                f"ppo.overlong_buffer_tokens {buffer} is more than rollout.max_response_tokens {limit}; lower it to at most "
                f"{limit}"
            )
        return self

    @model_validator(mode="after")
    def _rollouts_are_the_policys(self) -> PPOStage:
        """Where their log-probs are taken for the policy's."""
        if self.ppo.old_logprobs == "policy":
            return self
        rollout, precision = self.rollout, self.rollout.precision or self.policy.precision
        allowed: dict[str, tuple[object, bool, str]] = {
            "rollout.engine": (rollout.engine, rollout.engine == "hf", "hf"),
            "rollout.precision": (
                precision,
                precision == self.policy.precision,
                f"the policy's {self.policy.precision}",
            ),
            "rollout.top_p": (rollout.top_p, rollout.top_p == 1, "1"),
            "rollout.top_k": (rollout.top_k, rollout.top_k == 0, "0"),
            "rollout.min_p": (rollout.min_p, rollout.min_p == 0, "0"),
            "ppo.off_policy_iterations": (self.ppo.off_policy_iterations, not self.ppo.off_policy_iterations, "0"),
            "ppo.importance_cap": (self.ppo.importance_cap, self.ppo.importance_cap in ("auto", "off"), "auto or off"),
            "ppo.importance_range": (self.ppo.importance_range, self.ppo.importance_range is None, "null"),
        }
        for name, (value, fine, needed) in allowed.items():
            if not fine:
                raise ValueError(
                    f"ppo.old_logprobs is rollout and {name} is {value}, but the log-probs of rollouts are the policy's only "
                    f"with {needed}; set that, or ppo.old_logprobs to policy"
                )
        return self

    @property
    def importance_cap(self) -> float | None:
        """What `ppo.importance_cap` comes to; None: off."""
        cap = self.ppo.importance_cap
        if cap == "auto":
            differs = self.rollout.engine != "hf" or self.rollout.cuts_tokens_off or self.ppo.off_policy_iterations > 0
            return 2.0 if differs else None
        return None if cap == "off" else float(cap)

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt in tokens."""
        return self.data.max_length_tokens - self.rollout.max_response_tokens


class PPOConfig(PPOStage, RunConfig):
    """PPO with a KL penalty and a pretraining-mix term."""

    @property
    def colocated_roles(self) -> tuple[str, ...]:
        """Roles that take turns: those that share GPUs; inline all of them, which share the one process."""
        if not self.colocate:
            return ()
        roles = ("policy", "value", "reference", "reward", "rollout")
        inline = self.cluster == "inline"
        return tuple(name for name in roles if inline or getattr(self, name).gpus_per_rank < 1)

    @model_validator(mode="after")
    def _some_share(self) -> PPOConfig:
        if self.colocate and len(self.colocated_roles) < 2:
            raise ValueError(
                "colocate is true, but no two roles share GPUs; set gpus_per_rank of those that are to share below 1 (together "
                "at most 1), or colocate to false"
            )
        return self
