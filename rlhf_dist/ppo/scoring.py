"""Scoring: what the models say of an iteration's responses, and whether it can be right.

Responses arrive in parts (`rollout.num_chunks`). Each is handed to reward, reference, policy and value as it arrives, and is
scored while the next is generated. Every model answers row by row, so parts change no row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_dist.config.hosting import Precision
from rlhf_dist.core.batches import PromptBatch, RolloutBatch, concat_rows
from rlhf_dist.core.errors import SampleError, TrainingError
from rlhf_dist.core.futures import completed
from rlhf_dist.core.roles import Policy, Reference, RewardScorer, RolloutEngine, ValueFunction
from rlhf_dist.evaluation.reward_input import RewardInput
from rlhf_dist.ppo.config import PPOSettings
from rlhf_dist.ppo.sanity_checks import disagreement

NUM_CHECKED = 8
"""Responses an iteration that the policy reads for the check of log-probs it would otherwise not compute."""


@dataclass(frozen=True)
class Precisions:
    """How closely models that should agree can be expected to: the lower precision of the two."""

    rollout: Precision
    """Of policy and rollout engine."""
    same_distribution: bool = True
    """Whether rollouts are drawn from all tokens; else the engine's log-probs are of another distribution than the policy's."""
    same_start: Precision | None = None
    """Of policy and reference, where the reference is a copy of the untrained policy; None where it is another model."""


@dataclass(frozen=True)
class Scored:
    """What the models say of a `RolloutBatch`."""

    scores: Tensor
    """[B] fp32."""
    logprobs: Tensor
    """[B, R] fp32, under the policy that is about to be updated."""
    ref_logprobs: Tensor
    """[B, R] fp32."""
    state_values: Tensor
    """[B, R + 1] fp32: of the state before each response token and after the last."""

    @property
    def values(self) -> Tensor:
        """[B, R] fp32: of the state before each response token (column R holds the end of the longest response)."""
        return self.state_values[:, :-1]

    def end_values(self, response_lengths: Tensor) -> Tensor:
        """[B] fp32: of the state after the last response token."""
        return self.state_values.gather(1, response_lengths[:, None]).squeeze(1)


class Scorer:
    """The four models that read responses."""

    def __init__(
        self,
        policy: Policy,
        reference: Reference,
        reward: RewardScorer,
        value: ValueFunction,
        *,
        reward_input: RewardInput,
        settings: PPOSettings,
        precisions: Precisions,
    ) -> None:
        """`reward_input`: what the reward model reads of a rollout."""
        self.policy = policy
        self.reference = reference
        self.reward = reward
        self.value = value
        self.reward_input = reward_input
        self.settings = settings
        self.precisions = precisions

    def score(
        self, arriving: Iterator[RolloutBatch], phase: Callable[[str], AbstractContextManager[None]]
    ) -> tuple[RolloutBatch, Scored]:
        """All responses, and what the models say of them.

        Args:
            arriving: the parts; `next` waits for one.
            phase: measures the time of waiting for responses (`generate`) and for scores (`score`).
        """
        rollouts: list[RolloutBatch] = []
        asked: list[tuple[Future[Tensor], ...]] = []
        while True:
            with phase("generate"):
                rollout = next(arriving, None)
            if rollout is None:
                break
            with phase("score"):
                rollouts.append(rollout)
                asked.append(self._ask(rollout))
        with phase("score"):
            scored = [Scored(*(answer.result() for answer in answers)) for answers in asked]
            return concat_rows(rollouts), concat_rows(scored)

    def _ask(self, rollout: RolloutBatch) -> tuple[Future[Tensor], ...]:
        """The fields of `Scored`, in their order; the models work at the same time."""
        scores = self.reward.score(self.reward_input(rollout))
        ref_logprobs = self.reference.logprobs(rollout)
        from_rollout = self.settings.old_logprobs == "rollout"
        logprobs = completed(rollout.rollout_logprobs) if from_rollout else self.policy.logprobs(rollout)
        return scores, logprobs, ref_logprobs, self.value.values(rollout)

    def check(self, iteration: int, rollout: RolloutBatch, scored: Scored) -> None:
        """Nothing of the scored responses is NaN or infinite; rollouts come from the policy; the untrained policy is its
        reference.

        Raises:
            SampleError: something is not finite.
            TrainingError: two models that should be the same differ.
        """
        check_finite(rollout, scored)
        if not self.settings.self_checks:
            return
        for name, logprobs, others, mask, precision in self._same_weights(iteration, rollout, scored):
            if wrong := disagreement(logprobs, others, mask, precision):
                raise TrainingError(
                    f"policy and {name} have the same weights in iteration {iteration}, but their log-probs of the same tokens "
                    f"differ by {wrong}: one of them was loaded or is run wrongly. Compare the roles' settings (precision, "
                    "packed, attention); ppo.self_checks: false switches the check off"
                )

    def check_sync(self, engine: RolloutEngine, prompts: PromptBatch) -> None:
        """Policy and rollout engines have the same weights now: they give the tokens of a probe the same log-probs. Only where
        `check` cannot compare the rollouts themselves.

        Raises:
            TrainingError: they differ.
        """
        compared = self.precisions.same_distribution and not self.settings.off_policy_iterations
        if compared or not self.settings.self_checks:
            return
        probe = engine.probe(prompts).result()
        logprobs = self.policy.logprobs(probe).result()
        if wrong := disagreement(logprobs, probe.rollout_logprobs, probe.response_mask, self.precisions.rollout):
            raise TrainingError(
                f"after the sync of version {probe.policy_version} the log-probs of policy and rollout engines differ by "
                f"{wrong} on the tokens of a probe: the weights did not arrive as they were sent. Compare the roles' settings "
                "(precision, packed, attention); ppo.self_checks: false switches the check off"
            )

    def _same_weights(
        self, iteration: int, rollout: RolloutBatch, scored: Scored
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Precision]]:
        """(role, the policy's log-probs, the role's, response mask, precision) of roles with the policy's weights and the same
        distribution. Responses of older weights cannot be compared."""
        precisions = self.precisions
        if precisions.same_distribution and rollout.policy_version == self.settings.policy_version(iteration):
            compared, logprobs = rollout, scored.logprobs
            if self.settings.old_logprobs == "rollout":
                compared = rollout.rows(range(min(NUM_CHECKED, len(rollout))))
                logprobs = self.policy.logprobs(compared).result()
            yield "rollout engine", logprobs, compared.rollout_logprobs, compared.response_mask, precisions.rollout
        if iteration == 0 and precisions.same_start:
            yield "reference", scored.logprobs, scored.ref_logprobs, rollout.response_mask, precisions.same_start


def check_finite(rollout: RolloutBatch, scored: Scored) -> None:
    """Reject responses of which a model says something that is not a number.

    Raises:
        SampleError: names the models and the responses.
    """
    mask = rollout.response_mask
    state_mask = torch.nn.functional.pad(mask, (1, 0), value=True)
    parts = {
        "reward score": scored.scores[:, None].isfinite(),
        "rollout log-prob": rollout.rollout_logprobs.isfinite() | ~mask,
        "policy log-prob": scored.logprobs.isfinite() | ~mask,
        "reference log-prob": scored.ref_logprobs.isfinite() | ~mask,
        "value": scored.state_values.isfinite() | ~state_mask,
    }
    bad = {name: [row for row, fine in enumerate(finite.all(1).tolist()) if not fine] for name, finite in parts.items()}
    bad = {name: rows for name, rows in bad.items() if rows}
    if bad:
        what = "; ".join(f"{name} of responses {', '.join(map(str, rows))}" for name, rows in bad.items())
        raise SampleError(
            f"not finite: {what}. No weight was touched. Look at these samples; a model that overflows needs precision: fp32",
            {"rollouts": sorted({row for rows in bad.values() for row in rows})},
        )
