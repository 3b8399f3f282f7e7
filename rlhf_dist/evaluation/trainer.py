"""`rlhf-dist eval`: what a policy and a reward model are worth on held-out records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, zeros

from rlhf_dist.core.batches import PreferenceBatch
from rlhf_dist.core.roles import RewardScorer
from rlhf_dist.evaluation.generation import score_responses
from rlhf_dist.evaluation.losses import mean_nll
from rlhf_dist.run.run import Run


def evaluate_all(run: Run, roles: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Whatever the given roles and sets allow: loss and perplexity, scored responses."""
    summary: dict[str, Any] = {}
    if data["instructions"] and "policy" in roles:
        loss = mean_nll(roles["policy"], data["instructions"])
        summary["policy"] = {"eval_loss": loss, "perplexity": math.exp(loss)}
    if data["prompts"] and "rollout" in roles:
        rows, summary["generation"] = score_responses(
            data["prompts"],
            data["decode"],
            roles["rollout"],
            roles.get("reward"),
            roles.get("reference"),
            data["reward_input"],
        )
        run.log_eval(0, rows)
    return summary


def score_pairs(reward: RewardScorer, batch: PreferenceBatch) -> Tensor:
    """[P, K] fp32 scores by a frozen reward model; 0 where there is no response."""
    return zeros(batch.lengths.shape).masked_scatter(batch.present, reward.score(batch.sequences).result())
