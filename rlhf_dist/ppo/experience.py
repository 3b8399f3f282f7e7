"""From what the models say of an iteration's responses to what policy and value function learn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.core.batches import TRUNCATED, Experience, RolloutBatch
from rlhf_dist.core.kl import KL_ESTIMATORS, kl_k1
from rlhf_dist.core.masking import masked_mean, masked_whiten
from rlhf_dist.evaluation.generation import generation_metrics
from rlhf_dist.ppo.advantages import gae
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.importance import UNCORRECTED, Correction, importance_metrics, importance_weights
from rlhf_dist.ppo.kl_controller import adapted_kl_coef
from rlhf_dist.ppo.losses import explained_variance
from rlhf_dist.ppo.rewards import RunningMoments, normalize_scores, overlong_penalty, shape_scores, token_rewards
from rlhf_dist.ppo.scoring import Scored


@dataclass(frozen=True)
class PPOState:
    """What the algorithm carries from one iteration to the next, beside the models."""

    kl_coef: float
    """β."""
    moments: RunningMoments = field(default_factory=RunningMoments)
    """Of all scores so far, or those saved with the reward model."""
    moments_are_fixed: bool = False

    @classmethod
    def start(cls, settings: PPOSettings, moments: RunningMoments | None) -> PPOState:
        """Before the first iteration; `moments`: fixed ones."""
        return cls(settings.kl_coef, moments or RunningMoments(), moments_are_fixed=moments is not None)

    def with_scores(self, scores: Tensor) -> PPOState:
        """Knowing one more iteration's scores [B]."""
        if self.moments_are_fixed:
            return self
        return replace(self, moments=self.moments.updated(scores))

    def adapted(self, kl: float, num_responses: int, settings: PPOSettings) -> PPOState:
        """β of the next iteration, after one whose responses have a mean KL of `kl` nats."""
        if settings.adaptive_kl_target is None:
            return self
        kl_coef = adapted_kl_coef(
            self.kl_coef,
            kl,
            target=settings.adaptive_kl_target,
            horizon=settings.kl_horizon,
            num_responses=num_responses,
        )
        return replace(self, kl_coef=kl_coef)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint; Python's JSON keeps every bit of a float."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> PPOState:
        """What `to_json` gave."""
        return cls(state["kl_coef"], RunningMoments(**state["moments"]), state["moments_are_fixed"])


def shaped_scores(
    rollout: RolloutBatch, scores: Tensor, settings: PPOSettings, state: PPOState, max_response_tokens: int
) -> Tensor:
    """[B] fp32: the scores as they enter the rewards; the order of operations is in `ppo/rewards.py`."""
    if settings.normalize_scores != "no":
        scores = normalize_scores(scores, state.moments, subtract_mean=settings.normalize_scores != "std")
    overlong = None
    if settings.overlong_penalty > 0:
        overlong = overlong_penalty(
            rollout.response_lengths,
            max_response_tokens=max_response_tokens,
            buffer_tokens=settings.overlong_buffer_tokens,
            penalty=settings.overlong_penalty,
        )
    return shape_scores(
        scores,
        rollout.finish_reasons == TRUNCATED,
        score_clip=settings.score_clip,
        missing_eos_penalty=settings.missing_eos_penalty,
        overlong=overlong,
    )


def make_experience(
    rollout: RolloutBatch,
    scored: Scored,
    settings: PPOSettings,
    state: PPOState,
    max_response_tokens: int,
    correction: Correction = UNCORRECTED,
) -> tuple[Experience, dict[str, float]]:
    """KL → token rewards → GAE → whitening over the whole batch, and importance weights; and the metrics of the iteration."""
    mask, values = rollout.response_mask, scored.values
    kl = KL_ESTIMATORS[settings.kl_estimator](scored.logprobs, scored.ref_logprobs)
    shaped = shaped_scores(rollout, scored.scores, settings, state, max_response_tokens)
    rewards = token_rewards(shaped, kl, mask, state.kl_coef if settings.kl_in == "reward" else 0.0)
    end_values = None
    if settings.bootstrap_truncated:
        truncated = rollout.finish_reasons == TRUNCATED
        end_values = torch.where(truncated, scored.end_values(rollout.response_lengths), 0.0)
    advantages, returns = gae(rewards, values, mask, settings.gamma, settings.gae_lambda, end_values)
    sampled = scored.logprobs, rollout.rollout_logprobs, mask
    weights = importance_weights(*sampled, correction)
    experience = Experience(
        tokens=rollout.tokens,
        prompt_lengths=rollout.prompt_lengths,
        response_lengths=rollout.response_lengths,
        old_logprobs=scored.logprobs,
        old_values=torch.where(mask, values, 0.0),
        advantages=masked_whiten(advantages, mask) if settings.whiten_advantages else advantages,
        returns=returns,
        ref_logprobs=scored.ref_logprobs,
        importance_weights=weights,
    )
    log_ratio = kl_k1(scored.logprobs, scored.ref_logprobs)
    metrics = {
        **generation_metrics(rollout, scored.scores),
        "reward/shaped_mean": float(shaped.mean()),
        "reward/total_mean": float(rewards.sum(1).mean()),
        "kl/ref_mean": float(torch.where(mask, log_ratio, 0.0).sum(1).mean()),
        "kl/ref_per_token": float(masked_mean(log_ratio, mask)),
        "kl/coef": state.kl_coef,
        "value/explained_variance": explained_variance(values, returns, mask),
        **importance_metrics(*sampled, weights, correction),
    }
    return experience, metrics
