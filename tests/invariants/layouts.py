"""The fixed data, configurations and layouts of this suite, and how a training is driven through the real roles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reference_loop as plain
import torch
from support.bench import Layout
from support.tiny import random_rows, rollout_batch, token_batch
from torch import Tensor

from rlhf_dist.core.batches import Experience, PreferenceBatch, RolloutBatch, pad_rows
from rlhf_dist.distributed.group import WorkerSpec
from rlhf_dist.ppo.build import worker_specs
from rlhf_dist.ppo.config import PPOConfig
from rlhf_dist.reward.build import prepare as prepare_reward
from rlhf_dist.reward.config import RewardConfig
from rlhf_dist.sft.build import prepare as prepare_sft
from rlhf_dist.sft.config import SFTConfig

BASE = Layout(ranks=2, zero_stage=2, micro_batch_size=2)
"""One thing at a time is varied from here."""

Rows = Sequence[Tensor]

NUM_STEPS, EPS = 4, 1e-5
MAX_LENGTH = 16
"""Of a sequence, hence the smallest token budget of a forward pass; the data come close to it, so that it splits them."""
RM_MAX_LENGTH = 40
"""A record of preferences is rendered by a chat template, which alone is longer than `MAX_LENGTH`."""
# Warm-up over one of four steps, then linearly to 0 one step after the last: every step has a rate of its own.
OPTIMIZER = {
    "learning_rate": 1e-3,
    "betas": (0.9, 0.95),
    # Adam divides a gradient by its own size: at the usual 1e-8, gradients that are 0 but for rounding (1e-9) would become
    # steps of full length in a random direction, and bury what is compared here.
    "eps": EPS,
    "weight_decay": 0.1,
    "warmup_fraction": 0.25,
    "schedule": "linear",
}
RATES = (0.5e-3, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3)

SIZES = (5, 2, 7, 4)
"""Rows of each step. On three ranks: 2 + 2 + 1, then 1 + 1 + nothing, ..."""

TEMPERATURE, VALUE_CLIP, PTX_COEF = 0.8, 0.15, 0.7
MAX_GRAD_NORM = {"SFT": 6.3, "RM": 14.0, "PPO policy + PTX": 9.0, "PPO policy, other terms": 9.0, "PPO value": 4.0}
"""Each clips some of its steps and leaves others."""
SHAPING = plain.Shaping(kl_coef=0.1, gamma=0.95, gae_lambda=0.9, score_clip=0.5, missing_eos_penalty=0.3)
RANKING = {"margin_coef": 0.5, "centering_coef": 0.02}
INSTRUCT = plain.PolicyTerms(TEMPERATURE, clip_low=0.2, clip_high=0.2)
"""InstructGPT's objective, to which PTX is added."""
EXTENDED = plain.PolicyTerms(TEMPERATURE, 0.15, 0.25, dual_clip=1.2, entropy_coef=0.02, kl_coef=SHAPING.kl_coef)
"""All other terms of the policy's loss."""


def optimizer(max_grad_norm: float) -> plain.Optimizer:
    """What `OPTIMIZER` means, written out."""
    return plain.Optimizer(RATES, (0.9, 0.95), EPS, 0.1, max_grad_norm)


# -- data ----------------------------------------------------------------------------------------------------------------


