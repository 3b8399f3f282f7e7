"""PPO with a KL penalty and a pretraining-mix term (InstructGPT, Ouyang et al. 2022, eq. 2).

prompts ──► rollout.generate ──► RolloutBatch
                                    │
         ┌───────────────┬──────────┴─────┬───────────────┐
   reward.score   reference.logprobs  policy.logprobs  value.values      at the same time
         └───────────────┴──────────┬─────┴───────────────┘
                          make_experience                               on the driver
                     KL → token rewards → GAE → whitening
                                    │
                       ┌────────────┴────────────┐
                 policy.update (+ PTX)      value.update                at the same time
                       └────────────┬────────────┘
                           weight_sync.push ──► rollout engines
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.algo.advantages import gae
from rlhf_dist.algo.kl import kl_k1
from rlhf_dist.algo.losses import explained_variance
from rlhf_dist.algo.masking import masked_mean, masked_whiten
from rlhf_dist.algo.random import permutation
from rlhf_dist.algo.rewards import shape_scores, token_rewards
from rlhf_dist.batches import TRUNCATED, Experience, PromptBatch, RolloutBatch, TokenBatch
from rlhf_dist.config import PPOSettings
from rlhf_dist.data.sampler import EpochSampler
from rlhf_dist.roles import Policy, Reference, RewardScorer, RolloutEngine, ValueFunction, WeightSync
from rlhf_dist.trainers.checkpoint import Checkpoints
from rlhf_dist.trainers.generation import Decode, generation_metrics, sample_rows, score_responses
from rlhf_dist.trainers.run import Run


@dataclass(frozen=True)
class PPORoles:
    """The models, wherever they live."""

    policy: Policy
    reference: Reference
    reward: RewardScorer
    value: ValueFunction
    rollout: RolloutEngine
    weight_sync: WeightSync


@dataclass(frozen=True)
class PPOData:
    """Tokenised records."""

    prompts: Any
    eval_prompts: Any | None
    ptx: Any | None
    decode: Decode
    """[n] token ids → text."""


class PPOTrainer:
    """The central driver of PPO."""

    def __init__(
        self,
        run: Run,
        roles: PPORoles,
        data: PPOData,
        settings: PPOSettings,
        checkpoints: Checkpoints,
        every_iterations: int,
    ) -> None:
        self.run_log = run
        self.roles = roles
        self.data = data
        self.settings = settings
        self.checkpoints = checkpoints
        self.every_iterations = every_iterations
        self.prompt_sampler = EpochSampler(len(data.prompts), run.seed, "prompts")
        self.ptx_sampler = EpochSampler(len(data.ptx), run.seed, "ptx") if data.ptx else None

    def step(self, iteration: int) -> dict[str, float]:
        """Iteration `iteration` (0-based): generate → score → advantages → update → sync."""
        phase = self.run_log.phase
        with phase("generate"):
            prompts = self.draw_prompts(iteration)
            rollout = self.roles.rollout.generate(prompts, stream="rollout", iteration=iteration).result()
        with phase("score"):
            scored = self.score(rollout)
        with phase("advantages"):
            experience, metrics = make_experience(rollout, scored, self.settings)
        with phase("update"):
            steps, ptx = self.draw_steps(iteration), self.draw_ptx(iteration)
            updates = [self.roles.policy.update(experience, steps, ptx), self.roles.value.update(experience, steps)]
            for update in updates:
                metrics |= update.result().metrics
        with phase("sync"):
            self.roles.weight_sync.push(iteration + 1).result()
        self.log_samples(iteration, rollout, scored)
        times = self.run_log.take_times()
        tokens = int(rollout.response_lengths.sum())
        return {**metrics, **times, "throughput/response_tokens_per_s": tokens / times["time/step_s"]}

    def log_samples(self, iteration: int, rollout: RolloutBatch, scored: Scored) -> None:
        """A few responses with their scores."""
        few = torch.arange(min(self.run_log.num_samples, len(rollout)))
        rows = sample_rows(
            self.data.decode, rollout.rows(few), scored.scores[few], scored.logprobs[few], scored.ref_logprobs[few]
        )
        self.run_log.log_samples(iteration + 1, rows)

    def score(self, rollout: RolloutBatch) -> Scored:
        """Everything the models say of the responses; the four work at the same time."""
        scores = self.roles.reward.score(rollout.sequences)
        ref_logprobs = self.roles.reference.logprobs(rollout)
        logprobs = self.roles.policy.logprobs(rollout)
        values = self.roles.value.values(rollout)
        return Scored(scores.result(), logprobs.result(), ref_logprobs.result(), values.result())

    def draw_prompts(self, iteration: int) -> PromptBatch:
        """The iteration's prompts, each repeated `responses_per_prompt` times."""
        num, repeats = self.settings.prompts_per_iteration, self.settings.responses_per_prompt
        indices = self.prompt_sampler.indices(iteration * num, num).repeat_interleave(repeats)
        return self.data.prompts.batch(indices, sample_ids=torch.arange(num * repeats))

    def draw_steps(self, iteration: int) -> list[Tensor]:
        """Rows of each optimiser step: a permutation an epoch, cut into mini-batches."""
        num, epochs = self.settings.responses_per_iteration, self.settings.num_epochs
        orders = [
            permutation(self.run_log.seed, "mini-batches", iteration * epochs + epoch, num) for epoch in range(epochs)
        ]
        return [rows for order in orders for rows in order.split(self.settings.mini_batch_size)]

    def draw_ptx(self, iteration: int) -> list[TokenBatch] | None:
        """A batch of pretraining text for each optimiser step; None without the PTX term."""
        if self.ptx_sampler is None or self.data.ptx is None or self.settings.ptx_coef == 0:
            return None
        size, num = self.settings.ptx_batch_size, self.settings.updates_per_iteration
        indices = self.ptx_sampler.indices(iteration * num * size, num * size)
        return [self.data.ptx.batch(part) for part in indices.split(size)]

    def run(self, resume: bool) -> dict[str, Any]:
        """Train to the end; returns the summary."""
        iteration, before = self._start(resume)
        after = before if iteration < self.settings.num_iterations else self.evaluate(iteration)
        with self.run_log.progress("ppo", total=self.settings.num_iterations, completed=iteration):
            while iteration < self.settings.num_iterations:
                metrics = self.step(iteration)
                iteration += 1
                every = self.settings.eval_every_iterations
                if iteration == self.settings.num_iterations or (every and iteration % every == 0):
                    with self.run_log.phase("evaluate"):
                        after = self.evaluate(iteration)
                    metrics |= {f"eval/{name}": value for name, value in after.items()}
                    metrics["time/evaluate_s"] = self.run_log.take_times()["time/evaluate_s"]
                self.run_log.log(iteration, metrics)
                if self.every_iterations and iteration % self.every_iterations == 0:
                    self.checkpoints.save(iteration, {"before": before}, self._trained())
        return {"num_iterations": iteration, "before": before, "after": after}

    def _start(self, resume: bool) -> tuple[int, dict[str, float]]:
        """(first iteration, evaluation before training), with every rollout engine on the policy's weights."""
        latest = self.checkpoints.latest() if resume else None
        state = self.checkpoints.load(latest, self._trained()) if latest else None
        iteration = state["step"] if state else 0
        self.roles.weight_sync.push(iteration).result()
        if state:
            return iteration, state["before"]
        before = self.evaluate(0)
        self.run_log.log(0, {f"eval/{name}": value for name, value in before.items()})
        return 0, before

    def _trained(self) -> dict[str, Any]:
        return {"policy": self.roles.policy, "value": self.roles.value}

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Generate from and score the held-out prompts. The random numbers are the same at every evaluation, so that
        differences are the policy's."""
        if self.data.eval_prompts is None:
            return {}
        rows, metrics = score_responses(
            self.data.eval_prompts, self.data.decode, self.roles.rollout, self.roles.reward, self.roles.reference
        )
        self.run_log.log_eval(iteration, rows)
        return metrics


