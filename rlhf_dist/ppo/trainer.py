"""PPO with a KL penalty and a pretraining-mix term (InstructGPT, Ouyang et al. 2022, eq. 2).

prompts ──► rollout.generate ──► RolloutBatch                           in parts (ppo/rollouts.py)
                                    │
         ┌───────────────┬──────────┴─────┬───────────────┐
   reward.score   reference.logprobs  policy.logprobs  value.values      at the same time, and as parts arrive
         └───────────────┴──────────┬─────┴───────────────┘             (ppo/scoring.py)
                          make_experience                               on the driver
                     KL → token rewards → GAE → whitening               (ppo/experience.py)
                                    │
                       ┌────────────┴────────────┐
                 policy.update (+ PTX)      value.update                at the same time
                       └────────────┬────────────┘
                           weight_sync.push ──► rollout engines
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.core.batches import Experience, RolloutBatch, TokenBatch
from rlhf_dist.core.errors import SampleError
from rlhf_dist.core.random import permutation
from rlhf_dist.core.roles import Checkpointed, Policy, Reference, RewardScorer, RolloutEngine, ValueFunction, WeightSync
from rlhf_dist.data.sampler import EpochSampler
from rlhf_dist.evaluation.generation import Decode, sample_rows, score_responses
from rlhf_dist.evaluation.reward_input import RewardInput, as_generated
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.experience import PPOState, make_experience
from rlhf_dist.ppo.importance import UNCORRECTED, Correction
from rlhf_dist.ppo.rewards import RunningMoments
from rlhf_dist.ppo.rollouts import Rollouts
from rlhf_dist.ppo.scoring import Precisions, Scored, Scorer
from rlhf_dist.run.checkpoint import Checkpoints
from rlhf_dist.run.failures import sample_dump
from rlhf_dist.run.run import Run


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
    """Tokenized records."""

    prompts: Any
    eval_prompts: Any | None
    ptx: Any | None
    decode: Decode
    """[n] token ids → text."""
    reward_input: RewardInput = as_generated
    """What the reward model scores of a rollout."""
    score_moments: RunningMoments | None = None
    """What scores are normalized by, where that is fixed."""


class PPOTrainer:
    """The central driver of PPO."""

    def __init__(
        self,
        run: Run,
        roles: PPORoles,
        data: PPOData,
        settings: PPOSettings,
        checkpoints: Checkpoints,
        *,
        max_response_tokens: int,
        precisions: Precisions,
        correction: Correction = UNCORRECTED,
        num_chunks: int = 1,
    ) -> None:
        """
        Args:
            max_response_tokens: where the rollout engine cuts off.
            precisions: of the models that sanity checks compare.
            correction: of the difference between rollout engine and policy.
            num_chunks: parts that an iteration is generated in.
        """
        self.run_log = run
        self.roles = roles
        self.data = data
        self.settings = settings
        self.checkpoints = checkpoints
        self.max_response_tokens = max_response_tokens
        self.correction = correction
        self.rollouts = Rollouts(roles.rollout, data.prompts, settings, run.seed, num_chunks)
        self.scorer = Scorer(
            roles.policy,
            roles.reference,
            roles.reward,
            roles.value,
            reward_input=data.reward_input,
            settings=settings,
            precisions=precisions,
        )
        self.state = PPOState.start(settings, data.score_moments)
        self.ptx_sampler = EpochSampler(len(data.ptx), run.seed, "ptx") if data.ptx else None

    def step(self, iteration: int) -> dict[str, float]:
        """Iteration `iteration` (0-based): generate → score → advantages → update → sync."""
        phase, trains_policy = self.run_log.phase, self.settings.trains_policy(iteration)
        with phase("generate"):
            generating = self.rollouts.take(iteration)
        rollout, scored = self.scorer.score(generating.arriving(), phase)
        with phase("score"), self._dumping(iteration, rollout):
            self.scorer.check(iteration, rollout, scored)
        with phase("advantages"):
            state = self.state.with_scores(scored.scores)
            experience, metrics = make_experience(
                rollout, scored, self.settings, state, self.max_response_tokens, self.correction
            )
        with phase("update"):
            metrics |= self.update(iteration, experience, state.kl_coef)
            if trains_policy:
                state = state.adapted(metrics["kl/ref_mean"], len(rollout), self.settings)
            self.state = state
        if trains_policy:  # the engines already have weights that did not change
            with phase("sync"):
                self.sync(iteration + 1)
        self.log_samples(iteration, rollout, scored)
        metrics["rollout/staleness"] = float(self.settings.policy_version(iteration) - rollout.policy_version)
        times = self.run_log.take_times()
        tokens = int(rollout.response_lengths.sum())
        return {**metrics, **times, "throughput/response_tokens_per_s": tokens / times["time/step_s"]}

    def sync(self, iteration: int) -> None:
        """Bring the weights that iteration `iteration` starts with to the rollout engines."""
        self.roles.weight_sync.push(self.settings.policy_version(iteration)).result()
        self.scorer.check_sync(self.roles.rollout, self.rollouts.probe_prompts())

    def update(self, iteration: int, experience: Experience, kl_coef: float) -> dict[str, float]:
        """All epochs and mini-batches of an iteration; the policy's only once the value function is warm."""
        steps, ptx = self.draw_steps(iteration), None
        updates = []
        if self.settings.trains_policy(iteration):
            ptx = self.draw_ptx(iteration)
            kl_loss_coef = kl_coef if self.settings.kl_in == "loss" else 0.0
            every = self.settings.ptx_ratio_every_iterations
            measure = ptx is not None and every > 0 and iteration % every == 0
            updates.append(self.roles.policy.update(experience, steps, ptx, kl_loss_coef, measure))
        updates.append(self.roles.value.update(experience, steps))
        metrics: dict[str, float] = {}
        with self._dumping(iteration, experience, ptx):
            for update in updates:
                metrics |= update.result().metrics
        return metrics

    @contextlib.contextmanager
    def _dumping(
        self, iteration: int, batch: RolloutBatch | Experience, ptx: list[TokenBatch] | None = None
    ) -> Iterator[None]:
        """Write down the samples that a step is aborted for."""
        try:
            yield
        except SampleError as error:
            rows = [
                row
                for source, numbers in error.rows.items()
                for row in sample_dump(
                    source, ptx[error.step or 0] if source == "ptx" and ptx else batch, numbers, self.data.decode
                )
            ]
            raise self.run_log.aborted(iteration + 1, error, rows) from error

    def log_samples(self, iteration: int, rollout: RolloutBatch, scored: Scored) -> None:
        """A few responses with their scores."""
        few = torch.arange(min(self.run_log.num_samples, len(rollout)))
        rows = sample_rows(
            self.data.decode, rollout.rows(few), scored.scores[few], scored.logprobs[few], scored.ref_logprobs[few]
        )
        self.run_log.log_samples(iteration + 1, rows)

    def draw_steps(self, iteration: int) -> list[Tensor]:
        """Rows of each optimizer step: a permutation an epoch, cut into mini-batches."""
        num, epochs = self.settings.responses_per_iteration, self.settings.num_epochs
        orders = [
            permutation(self.run_log.seed, "mini-batches", iteration * epochs + epoch, num) for epoch in range(epochs)
        ]
        return [rows for order in orders for rows in order.split(self.settings.mini_batch_size)]

    def draw_ptx(self, iteration: int) -> list[TokenBatch] | None:
        """A batch of pretraining text for each optimizer step of an iteration that trains the policy; None without PTX."""
        if self.ptx_sampler is None or self.data.ptx is None or self.settings.ptx_coef == 0:
            return None
        size, num = self.settings.ptx_batch_size, self.settings.updates_per_iteration
        # No text is skipped while the value function warms up.
        trained = iteration - self.settings.value_warmup_iterations
        indices = self.ptx_sampler.indices(trained * num * size, num * size)
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
                self.run_log.checkpoint(
                    self.checkpoints,
                    iteration,
                    {"before": before, "ppo": self.state.to_json()},
                    self._checkpointed(),
                    total=self.settings.num_iterations,
                )
        return {"num_iterations": iteration, "before": before, "after": after}

    def _start(self, resume: bool) -> tuple[int, dict[str, float]]:
        """(first iteration, evaluation before training), with every rollout engine on the policy's weights."""
        latest = self.checkpoints.latest() if resume else None
        state = self.checkpoints.load(latest, self._checkpointed()) if latest else None
        iteration = state["step"] if state else 0
        self.sync(iteration)
        if state:
            self.state = PPOState.from_json(state["ppo"])
            return iteration, state["before"]
        before = self.evaluate(0)
        self.run_log.log(0, {f"eval/{name}": value for name, value in before.items()})
        return 0, before

    def _checkpointed(self) -> dict[str, Checkpointed]:
        parts: dict[str, Checkpointed] = {"policy": self.roles.policy, "value": self.roles.value}
        return parts | {"rollouts": self.rollouts} if self.settings.off_policy_iterations else parts

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Generate from and score the held-out prompts. The random numbers are the same at every evaluation, so that
        differences are the policy's."""
        if self.data.eval_prompts is None:
            return {}
        rows, metrics = score_responses(
            self.data.eval_prompts,
            self.data.decode,
            self.roles.rollout,
            self.roles.reward,
            self.roles.reference,
            self.data.reward_input,
        )
        self.run_log.log_eval(iteration, rows)
        return metrics