def _lengths(num: int, seed: int, low: int = 2, high: int = 14) -> list[int]:
    return torch.randint(low, high, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


TEXTS = [token_batch(_lengths(num, step), seed=step) for step, num in enumerate(SIZES)]
PTX = [token_batch(_lengths(num, 20 + step), seed=20 + step) for step, num in enumerate((3, 1, 5, 2))]


def _rankings(num: int, seed: int) -> PreferenceBatch:
    """Prompts with two, three or four responses, rated; three have a tie for the last place."""
    most = [2 + (seed + i) % 3 for i in range(num)]
    responses = [random_rows(_lengths(k, seed + i), seed + i) for i, k in enumerate(most)]
    ranks = [list(range(k)) if k != 3 else [0, 1, 1] for k in most]
    ratings = [[1.5 - 0.4 * rank for rank in row] for row in ranks]
    return PreferenceBatch.of(responses, ranks, ratings)


RANKINGS = [_rankings(num, 40 + 10 * step) for step, num in enumerate(SIZES)]

PROMPT_LENGTHS, RESPONSE_LENGTHS = [3, 6, 2, 4, 5, 9, 1, 3, 7, 2], [4, 2, 7, 1, 3, 5, 6, 2, 8, 3]
STEPS = [torch.tensor(rows) for rows in ([4, 0, 2, 9, 7], [1, 3], [8, 5, 6, 0, 4, 2, 1], [9, 3, 7, 5])]
"""Rows of the experience in each optimizer step; most are met twice."""


def rollout() -> RolloutBatch:
    """Ragged prompts and responses of random tokens."""
    return rollout_batch(PROMPT_LENGTHS, RESPONSE_LENGTHS, seed=60)


def experience(rollout: RolloutBatch, **fields: Rows) -> Experience:
    """From one vector a row and field."""
    return Experience(
        tokens=rollout.tokens,
        prompt_lengths=rollout.prompt_lengths,
        response_lengths=rollout.response_lengths,
        **{name: pad_rows(rows, dtype=torch.float32) for name, rows in fields.items()},
    )


# -- models and configurations -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """Folders of four different tiny models, and of records that only make configurations whole."""

    policy: Path
    reference: Path
    reward: Path
    value: Path
    records: Path

    def write_records(self) -> None:
        """Enough for a data set to be one; trainings here bring their own batches."""
        rows = [
            {"prompt": f"say {i}", "chosen": "good", "rejected": "bad", "margin": 1.0, "text": f"say good {i}"}
            for i in range(8)
        ]
        self.records.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _data(models: Models, kind: str) -> list[dict[str, Any]]:
    return [{"path": str(models.records), "kind": kind}]


def trained(layout: Layout, path: Path, objective: str) -> dict[str, Any]:
    """A trained model's part of a configuration."""
    return layout.trained(path) | {"optimizer": OPTIMIZER | {"max_grad_norm": MAX_GRAD_NORM[objective]}}


def sft_spec(models: Models, layout: Layout) -> tuple[Any, WorkerSpec]:
    """(hosted model, spec) of an SFT run."""
    config = SFTConfig.model_validate(
        {
            "run_dir": "never-written",
            "model": trained(layout, models.policy, "SFT"),
            "data": {"train": _data(models, "text"), "max_length_tokens": MAX_LENGTH},
            "sft": {"num_steps": NUM_STEPS, "batch_size": 4},
        }
    )
    return config.model, prepare_sft(config).specs[0]


def reward_spec(models: Models, layout: Layout) -> tuple[Any, WorkerSpec]:
    """(hosted model, spec) of a reward-model run."""
    config = RewardConfig.model_validate(
        {
            "run_dir": "never-written",
            "model": trained(layout, models.reward, "RM"),
            "data": {"train": _data(models, "preference"), "max_length_tokens": RM_MAX_LENGTH},
            "reward": {"num_steps": NUM_STEPS, "batch_size": 4} | RANKING,
        }
    )
    return config.model, prepare_reward(config).specs[0]


def ppo_config(
    models: Models, layout: Layout, terms: plain.PolicyTerms = INSTRUCT, rollout_batch_size: int = 4, **ppo: Any
) -> PPOConfig:
    """A PPO run of four optimizer steps; `ppo`: further settings of that section."""
    return PPOConfig.model_validate(
        {
            "run_dir": "never-written",
            "policy": trained(
                layout, models.policy, "PPO policy, other terms" if terms.kl_coef else "PPO policy + PTX"
            ),
            "value": trained(layout, models.value, "PPO value"),
            "reference": layout.host(models.reference),
            "reward": layout.host(models.reward),
            "rollout": {
                "num_ranks": layout.ranks,
                "temperature": TEMPERATURE,
                "max_response_tokens": MAX_LENGTH - 1,
                "batch_size": rollout_batch_size,
            },
            "data": {
                "prompts": _data(models, "prompt"),
                "ptx": _data(models, "text"),
                "max_length_tokens": MAX_LENGTH,
            },
            "ppo": {
                "num_iterations": 1,
                "prompts_per_iteration": 10,
                "mini_batch_size": 5,
                "num_epochs": 2,
                "kl_coef": SHAPING.kl_coef,
                "gamma": SHAPING.gamma,
                "gae_lambda": SHAPING.gae_lambda,
                "score_clip": SHAPING.score_clip,
                "missing_eos_penalty": SHAPING.missing_eos_penalty,
                "bootstrap_truncated": True,
                "value_clip_range": VALUE_CLIP,
                "ptx_coef": PTX_COEF,
                "ptx_batch_size": 3,
                "clip_range": terms.clip_low,
                "clip_range_high": terms.clip_high,
                "dual_clip": terms.dual_clip,
                "entropy_coef": terms.entropy_coef,
                **({"kl_in": "loss", "kl_estimator": "k3"} if terms.kl_coef else {}),
                **ppo,
            },
        }
    )


def ppo_spec(config: PPOConfig, role: str) -> WorkerSpec:
    """The spec of one role."""
    return next(spec for spec in worker_specs(config) if spec.role == role)