@dataclass(frozen=True)
class Scored:
    """What the models say of a `RolloutBatch`."""

    scores: Tensor
    """[B] fp32."""
    logprobs: Tensor
    """[B, R] fp32, under the policy that is about to be updated."""
    ref_logprobs: Tensor
    """[B, R] fp32."""
    values: Tensor
    """[B, R] fp32."""


def make_experience(
    rollout: RolloutBatch, scored: Scored, settings: PPOSettings
) -> tuple[Experience, dict[str, float]]:
    """KL → token rewards → GAE → whitening over the whole batch; and the metrics of the iteration."""
    mask = rollout.response_mask
    kl = kl_k1(scored.logprobs, scored.ref_logprobs)
    shaped = shape_scores(
        scored.scores,
        rollout.finish_reasons == TRUNCATED,
        score_clip=settings.score_clip,
        missing_eos_penalty=settings.missing_eos_penalty,
    )
    rewards = token_rewards(shaped, kl, mask, settings.kl_coef)
    advantages, returns = gae(rewards, scored.values, mask, settings.discount, settings.gae_lambda)
    experience = Experience(
        tokens=rollout.tokens,
        prompt_lengths=rollout.prompt_lengths,
        response_lengths=rollout.response_lengths,
        old_logprobs=scored.logprobs,
        old_values=scored.values,
        advantages=masked_whiten(advantages, mask) if settings.whiten_advantages else advantages,
        returns=returns,
    )
    mismatch = torch.where(mask, (rollout.behaviour_logprobs - scored.logprobs).abs(), 0.0)
    metrics = {
        **generation_metrics(rollout, scored.scores),
        "reward/total_mean": float(rewards.sum(1).mean()),
        "kl/ref_mean": float(torch.where(mask, kl, 0.0).sum(1).mean()),
        "kl/ref_per_token": float(masked_mean(kl, mask)),
        "kl/coef": settings.kl_coef,
        "value/explained_variance": explained_variance(scored.values, returns, mask),
        "rollout/behaviour_mismatch": float(mismatch.max()),
    }
    return experience, metrics
