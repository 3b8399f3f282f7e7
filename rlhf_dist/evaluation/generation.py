"""Responses to prompts, scored and described: shared by PPO's evaluation and `rlhf-dist eval`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_dist.core.batches import TRUNCATED, RolloutBatch
from rlhf_dist.core.kl import kl_k1
from rlhf_dist.core.roles import Reference, RewardScorer, RolloutEngine
from rlhf_dist.evaluation.losses import chunks
from rlhf_dist.evaluation.reward_input import RewardInput, as_generated

Row = dict[str, Any]
Decode = Callable[[Tensor], str]


def generation_metrics(rollout: RolloutBatch, scores: Tensor) -> dict[str, float]:
    """Scores and lengths of a batch of responses."""
    truncated = float((rollout.finish_reasons == TRUNCATED).float().mean())
    return {
        "reward/score_mean": float(scores.mean()),
        "reward/score_std": float(scores.std(unbiased=False)),
        "rollout/response_length_mean": float(rollout.response_lengths.float().mean()),
        "rollout/eos_fraction": 1 - truncated,
        "rollout/truncated_fraction": truncated,
    }


def sample_rows(
    decode: Decode, rollout: RolloutBatch, scores: Tensor | None, logprobs: Tensor, ref: Tensor | None
) -> list[Row]:
    """One readable record a response: prompt, response, score, KL to the reference (nats, k1 over the response)."""
    kl = kl_k1(logprobs, ref).sum(1).tolist() if ref is not None else [None] * len(rollout)
    score = scores.tolist() if scores is not None else [None] * len(rollout)
    rows = []
    for i in range(len(rollout)):
        n, m = int(rollout.prompt_lengths[i]), int(rollout.response_lengths[i])
        rows.append(
            {
                "prompt": decode(rollout.tokens[i, :n]),
                "response": decode(rollout.tokens[i, n : n + m]),
                "score": score[i],
                "kl": kl[i],
                "response_tokens": m,
                "truncated": bool(rollout.finish_reasons[i] == TRUNCATED),
            }
        )
    return rows


def score_responses(
    dataset: Any,
    decode: Decode,
    rollout_engine: RolloutEngine,
    reward: RewardScorer | None,
    reference: Reference | None,
    reward_input: RewardInput = as_generated,
) -> tuple[list[Row], dict[str, float]]:
    """One response to every prompt of a set: its rows, and means with standard errors over prompts. `reward_input`: what the
    reward model is to score."""
    rows: list[Row] = []
    for indices in chunks(len(dataset)):
        rollout = rollout_engine.generate(dataset.batch(indices), stream="eval", iteration=0).result()
        scores = reward.score(reward_input(rollout)) if reward else None
        ref = reference.logprobs(rollout) if reference else None
        rows += sample_rows(
            decode,
            rollout,
            scores.result() if scores else None,
            rollout.rollout_logprobs,
            ref.result() if ref else None,
        )
    metrics: dict[str, float] = {"num_prompts": len(rows)}
    for name, key in (("score", "score"), ("kl_ref", "kl"), ("response_length", "response_tokens")):
        if rows[0][key] is not None:
            values = torch.tensor([float(row[key]) for row in rows], dtype=torch.float64)
            metrics[f"{name}_mean"] = float(values.mean())
            metrics[f"{name}_sem"] = float(values.std()) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    metrics["eos_fraction"] = sum(not row["truncated"] for row in rows) / len(rows)
    return rows, metrics
