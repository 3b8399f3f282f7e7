"""`rlhf-dist eval`: what a policy and a reward model are worth on held-out records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.batches import PreferenceBatch, SequenceBatch
from rlhf_dist.roles import RewardScorer
from rlhf_dist.trainers.generation import score_responses
from rlhf_dist.trainers.run import Run
from rlhf_dist.trainers.supervised import mean_nll, pair_metrics


def evaluate_all(run: Run, roles: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Whatever the given roles and sets allow: loss and perplexity, pair accuracy, scored responses."""
    summary: dict[str, Any] = {}
    if data["instructions"] and "policy" in roles:
        loss = mean_nll(roles["policy"], data["instructions"])
        summary["policy"] = {"eval_loss": loss, "perplexity": math.exp(loss)}
    if data["preferences"] and "reward" in roles:
        metrics = pair_metrics(lambda batch: score_pairs(roles["reward"], batch), data["preferences"])
        summary["reward"] = {name.split("/eval_")[-1]: value for name, value in metrics.items()}
    if data["prompts"] and "rollout" in roles:
        rows, summary["generation"] = score_responses(
            data["prompts"], data["decode"], roles["rollout"], roles.get("reward"), roles.get("reference")
        )
        run.log_eval(0, rows)
    return summary


def score_pairs(reward: RewardScorer, batch: PreferenceBatch) -> Tensor:
    """[P, 2] fp32 scores of chosen and rejected, by a frozen reward model."""
    sides = (SequenceBatch(batch.chosen, batch.chosen_lengths), SequenceBatch(batch.rejected, batch.rejected_lengths))
    return torch.stack([scores.result() for scores in [reward.score(side) for side in sides]], dim=1)
